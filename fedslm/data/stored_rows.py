"""Rows in a memory-mapped Arrow file whose batches have equal size: a row is found by its number."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, overload

from fedslm.data.rows import Row, rows_of
from fedslm.data.tables import BATCH_ROWS
from fedslm.errors import DataError, plural

if TYPE_CHECKING:
    import pyarrow as pa


class StoredRows(Sequence[Row]):
    """Rows of one client in a memory-mapped file; no row is kept in memory.

    Args:
        path: An Arrow file whose batches have :data:`fedslm.data.tables.BATCH_ROWS` rows, but the last.
        columns: As for :func:`fedslm.data.store.read_client`.
        place: Numbers of the client's rows; None: all rows are the client's.

    Raises:
        DataError: The file is damaged.
    """

    def __init__(self, path: Path, columns: Set[str] | None = None, place: range | None = None) -> None:
        import pyarrow as pa

        try:
            self._file = pa.ipc.open_file(pa.memory_map(str(path)))
            last = self._file.num_record_batches - 1
            rows = 0 if last < 0 else last * BATCH_ROWS + self._file.get_batch(last).num_rows
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path} cannot be read: {error}") from error
        self._place = range(rows) if place is None else place
        if self._place.stop > rows:
            raise DataError(f"{path} has {rows} rows, and the client's end at {self._place.stop}")
        known = self._file.schema.names
        self._columns = known if columns is None else [name for name in known if name in columns]

    def __len__(self) -> int:
        return len(self._place)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        try:
            batch, row = divmod(self._place[index], BATCH_ROWS)
        except IndexError:
            raise IndexError(f"index={index} is beyond {len(self)} rows") from None
        return rows_of(self._batch(batch).slice(row, 1))[0]

    def __iter__(self) -> Iterator[Row]:
        first, stop = self._place.start, self._place.stop
        while first < stop:
            batch, row = divmod(first, BATCH_ROWS)
            found = self._batch(batch).slice(row, stop - first)
            if not found.num_rows:  # it would go on for ever
                raise DataError(f"the file of a client's records is damaged: batch {batch} is short")
            yield from rows_of(found)
            first += found.num_rows

    def _batch(self, number: int) -> pa.RecordBatch:
        """Returns the chosen columns of a thousand rows, still on disk."""
        return self._file.get_batch(number).select(self._columns)


def place_of(path: Path, client: int) -> range:
    """Returns the numbers of a client's rows; reads only these of the file.

    Raises:
        DataError: There is no such client, or the file is damaged.
    """
    import numpy as np

    try:
        offsets = np.load(path, mmap_mode="r", allow_pickle=False)
        if offsets.dtype != np.int64 or offsets.ndim != 1 or len(offsets) < 2:
            raise ValueError("it must have one whole number for each client, and one more")
        if not 0 <= client < len(offsets) - 1:
            held = plural(len(offsets) - 1, "client")
            raise DataError(f"{path.parent} holds {held}; there is no client {client}")
        start, end, rows = int(offsets[client]), int(offsets[client + 1]), int(offsets[-1])
        if not 0 <= start <= end <= rows:
            raise ValueError(f"client {client} has rows {start} to {end} of {rows}")
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read, it may be damaged: {error}") from error
    return range(start, end)


def write_batches(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """Writes tables to an Arrow file in batches of equal size; only the last may be smaller."""
    import pyarrow as pa

    rest = schema.empty_table()
    with pa.ipc.new_file(str(path), schema) as writer:
        for table in tables:
            rest = pa.concat_tables([rest, table.cast(schema)])
            while len(rest) >= BATCH_ROWS:
                writer.write_batch(rest[:BATCH_ROWS].combine_chunks().to_batches()[0])
                rest = rest[BATCH_ROWS:]
        if len(rest):
            writer.write_batch(rest.combine_chunks().to_batches()[0])
