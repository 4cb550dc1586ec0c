"""Writes rows in chunks to a memory-mapped Arrow file, so that a data set may exceed memory.

The file is unlinked as soon as it is mapped: no copy of private rows remains, even after a crash.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from uuid import UUID

from fedslm.data.columns import Wanted, features_in
from fedslm.data.missing import is_nothing
from fedslm.data.rows import Row, rows_of, values_of
from fedslm.data.turns import slim
from fedslm.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

BATCH_ROWS = 1000
_SHOWN_ROWS, _SHOWN_CHARACTERS = 5, 60


def spool(tables: Iterable[pa.Table], scratch: Path | None, source: str) -> Dataset:
    """Writes tables to disk, one after another, and maps them as one data set.

    Args:
        tables: Any number with similar columns: missing ones are empty, and integers may become floats.
        scratch: Directory for the file; None: the system's temporary directory.
        source: Origin of the tables, for errors.

    Raises:
        DataError: There are no rows, two tables are incompatible, or a column has a type that a data
            set cannot hold.
    """
    try:
        with TemporaryDirectory(dir=scratch, prefix="spool-", ignore_cleanup_errors=True) as directory:
            path = _write(tables, Path(directory), source)
            if path is None:
                raise DataError(f"{source} is empty: it gives no records")
            return _mapped(path, source)
    except OSError as error:
        place = scratch or "the temporary directory"
        raise DataError(
            f"{source} cannot be copied to {place}: {error}; it needs as much space there as the rows"
        ) from error


def _mapped(path: Path, source: str) -> Dataset:
    """Maps a file as a data set; an error names the column that cannot be held."""
    import pyarrow as pa
    from datasets import Dataset, Features

    try:
        return Dataset.from_file(str(path))
    except Exception as error:  # datasets raises many unrelated types
        with pa.memory_map(str(path)) as file:
            fields = list(pa.ipc.open_stream(file).schema)
        for each in fields:
            try:
                Features.from_arrow_schema(pa.schema([each]))
            except Exception:
                raise DataError(
                    f"{source}: column {each.name!r} holds {str(each.type)[:_SHOWN_CHARACTERS]}, which "
                    f"cannot be read; convert it to texts, numbers or lists of them, or remove it"
                ) from error
        raise DataError(f"{source} cannot be read: {error}") from error


def batches(
    dataset: Dataset, columns: Iterable[str] | None = None
) -> Iterator[tuple[int, dict[str, list[Any]]]]:
    """Yields (number of the first row, column to values), a thousand rows at a time.

    Args:
        dataset: Any data set.
        columns: Columns to read; None: all.
    """
    chosen = dataset if columns is None else dataset.select_columns(list(dict.fromkeys(columns)))
    first = 0
    for table in chosen.with_format("arrow").iter(BATCH_ROWS):
        yield first, {name: values_of(table[name]) for name in table.column_names}
        first += len(table)


def rows_in(dataset: Dataset) -> list[Row]:
    """Returns all rows of a data set, converted as in :func:`rows_of`."""
    tables = dataset.with_format("arrow").iter(BATCH_ROWS)
    return [row for table in tables for row in rows_of(table)]


@contextmanager
def parquet(path: Path) -> Iterator[None]:
    """Turns errors about types that Parquet cannot hold into a DataError.

    Raises:
        DataError: Includes Arrow's message about the column.
    """
    import pyarrow as pa

    try:
        yield
    except pa.ArrowException as error:
        raise DataError(
            f"{path} cannot be written: {error}; convert the column to texts, numbers or lists of "
            f"them, or remove it"
        ) from error


def tables_of(rows: Iterable[Mapping[str, Any]], source: str, wanted: Wanted) -> Iterator[pa.Table]:
    """Collects rows into tables of the requested columns.

    Raises:
        DataError: A column contains values of incompatible types; names the rows.
    """
    iterator = iter(rows)
    first = 0
    while batch := list(islice(iterator, BATCH_ROWS)):
        names = wanted.of(dict.fromkeys(key for row in batch for key in row))
        yield _table(batch, dict.fromkeys([*names, *wanted.columns]), first, source, wanted.columns)
        first += len(batch)


def _table(
    rows: list[Mapping[str, Any]],
    names: Iterable[str],
    first: int,
    source: str,
    chosen: Sequence[str] = (),
) -> pa.Table:
    """Builds one table; missing values are null, and turns in chosen columns keep only their text."""
    import pyarrow as pa

    columns = {}
    for name in names:
        values = [_plain(row.get(name)) for row in rows]
        if name in chosen:
            values = [slim(each) for each in values]
        try:
            columns[str(name)] = pa.array(values)
            str(name).encode()
            if _is_bytes(columns[str(name)].type) and any(isinstance(each, str) for each in values):
                raise TypeError  # Arrow would convert all of them to bytes
        except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
            reason = _mixture(values, first) or _odd_value(values, first, error)
            raise DataError(f"{source}: column {name!r} cannot be read: {reason}") from None
    return pa.table(columns)


def _plain(value: object) -> object:
    """Converts NaN to None, so that it may occur among texts, and UUIDs to text for Arrow."""
    if is_nothing(value):
        return None
    return str(value) if isinstance(value, UUID) else value


def _odd_value(values: list[Any], first: int, error: Exception) -> str:
    """Names the first row that does not fit, or reports an invalid column name; shows no value."""
    import pyarrow as pa

    def is_fit(count: int) -> bool:
        try:
            pa.array(values[:count])
        except Exception:  # the caller's attempt failed in the same way
            return False
        return True

    if is_fit(len(values)):
        return "its name is not Unicode text; rename it"
    row = first_bad(len(values), is_fit)
    if isinstance(error, OverflowError):
        return f"row {first + row}: a number is too large for 64 bits; write the column as text"
    remedy = "write it as Unicode text" if isinstance(error, UnicodeError) else "give it one type"
    return f"row {first + row}: {error}; {remedy}"


def first_bad(count: int, is_good: Callable[[int], bool]) -> int:
    """Returns the index of the first value that makes the prefix invalid.

    Args:
        count: Number of values; the whole sequence is known to be invalid.
        is_good: Returns whether the first ``count`` values are valid.

    >>> first_bad(9, lambda count: count <= 4)
    4
    """
    return bisect_left(range(1, count), True, key=lambda number: not is_good(number))


def _mixture(values: list[Any], first: int) -> str:
    """Describes the types in the rows; empty if there is only one."""
    rows: dict[str, list[int]] = {}
    for number, value in enumerate(values, first):
        if value is not None:
            rows.setdefault(type(value).__name__, []).append(number)
    if len(rows) < 2:
        return ""
    kinds = " and ".join(f"{kind} ({named(numbers)})" for kind, numbers in rows.items())
    return f"{kinds}; give it one type"


def named(rows: list[int]) -> str:
    """Lists the first of some row numbers.

    >>> named([3]), named([1, 2, 3, 4, 5, 6])
    ('rows 3', 'rows 1, 2, 3, 4, 5, …')
    """
    return (
        "rows " + ", ".join(map(str, rows[:_SHOWN_ROWS])) + (", …" if len(rows) > _SHOWN_ROWS else "")
    )


def _write(tables: Iterable[pa.Table], directory: Path, source: str) -> Path | None:
    """Writes one part per schema and joins them; None without rows."""
    import pyarrow as pa

    schema: pa.Schema | None = None
    writer: pa.RecordBatchStreamWriter | None = None
    parts: list[Path] = []
    rows = 0
    try:
        for table in tables:
            wider = table.schema if schema is None else _unified(schema, table.schema, rows, source)
            if writer is None or wider != schema:
                if writer is not None:
                    writer.close()
                schema = wider
                parts.append(directory / f"{len(parts)}.arrow")
                writer = pa.ipc.new_stream(str(parts[-1]), schema)
            writer.write_table(_fitted(table, schema, source), max_chunksize=BATCH_ROWS)
            rows += len(table)
    finally:
        if writer is not None:
            writer.close()
    if not rows or schema is None:
        return None
    return parts[0] if len(parts) == 1 else _joined(parts, schema, directory, source)


def _joined(parts: list[Path], schema: pa.Schema, directory: Path, source: str) -> Path:
    """Rewrites parts of several schemas as one file."""
    import pyarrow as pa

    path = directory / "joined.arrow"
    with pa.ipc.new_stream(str(path), schema) as writer:
        for part in parts:
            with pa.memory_map(str(part)) as file:
                for batch in pa.ipc.open_stream(file):
                    writer.write_table(_fitted(pa.Table.from_batches([batch]), schema, source))
    return path


def _unified(before: pa.Schema, after: pa.Schema, row: int, source: str) -> pa.Schema:
    """Returns the narrowest schema that fits both."""
    import pyarrow as pa

    if before.metadata != after.metadata:
        _check_classes(before, after, row, source)
    if before.equals(after):
        return before
    try:
        both = pa.unify_schemas([before, after], promote_options="permissive")
        for each in both:
            kinds = [one.field(each.name).type for one in (before, after) if each.name in one.names]
            if _is_bytes(each.type) and any(map(_is_text, kinds)):
                raise pa.ArrowTypeError(f"column {each.name!r} holds texts and bytes")
        return both
    except pa.ArrowException as error:
        raise DataError(
            f"{source}: the records from row {row} on hold another type than those before: {error}; "
            f"give each column one type"
        ) from None


def _check_classes(before: pa.Schema, after: pa.Schema, row: int, source: str) -> None:
    """Refuses tables in which a number means a different class than before."""
    first, second = features_in(before), features_in(after)
    for name in first.keys() & second.keys():
        both = [json.dumps(each[name], sort_keys=True) for each in (first, second)]
        if both[0] != both[1] and all('"ClassLabel"' in each for each in both):
            raise DataError(
                f"{source}: the records from row {row} on have other class names in column {name!r} "
                f"than those before, or in another order; write names in place of their numbers"
            )


def _is_bytes(kind: pa.DataType) -> bool:
    """True for a bytes column."""
    import pyarrow as pa

    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_text(kind: pa.DataType) -> bool:
    """True for a text column."""
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _fitted(table: pa.Table, schema: pa.Schema, source: str) -> pa.Table:
    """Converts a table to a wider schema."""
    import pyarrow as pa

    if table.schema.equals(schema):
        return table
    there = set(table.column_names)
    try:
        columns = [
            table[each.name].cast(each.type) if each.name in there else pa.nulls(len(table), each.type)
            for each in schema
        ]
    except pa.ArrowException as error:
        raise DataError(f"{source}: a column has incompatible types: {error}") from None
    return pa.table(columns, schema=schema)
