"""Rows of a table, whatever one of their values does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

Row = dict[str, Any]


def rows_of(table: pa.Table | pa.RecordBatch) -> list[Row]:
    """Rows of a table; a value that Python cannot hold is None.

    Formal guarantees:
        * It never fails: a date of the year 10000, or bytes in a text column that are no UTF-8, change
          their own value alone, so that no record can make a client fail.

    >>> import pyarrow as pa
    >>> rows_of(pa.table({"day": pa.array([0, 10**8], pa.date32())}))
    [{'day': datetime.date(1970, 1, 1)}, {'day': None}]
    """
    try:
        whole: list[Row] = table.to_pylist()
    except Exception:  # pyarrow raises many unrelated types
        columns = {name: table.column(name) for name in table.schema.names}
        return [
            {name: _value(column, row) for name, column in columns.items()}
            for row in range(table.num_rows)
        ]
    return whole


def _value(column: Any, row: int) -> Any:
    """One value, or None."""
    try:
        return column[row].as_py()
    except Exception:  # this value alone decides
        return None
