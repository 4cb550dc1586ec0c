"""A simulation's data on disk.

The data set is read and partitioned once; afterwards, a worker reads only its client's records. Columns
keep their names.

train.arrow                the records of all clients, one client after another
offsets.npy                where each client's records begin, and where the last one's end
train/00000.arrow          instead, at a real node: its own records
train.parquet              instead, in a run of an earlier version: one row group per client
evaluation.parquet         the public evaluation split
public.parquet             public records available for training, if there are any
shards.json                names, sizes, labels; written last
columns.json               at a real node: the columns that its operator declares
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence, Set
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from fedslm.config import AttackConfig, DataConfig, PrivacyConfig, TaskConfig
from fedslm.data.federated import NO_ATTACK, Shared, load_what_is_public, share_out
from fedslm.data.partition import Partition
from fedslm.data.rows import Row, rows_of
from fedslm.data.stored_rows import StoredRows, place_of, write_batches
from fedslm.data.tables import BATCH_ROWS, parquet
from fedslm.errors import DataError, plural
from fedslm.storage import replacing, write_text

if TYPE_CHECKING:
    from datasets import Dataset


_DECLARED, _TRAIN, _OFFSETS = "columns.json", "train.arrow", "offsets.npy"


@dataclass(frozen=True)
class Shards:
    """Contents of a simulation's data directory.

    Attributes:
        names: Name of each client.
        sizes: Number of records of each client: for the researcher only, never sent.
        labels: Class names (from the config or from the public split); empty for language models.
        duplicates: Training records that also occur in the public split: for the researcher only.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    labels: tuple[str, ...]
    duplicates: int = 0


def write(
    directory: Path,
    data: DataConfig,
    task: TaskConfig,
    *,
    privacy: PrivacyConfig,
    num_clients: int,
    seed: int,
    attack: AttackConfig = NO_ATTACK,
) -> Shards:
    """Loads, checks, partitions and writes a simulation's data; does nothing if that was done before.

    Raises:
        DataError: The data has a defect that would stop a client later, or cannot be written.
        RunError: The records of the clients cannot be written (for example, the disk is full).
    """
    index = directory / "shards.json"
    if (written := _read_index(index)) is not None:
        return written
    scratch = directory.parent
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        shared = share_out(
            data,
            task,
            privacy,
            num_clients=num_clients,
            seed=seed,
            scratch=scratch,
            attack=attack,
        )
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write_shards(directory, shared.shards)
        write_parquet(directory / "evaluation.parquet", [shared.evaluation])
        if shared.public is not None:
            write_parquet(directory / "public.parquet", [shared.public])
    except OSError as error:
        raise DataError(f"{directory} cannot be written: {error}") from error
    shards = _summary(shared)
    write_text(index, json.dumps(asdict(shards)))
    return shards


def write_public(
    directory: Path, data: DataConfig, task: TaskConfig, *, names: tuple[str, ...], seed: int
) -> Shards:
    """Writes the data that a server of real nodes may see; private records are not accessed.

    Args:
        directory: The run's data directory.
        data: Sources and columns.
        task: The learning task.
        names: Name of each client.
        seed: The run's seed.

    Raises:
        DataError: The public data has a defect that would stop a run later, or cannot be written.
    """
    index = directory / "shards.json"
    if (written := _read_index(index)) is not None:
        return written
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        public = load_what_is_public(data, task, seed, directory.parent, beside_private=False)
        write_parquet(directory / "evaluation.parquet", [public.evaluation])
        if public.records is not None:
            write_parquet(directory / "public.parquet", [public.records])
    except OSError as error:
        raise DataError(f"{directory} cannot be written: {error}") from error
    shards = Shards(names, (), public.labels)
    write_text(index, json.dumps(asdict(shards)))
    return shards


def client_names(directory: Path) -> tuple[str, ...]:
    """Returns the names of a run's clients, by index; empty if the data directory has none."""
    found = _read_index(directory / "shards.json")
    return () if found is None else found.names


def write_own(directory: Path, rows: Dataset, client: int, columns: Sequence[str] = ()) -> None:
    """Writes one node's own records in the form that :func:`read_client` reads.

    Args:
        directory: The node's data directory.
        rows: The node's records.
        client: The node's index in the population.
        columns: Columns that the operator declares; empty: none are declared.

    Raises:
        DataError: The records cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _write_arrow(directory / "train", client, rows)
    except OSError as error:
        raise DataError(f"{directory} cannot be written: {error}") from error
    write_text(directory / _DECLARED, json.dumps(list(columns)))


def declared_columns(directory: Path) -> frozenset[str] | None:
    """Columns that a node's operator declares, whatever its records have; None if none are declared.

    Raises:
        DataError: The file cannot be read.
    """
    path = directory / _DECLARED
    if not path.exists():
        return None
    try:
        return frozenset(json.loads(path.read_text(encoding="utf-8"))) or None
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _summary(shared: Shared) -> Shards:
    """Returns the names, sizes and labels of partitioned data."""
    names, sizes = tuple(shared.shards.names), tuple(shared.shards.sizes)
    return Shards(names, sizes, shared.labels, shared.duplicates)


def read_client(directory: Path, client: int, columns: Set[str] | None = None) -> Sequence[Row]:
    """Returns the rows of one client, which are read when they are accessed.

    Args:
        directory: The data directory of a run or of a real node.
        client: Index of the client.
        columns: Columns to read, if they exist; None: all. Columns that are not read cannot fail.

    Raises:
        DataError: There is no such client, or a file is damaged.
    """
    folder, earlier = directory / "train", directory / "train.parquet"
    if folder.is_dir():
        path = folder / _file_name(client)
        if client < 0 or not path.exists():
            count = len(list(folder.glob("*.arrow")))
            raise DataError(f"{folder} holds {plural(count, 'client')}; there is no client {client}")
        return StoredRows(path, columns)
    if earlier.exists():
        return _read_row_group(earlier, client, columns)
    return StoredRows(directory / _TRAIN, columns, place_of(directory / _OFFSETS, client))


def holds(directory: Path, client: int) -> bool:
    """Whether :func:`read_client` finds a client's files there."""
    return all((directory / file).exists() for file in _files_of(directory, client))


def pin(directory: Path, client: int, target: Path, *, linked: bool) -> None:
    """Keeps a client's current records, readable only by the owner, even if the original is replaced.

    Args:
        directory: As :func:`read_client`.
        client: Index of the client.
        target: Directory that :func:`read_client` reads afterwards.
        linked: Whether the file is only ever replaced, as :func:`write_own` does, and never modified in
            place: then a hard link shares its bytes, where the file system supports it; else a copy.

    Raises:
        RunError: The copy cannot be made.
    """
    for file in _files_of(directory, client):
        with replacing(target / file) as temporary:
            temporary.unlink(missing_ok=True)  # left by a process that was killed
            if linked:
                with suppress(OSError):
                    os.link(directory / file, temporary)
            if not temporary.exists():
                shutil.copyfile(directory / file, temporary)
            temporary.chmod(0o600)


def _files_of(directory: Path, client: int) -> tuple[Path, ...]:
    """Returns the files with a client's records."""
    if (directory / "train").is_dir():
        return (Path("train", _file_name(client)),)
    return Path(_TRAIN), Path(_OFFSETS)


def read_evaluation(directory: Path) -> list[Row]:
    """Reads the public evaluation rows."""
    return _read_row_group(directory / "evaluation.parquet", 0)


def read_public(directory: Path) -> list[Row]:
    """Reads the public rows available for training; empty if there are none."""
    path = directory / "public.parquet"
    return _read_row_group(path, 0) if path.exists() else []


def _file_name(client: int) -> str:
    """Returns the name of a client's file."""
    return f"{client:05d}.arrow"


def _read_index(index: Path) -> Shards | None:
    """Reads the file that :func:`write` writes last; None if writing did not finish."""
    try:
        values = json.loads(index.read_text(encoding="utf-8"))
        names, sizes, labels = (tuple(values[key]) for key in ("names", "sizes", "labels"))
        return Shards(names, sizes, labels, int(values["duplicates"]))
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return None


def _write_shards(directory: Path, shards: Partition) -> None:
    """Writes the records of all clients to one file, and where each client's begin."""
    import numpy as np

    pieces = (piece.with_format("arrow") for piece in shards.pieces())
    tables = (table for piece in pieces for table in piece.iter(BATCH_ROWS))
    with replacing(directory / _TRAIN) as temporary:
        write_batches(temporary, shards.dataset.with_format("arrow")[:1].schema, tables)
    with replacing(directory / _OFFSETS) as temporary, temporary.open("wb") as file:
        np.save(file, np.concatenate([[0], shards.ends]).astype(np.int64))


def _write_arrow(folder: Path, client: int, rows: Dataset) -> None:
    """Writes one client's file, then renames the folder into place."""
    with TemporaryDirectory(dir=folder.parent, prefix="train-") as temporary:
        whole = rows.with_format("arrow")
        path = Path(temporary) / _file_name(client)
        write_batches(path, whole[:1].schema, whole.iter(BATCH_ROWS))
        shutil.rmtree(folder, ignore_errors=True)
        Path(temporary).rename(folder)
        Path(temporary).mkdir()  # created for the cleanup of the temporary directory


def write_parquet(path: Path, parts: list[Dataset]) -> None:
    """Writes one row group per part, then renames the file into place."""
    import pyarrow.parquet as pq

    temporary = path.with_suffix(".partial")
    tables = [part.with_format("arrow")[:] for part in parts]
    with parquet(path), pq.ParquetWriter(temporary, tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=max(1, len(table)))
    temporary.replace(path)


def _read_row_group(path: Path, index: int, columns: Set[str] | None = None) -> list[Row]:
    """Reads one row group as a list of rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        if 0 <= index < file.num_row_groups:
            known = file.schema_arrow.names
            chosen = known if columns is None else [name for name in known if name in columns]
            return rows_of(file.read_row_group(index, columns=chosen))
    except (OSError, ValueError, pa.ArrowException) as error:  # damaged text raises ValueError
        raise DataError(f"{path} cannot be read, it may be damaged: {error}") from error
    raise DataError(f"{path} holds {plural(file.num_row_groups, 'client')}; there is no client {index}")
