"""Splits one file into train and test, such that no unit is in both."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedslm.data.holdout import is_held_out, record_name
from fedslm.data.owners import owners_in
from fedslm.data.tables import BATCH_ROWS, batches, named, parquet
from fedslm.errors import DataError, have
from fedslm.storage import replacing

if TYPE_CHECKING:
    from datasets import Dataset


# A run holds units out of train.parquet by the same rule: for one purpose, they would all be gone.
PURPOSE = "split-in-two"


@dataclass(frozen=True)
class Sides:
    """Sizes of the two sides of a split.

    Attributes:
        train_records: Records in ``train.parquet``.
        test_records: Records in ``test.parquet``.
        train_units: Units in ``train.parquet``.
        test_units: Units in ``test.parquet``.
    """

    train_records: int
    test_records: int
    train_units: int
    test_units: int


def split_in_two(
    dataset: Dataset, directory: Path, *, unit: str | None, fraction: float, seed: int
) -> Sides:
    """Writes ``train.parquet`` and ``test.parquet``.

    Formal guarantees:
        * The side of a unit depends on its name, the fraction and the seed only (:func:`is_held_out`):
          one person more or less moves nobody else, so the guarantee of a run on ``train.parquet``
          holds for the whole file too, as far as its training side goes.

    Args:
        dataset: All records; read in chunks.
        directory: Directory for the two files.
        unit: Column that names a record's owner; None: each record is a unit, equal ones stay together.
        fraction: Expected share of the units in the test file, in (0, 1).
        seed: Seed of the random split.

    Raises:
        DataError: A file exists already, a record has no unit, or all units are on one side.
    """
    paths = [directory / "train.parquet", directory / "test.parquet"]
    for path in paths:
        if path.exists():
            raise DataError(f"{path} exists; choose another directory")
    owners = _owners(dataset, unit)
    units = set(owners)
    if len(units) < 2:
        raise DataError(f"there is only {len(units)} unit; two are needed, one for each file")
    tested = {each for each in units if is_held_out(each, fraction, seed, PURPOSE)}
    count = len(tested)
    if not 0 < count < len(units):
        side = "training" if not count else "test"
        raise DataError(
            f"all {len(units)} units are on the {side} side with fraction {fraction:g} and seed "
            f"{seed}; choose another fraction or another seed"
        )
    is_test = [owner in tested for owner in owners]
    _write(dataset, is_test, paths)
    records = sum(is_test)
    return Sides(len(owners) - records, records, len(units) - count, count)


def write_chosen(
    dataset: Dataset, path: Path, rows: Sequence[int], columns: Mapping[str, Sequence[str]]
) -> None:
    """Writes some rows of a data set as a Parquet file.

    Args:
        dataset: Any data set.
        path: The file.
        rows: Row numbers, in the order of the file.
        columns: Further columns, each with one text for each row.

    Raises:
        DataError: A column has a type that Parquet cannot hold.
        RunError: The file cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    def tables() -> Iterator[pa.Table]:
        first = 0
        for table in dataset.select(rows).with_format("arrow").iter(BATCH_ROWS):
            for name, values in columns.items():
                part = pa.array(values[first : first + len(table)], pa.string())
                table = table.append_column(name, part)
            yield table
            first += len(table)

    with replacing(path) as temporary, parquet(path):
        whole = pa.concat_tables(tables())
        pq.write_table(whole, temporary)


def _owners(dataset: Dataset, unit: str | None) -> list[str]:
    """Returns the owner of each record, or a hash of its content."""
    if unit is None:
        return [
            hashlib.blake2b(record_name(row).encode(), digest_size=16).hexdigest()
            for row in _rows(dataset)
        ]
    owners = owners_in(dataset, unit, "--unit")
    missing = [row for row, owner in enumerate(owners) if not owner]
    if missing:
        raise DataError(f"{have(len(missing), 'record')} no value in {unit!r} ({named(missing)})")
    return owners


def _rows(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Yields rows, read in chunks."""
    for _, values in batches(dataset):
        for row in zip(*values.values(), strict=True):
            yield dict(zip(values, row, strict=True))


def _write(dataset: Dataset, is_test: list[bool], paths: list[Path]) -> None:
    """Writes both files in chunks; either both appear or neither."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    first = 0
    with ExitStack() as stack:
        temporaries = [stack.enter_context(replacing(path)) for path in paths]
        schema = dataset.with_format("arrow")[:1].schema
        with parquet(paths[0]), ExitStack() as files:
            train, test = (files.enter_context(pq.ParquetWriter(each, schema)) for each in temporaries)
            for table in dataset.with_format("arrow").iter(BATCH_ROWS):
                mask = pa.array(is_test[first : first + len(table)])
                test.write_table(table.filter(mask))
                train.write_table(table.filter(pa.compute.invert(mask)))
                first += len(table)
