"""A simulation's data on disk: one Parquet file with one row group for each client.

The data set is read and shared out once; a worker then reads just the client that it is. Columns keep
their names. The public evaluation split lies beside it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedslm.config import DataConfig, PrivacyConfig, TaskConfig
from fedslm.data.partition import partition
from fedslm.data.sources import cut, load_evaluation, load_train
from fedslm.errors import DataError
from fedslm.storage import write_text

if TYPE_CHECKING:
    from datasets import Dataset

Row = dict[str, Any]


@dataclass(frozen=True)
class Shards:
    """What a simulation's data directory holds.

    Attributes:
        names: Name of each client.
        sizes: Records of each client: for the researcher's eyes, never sent.
        labels: Class names (from the config or from the public split); empty for language models.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    labels: tuple[str, ...]


def write(
    directory: Path,
    data: DataConfig,
    task: TaskConfig,
    *,
    privacy: PrivacyConfig,
    num_clients: int,
    seed: int,
) -> Shards:
    """Loads, checks, shares out and writes a simulation's data; does nothing if it is there.

    Raises:
        DataError: Anything about the data that would stop a client later.
    """
    index = directory / "shards.json"
    if (written := _read_index(index)) is not None:
        return written
    train, evaluation = load_train(data, seed), load_evaluation(data, seed)
    _check(evaluation, data, task, (), "evaluation")
    labels = _labels(data, task, evaluation)
    _check(evaluation, data, task, labels, "evaluation")
    _check(train, data, task, labels, "training")
    evaluation = cut(evaluation, data.max_evaluation_records, seed)
    shards = partition(train, data, num_clients, seed)
    if privacy.unit == "patient":
        _check_units([shard for _, shard in shards], str(privacy.unit_column), privacy.overlapping)
    directory.mkdir(parents=True, exist_ok=True)
    _write_parquet(directory / "train.parquet", [shard for _, shard in shards])
    _write_parquet(directory / "evaluation.parquet", [evaluation])
    names, sizes = (tuple(column) for column in zip(*((n, len(s)) for n, s in shards), strict=True))
    write_text(index, json.dumps({"names": names, "sizes": sizes, "labels": labels}))
    return Shards(names, sizes, labels)


def read_client(directory: Path, client: int, columns: Set[str] | None = None) -> list[Row]:
    """Reads the rows of one client.

    Args:
        directory: Holds ``train.parquet``.
        client: Index of the client.
        columns: Those to read, as far as they are there; None: all. What is not read cannot fail.

    Raises:
        DataError: There is no such client.
    """
    return _read_row_group(directory / "train.parquet", client, columns)


def read_evaluation(directory: Path) -> list[Row]:
    """Reads the public evaluation rows."""
    return _read_row_group(directory / "evaluation.parquet", 0)


def _read_index(index: Path) -> Shards | None:
    """Reads what :func:`write` wrote last; None if it never came so far."""
    try:
        values = json.loads(index.read_text(encoding="utf-8"))
        return Shards(**{key: tuple(value) for key, value in values.items()})
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _labels(data: DataConfig, task: TaskConfig, evaluation: Dataset) -> tuple[str, ...]:
    """Class names from the config, else from the public split; never from private data."""
    if task.name != "classification":
        return ()
    labels = task.labels or tuple(sorted({str(x) for x in evaluation[str(data.label_column)]}))
    if len(labels) < 2:
        raise DataError(f"the public evaluation split names {len(labels)} class(es); set task.labels")
    return labels


def _check(
    dataset: Dataset, data: DataConfig, task: TaskConfig, labels: tuple[str, ...], part: str
) -> None:
    """Refuses empty splits, empty texts, missing and unknown labels, naming the rows."""
    if len(dataset) == 0:
        raise DataError(f"the {part} split is empty")
    texts = dataset[data.text_column]
    _refuse_rows(
        [row for row, text in enumerate(texts) if not isinstance(text, str) or not text.strip()],
        f"of the {part} split have no text in column {data.text_column!r}",
    )
    if task.name == "classification":
        found = dataset[str(data.label_column)]
        _refuse_rows(
            [row for row, label in enumerate(found) if label is None],
            f"of the {part} split have no label in column {data.label_column!r}",
        )
    if labels:
        unknown = Counter(str(x) for x in dataset[str(data.label_column)]) - Counter(
            {label: len(dataset) for label in labels}
        )
        if unknown:
            shown = ", ".join(f"{label!r} ({count})" for label, count in unknown.most_common(5))
            raise DataError(
                f"the {part} split has labels that are not in task.labels or the public split: "
                f"{shown}; known: {', '.join(labels[:20])}"
            )


def _check_units(parts: list[Dataset], column: str, overlapping: bool) -> None:
    """Refuses records without a unit, and units in several clients unless they were announced."""
    if column not in parts[0].column_names:
        there = ", ".join(parts[0].column_names)
        raise DataError(f"privacy.unit_column={column!r} is not a column; there are {there}")
    owners = [["" if owner is None else str(owner).strip() for owner in part[column]] for part in parts]
    missing = sum(not owner for part in owners for owner in part)
    if missing:
        raise DataError(
            f"{missing} record(s) have no value in privacy.unit_column={column!r}; remove them"
        )
    clients = Counter(owner for part in owners for owner in set(part))
    straddling = [owner for owner, count in clients.items() if count > 1]
    if straddling and not overlapping:
        raise DataError(
            f"{len(straddling)} of {len(clients)} units lie in several clients, so the largest epsilon "
            f"of a client is not theirs; set privacy.overlapping=true, or a data.partition that keeps "
            f"them together"
        )


def _refuse_rows(rows: list[int], what: str) -> None:
    """Raises if there are such rows, naming the first."""
    if rows:
        shown = ", ".join(map(str, rows[:5])) + (", …" if len(rows) > 5 else "")
        raise DataError(f"{len(rows)} record(s) {what} (rows {shown}); remove them")


def _write_parquet(path: Path, parts: list[Dataset]) -> None:
    """Writes one row group for each part, then renames into place."""
    import pyarrow.parquet as pq

    temporary = path.with_suffix(".partial")
    tables = [part.with_format("arrow")[:] for part in parts]
    with pq.ParquetWriter(temporary, tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=max(1, len(table)))
    temporary.replace(path)


def _read_row_group(path: Path, index: int, columns: Set[str] | None = None) -> list[Row]:
    """Reads one row group as a list of rows."""
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not 0 <= index < file.num_row_groups:
        raise DataError(f"{path} holds {file.num_row_groups} clients; there is no client {index}")
    known = file.schema_arrow.names
    chosen = known if columns is None else [name for name in known if name in columns]
    rows: list[Row] = file.read_row_group(index, columns=chosen).to_pylist()
    return rows
