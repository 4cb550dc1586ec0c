"""Rows of a table; an unreadable value affects nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedslm.data.missing import is_nothing

if TYPE_CHECKING:
    import pyarrow as pa

Row = dict[str, Any]


def rows_of(table: pa.Table | pa.RecordBatch) -> list[Row]:
    """Returns the rows of a table; NaN and values that Python cannot represent become None.

    Formal guarantees:
        * It never fails: a date in the year 10000, or bytes in a text column that are not UTF-8, change
          only their own value, so that no record can make a client fail.

    >>> import pyarrow as pa
    >>> rows_of(pa.table({"day": pa.array([0, 10**8], pa.date32())}))
    [{'day': datetime.date(1970, 1, 1)}, {'day': None}]
    """
    names = table.schema.names
    if not names:
        return [{} for _ in range(table.num_rows)]
    columns = [values_of(table.column(index)) for index in range(len(names))]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def values_of(column: pa.ChunkedArray | pa.Array) -> list[Any]:
    """Returns the values of a column, converted as in :func:`rows_of`."""
    try:
        values: list[Any] = column.to_pylist()
    except Exception:  # pyarrow raises many unrelated types
        values = [_value(column, row) for row in range(len(column))]
    return [None if is_nothing(value) else value for value in values]


def _value(column: Any, row: int) -> Any:
    """Returns one value, or None."""
    try:
        return column[row].as_py()
    except Exception:  # only this value is affected
        return None
