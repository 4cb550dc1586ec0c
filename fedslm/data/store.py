"""A simulation's data on disk.

The data set is read and partitioned once; afterwards, a worker reads only its client's records. Columns
keep their names.

train.parquet              one row group per client
train/00000.arrow …        instead, if data.streaming: one Arrow file per client, read row by row
evaluation.parquet         the public evaluation split
public.parquet             public records available for training, if there are any
shards.json                names, sizes, labels; written last
columns.json               at a real node: the columns that its operator declares
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, overload

from fedslm.config import AttackConfig, DataConfig, PrivacyConfig, TaskConfig
from fedslm.data.federated import NO_ATTACK, Shared, load_what_is_public, share_out
from fedslm.data.rows import Row, rows_of
from fedslm.data.tables import BATCH_ROWS, parquet
from fedslm.errors import DataError, plural
from fedslm.storage import replacing, write_text

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset


_DECLARED = "columns.json"


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
        directory.mkdir(parents=True, exist_ok=True)
        parts = [shard for _, shard in shared.shards]
        if data.streaming:
            _write_arrow(directory / "train", dict(enumerate(parts)))
        else:
            write_parquet(directory / "train.parquet", parts)
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
        directory.mkdir(parents=True, exist_ok=True)
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
        _write_arrow(directory / "train", {client: rows})
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
    names = tuple(name for name, _ in shared.shards)
    sizes = tuple(len(shard) for _, shard in shared.shards)
    return Shards(names, sizes, shared.labels, shared.duplicates)


def read_client(directory: Path, client: int, columns: Set[str] | None = None) -> Sequence[Row]:
    """Reads the rows of one client.

    Args:
        directory: Contains ``train.parquet`` or ``train/``.
        client: Index of the client.
        columns: Columns to read, if they exist; None: all. Columns that are not read cannot fail.

    Returns:
        Rows in memory, or (``train/``) rows that are read on access.

    Raises:
        DataError: There is no such client.
    """
    folder = directory / "train"
    if folder.is_dir():
        return StoredRows(folder, client, columns)
    return _read_row_group(directory / "train.parquet", client, columns)


def holds(directory: Path, client: int) -> bool:
    """Whether :func:`read_client` finds a client there."""
    return (directory / _file_of(directory, client)).exists()


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
    file = _file_of(directory, client)
    with replacing(target / file) as temporary:
        temporary.unlink(missing_ok=True)  # left by a process that was killed
        if linked:
            with suppress(OSError):
                os.link(directory / file, temporary)
        if not temporary.exists():
            shutil.copyfile(directory / file, temporary)
        temporary.chmod(0o600)


def _file_of(directory: Path, client: int) -> Path:
    """Returns the file with a client's records."""
    return (
        Path("train", _file_name(client)) if (directory / "train").is_dir() else Path("train.parquet")
    )


def read_evaluation(directory: Path) -> list[Row]:
    """Reads the public evaluation rows."""
    return _read_row_group(directory / "evaluation.parquet", 0)


def read_public(directory: Path) -> list[Row]:
    """Reads the public rows available for training; empty if there are none."""
    path = directory / "public.parquet"
    return _read_row_group(path, 0) if path.exists() else []


class StoredRows(Sequence[Row]):
    """Rows of one client in a memory-mapped file; no row is kept in memory.

    Args:
        folder: Contains one Arrow file per client.
        client: Index of the client.
        columns: As for :func:`read_client`.

    Raises:
        DataError: There is no such client, or its file is damaged.
    """

    def __init__(self, folder: Path, client: int, columns: Set[str] | None = None) -> None:
        import pyarrow as pa

        path = folder / _file_name(client)
        if client < 0 or not path.exists():
            count = len(list(folder.glob("*.arrow")))
            raise DataError(f"{folder} holds {plural(count, 'client')}; there is no client {client}")
        try:
            self._file = pa.ipc.open_file(pa.memory_map(str(path)))
            batches = map(self._file.get_batch, range(self._file.num_record_batches))
            self._size = sum(int(batch.num_rows) for batch in batches)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path} cannot be read: {error}") from error
        known = self._file.schema.names
        self._columns = known if columns is None else [name for name in known if name in columns]

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(self._size))]
        if not -self._size <= index < self._size:
            raise IndexError(f"index={index} is beyond {self._size} rows")
        batch, row = divmod(index % self._size, BATCH_ROWS)
        return rows_of(self._batch(batch).slice(row, 1))[0]

    def __iter__(self) -> Iterator[Row]:
        for batch in range(self._file.num_record_batches):
            yield from rows_of(self._batch(batch))

    def _batch(self, number: int) -> pa.RecordBatch:
        """Returns the chosen columns of a thousand rows, still on disk."""
        return self._file.get_batch(number).select(self._columns)


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


def _write_arrow(folder: Path, parts: Mapping[int, Dataset]) -> None:
    """Writes one file per client, a thousand rows at a time, then renames the folder into place."""
    import pyarrow as pa

    with TemporaryDirectory(dir=folder.parent, prefix="train-") as temporary:
        for client, part in parts.items():
            rows = part.with_format("arrow")
            schema = rows[:1].schema
            with pa.ipc.new_file(str(Path(temporary) / _file_name(client)), schema) as writer:
                for table in rows.iter(BATCH_ROWS):
                    writer.write_batch(table.combine_chunks().to_batches()[0])
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
