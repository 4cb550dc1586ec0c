"""Read local files as tables in chunks: JSON (lines), CSV, TSV, Parquet, Arrow, folders of texts."""

from __future__ import annotations

import csv
import gzip
import json
import math
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fedslm.data.columns import Wanted
from fedslm.data.splits import FORMATS, format_of, is_gzip, texts_in
from fedslm.data.tables import BATCH_ROWS, first_bad, tables_of
from fedslm.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa


def tables_in(path: Path, wanted: Wanted | None = None) -> Iterator[pa.Table]:
    """Reads a file, or a folder of text files, in chunks.

    Args:
        path: The file or folder.
        wanted: Columns to read; None: all.

    Raises:
        DataError: The file is damaged, not UTF-8, ragged or of unknown format; names file and row.
    """
    import pyarrow as pa

    kind = "text" if path.is_dir() else format_of(path)
    if kind is None:
        known = ", ".join(FORMATS)
        raise DataError(f"{path}: unknown format; known: {known} (text also with .gz), folders of .txt")
    try:
        if path.is_file() and path.stat().st_size == 0:
            raise DataError(f"{path} is empty")
        if kind in _WRITTEN and (other := _other_format(path)):
            raise DataError(
                f"{path} holds {other}, not {kind.removeprefix('.')}; rename it, or unpack it"
            )
        yield from _READERS[kind](path, wanted or Wanted())
    except (OSError, EOFError, zlib.error, pa.ArrowException, csv.Error) as error:
        raise DataError(f"{path} cannot be read as {kind.removeprefix('.')}: {error}") from error
    except UnicodeDecodeError as error:  # readers that decode text raise a more specific error
        raise DataError(f"{path}: the name of a column is not UTF-8 ({error}); rename it") from error


_WRITTEN = (".jsonl", ".json", ".csv", ".tsv")  # text formats
_MAGIC = {b"\x1f\x8b": "gzip", b"PAR1": "Parquet", b"PK\x03\x04": "a ZIP or Excel file"}
_MAGIC |= {b"ARROW1": "Arrow", b"SQLite format 3": "SQLite", b"(\xb5/\xfd": "zstd"}


def _other_format(path: Path) -> str:
    """Detects a different format of a text file by its first bytes; empty if none is recognised."""
    with _opened(path) as file:
        start = file.read(16)
    return next((name for magic, name in _MAGIC.items() if start.startswith(magic)), "")


def _opened(path: Path) -> IO[bytes]:
    """Opens a file for reading bytes, decompressed if necessary."""
    return gzip.open(path) if is_gzip(path) else path.open("rb")  # type: ignore[return-value]


def _lines(path: Path) -> Iterator[str]:
    """Yields the lines of a text file, with their line ends."""
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: byte 0x{line[error.start]:02x} at position "
                    f"{error.start + 1} is not UTF-8; save the file as UTF-8"
                ) from None
            yield text.removeprefix("\ufeff") if number == 1 else text


def _json(path: Path, wanted: Wanted) -> Iterator[pa.Table]:
    """Reads JSON lines, or one list of records."""
    return tables_of(_json_rows(path, wanted), str(path), wanted)


def _json_rows(path: Path, wanted: Wanted) -> Iterator[dict[str, Any]]:
    """Yields one record per line, or per item of the single list."""
    is_first = True
    for number, line in enumerate(lines := _lines(path), 1):
        if not line.strip():
            continue
        if is_first and line.lstrip().startswith("["):
            items = _parsed(line + "".join(lines), path)
            for index, each in enumerate(items, 1):
                yield _record(each, path, "item", index, wanted)
            return
        is_first = False
        yield _record(_parsed(line, path, number), path, "line", number, wanted)


def _parsed(text: str, path: Path, line: int | None = None) -> Any:
    """Parses a JSON value."""
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        where = "" if line is None else f", line {line}"
        raise DataError(f"{path}{where} cannot be read as json: {error}; {_JSON_REMEDY}") from None


def _record(value: Any, path: Path, what: str, number: int, wanted: Wanted) -> dict[str, Any]:
    """Returns a JSON object after checking that no requested column occurs twice."""
    if not isinstance(value, dict):
        raise DataError(
            f"{path}, {what} {number} cannot be read as json: it is not an object; {_JSON_REMEDY}"
        )
    if isinstance(value, _Repeated) and (twice := wanted.among(value.names)):
        raise DataError(f"{path}, {what} {number} has {twice[0]!r} twice; remove one of them")
    return value


class _Repeated(dict[str, Any]):
    """A JSON object with duplicate names; the last value is kept.

    Args:
        pairs: Names and values.
    """

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        counted = Counter(name for name, _ in pairs)
        self.names = [name for name, count in counted.items() if count > 1]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Builds a JSON object."""
    value = dict(pairs)
    return value if len(value) == len(pairs) else _Repeated(pairs)


_JSON_REMEDY = "write one object on each line, or all of them as one list"
# NaN counts as missing, also in lists.
_CONSTANTS = {"NaN": None, "Infinity": math.inf, "-Infinity": -math.inf}
_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_CONSTANTS.__getitem__)


def _table(path: Path, wanted: Wanted) -> Iterator[pa.Table]:
    """Reads CSV or TSV; every value stays text, so that "007" is preserved, and blank is null."""
    import pyarrow as pa

    separator = "\t" if format_of(path) == ".tsv" else ","
    limit = csv.field_size_limit(sys.maxsize)
    try:
        reader = csv.reader(_lines(path), delimiter=separator, strict=True)
        header = _header(reader, path, separator)
        schema = pa.schema([(name, pa.string()) for name in header])
        rows: list[list[str | None]] = []
        for number, row in enumerate(_records(reader, header, path), 1):
            rows.append([value or None for value in row])
            if number % BATCH_ROWS == 0:
                yield wanted.fit(pa.table(list(zip(*rows, strict=True)), schema=schema))
                rows = []
        if rows:
            yield wanted.fit(pa.table(list(zip(*rows, strict=True)), schema=schema))
    finally:
        csv.field_size_limit(limit)


def _header(reader: Any, path: Path, separator: str) -> list[str]:
    """Reads and checks the column names."""
    names: list[str] = next(reader, [])
    header = [name.strip() for name in names]
    if header and (header[0] == "[" or header[0].startswith(("{", "[{"))):
        raise DataError(f"{path} holds JSON, not a table; rename it to .jsonl, or to .json")
    if len(names) > 1 and all(name != name.lstrip() for name in names[1:]):
        raise DataError(
            f"{path}: in the first line a space follows each {separator!r}; remove the spaces after "
            f"the separators, in all lines"
        )
    if len(header) == 1 and (other := _other_separator(header[0], separator)):
        raise DataError(
            f"{path}: the first line is one column, {header[0]!r}: its names are separated by "
            f"{other!r}, not by {separator!r}; save it with {separator!r}"
        )
    if len(header) > 1 and not header[0] and all(header[1:]):
        raise DataError(
            f"{path}: the first column has no name, as an index that pandas writes; save the file with "
            f"index=False, or give the column a name"
        )
    if not all(header) or len(set(header)) < len(header) or not header:
        raise DataError(f"{path}: the first line must name each column, once; it is {header}")
    return header


def _other_separator(line: str, separator: str) -> str:
    """Returns the separator of a header line if it is not the format's own; empty if there is none."""
    for other in (";", "\t", "|", ","):
        if other != separator and sum(bool(name.strip()) for name in line.split(other)) > 1:
            return other
    return ""


def _is_spaced(row: list[str]) -> bool:
    """Whether every field after the first begins with a space, and at least one of them with ' "'."""
    later = row[1:]
    return all(each[:1] == " " for each in later) and any(each[:2] == ' "' for each in later)


def _records(reader: Any, header: list[str], path: Path) -> Iterator[list[str]]:
    """Yields rows as long as the header; blank lines are skipped."""
    number = 0
    try:
        for row in reader:
            if not row:
                continue
            number += 1
            if len(row) != len(header):
                spaced = any(field.lstrip()[:1] == '"' for field in row)
                remedy = "remove the spaces before quotes" if spaced else "leave none out"
                raise DataError(
                    f"{path}, row {number} (line {reader.line_num}) has {len(row)} fields, the header "
                    f"has {len(header)}: quote fields that hold the separator, {remedy}"
                )
            if number == 1 and _is_spaced(row):
                raise DataError(
                    f"{path}, row 1 (line {reader.line_num}): a space stands before each quoted field, "
                    f"so that the quotes are part of the text; remove the spaces, in all lines"
                )
            yield row
    except csv.Error as error:
        raise DataError(f"{path}, row {number + 1} (line {reader.line_num}): {error}") from None


def _parquet(path: Path, wanted: Wanted) -> Iterator[pa.Table]:
    """Reads Parquet, with its metadata for class names."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        names = wanted.of(file.schema_arrow.names)
        batches = file.iter_batches(BATCH_ROWS, columns=names or None)
        yield from _sound((wanted.fit(pa.Table.from_batches([batch])) for batch in batches), path)


def _arrow(path: Path, wanted: Wanted) -> Iterator[pa.Table]:
    """Reads an Arrow IPC file or stream."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as file:
        try:
            reader = pa.ipc.open_file(file)
            batches: Iterable[Any] = map(reader.get_batch, range(reader.num_record_batches))
        except pa.ArrowInvalid:
            file.seek(0)
            batches = pa.ipc.open_stream(file)
        yield from _sound((wanted.fit(pa.Table.from_batches([batch])) for batch in batches), path)


def _sound(tables: Iterable[pa.Table], path: Path) -> Iterator[pa.Table]:
    """Refuses text that is not UTF-8, which would fail much later; names row and column."""
    first = 0
    for table in tables:
        for name in table.column_names:
            _check(table[name], f"column {name!r} of {path}", first)
        yield table
        first += len(table)


def _check(column: pa.ChunkedArray, name: str, first: int) -> None:
    """Refuses a column that Arrow finds damaged, and reports where."""
    import pyarrow as pa

    def damage(count: int) -> str:
        try:
            column.slice(0, count).validate(full=True)
        except pa.ArrowException as error:
            return str(error)
        return ""

    if problem := damage(len(column)):
        row = first + first_bad(len(column), lambda count: not damage(count))
        raise DataError(f"row {row}, {name}: {problem}; write texts as UTF-8")


def _texts(folder: Path, wanted: Wanted) -> Iterator[pa.Table]:
    """Reads text files: text, file name and, for files in subfolders, the folder name as the label."""
    files = texts_in(folder)
    labelled = any(file.parent != folder for file in files)

    def rows() -> Iterator[dict[str, Any]]:
        for file in files:
            row = {"text": "".join(_lines(file)), "file": str(file.relative_to(folder))}
            label = file.parent.name if file.parent != folder else None
            yield {**row, "label": label} if labelled else row

    return tables_of(rows(), str(folder), wanted)


_READERS: dict[str, Callable[[Path, Wanted], Iterator[pa.Table]]] = {
    ".jsonl": _json,
    ".json": _json,
    ".csv": _table,
    ".tsv": _table,
    ".parquet": _parquet,
    ".arrow": _arrow,
    "text": _texts,
}
