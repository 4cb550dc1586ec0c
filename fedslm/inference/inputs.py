"""Model inputs: rows of a file, and the words of a text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedslm.data import files
from fedslm.data.columns import Wanted
from fedslm.data.rows import rows_of
from fedslm.data.values import described, is_value, text_in
from fedslm.errors import DataError
from fedslm.storage import is_text

Rows = list[dict[str, Any]]
_WORD = re.compile(r"\d+(?:[.,]\d+)+|\w+|[^\w\s]")


def read_inputs(path: Path, columns: Sequence[str]) -> Rows:
    """Reads rows: a text file gives one row per line, blank ones too; other formats give their records.

    Args:
        path: A file that ends with .txt, or a file in any format supported for training data.
        columns: Columns that are needed.

    Raises:
        DataError: The file is missing, damaged or empty, or lacks a column; lists the existing columns.
    """
    if not path.exists():
        raise DataError(f"--file={str(path)!r}: no such file")
    if path.suffix.lower() == ".txt" and path.is_file():
        rows = _lines(path, columns)
    else:
        rows = _records(path, columns)
    if not rows:
        raise DataError(f"{path} is empty: it gives no records")
    return rows


def text_of(row: dict[str, Any], column: str, number: int) -> str:
    """Returns a row's text; empty if it is missing.

    Raises:
        DataError: The column contains a list, an object, bytes, or text that UTF-8 cannot encode.
    """
    value = row[column]
    if not is_value(value):
        found, remedy = described(value)
        raise DataError(f"row {number}: column {column!r} holds {found}; a text is needed: {remedy}")
    text = text_in(value)
    if not is_text(text):
        raise DataError(
            f"row {number}: column {column!r} contains a lone surrogate; save the text as UTF-8"
        )
    return text


def words_in(text: str) -> list[tuple[int, int]]:
    """Start and end offsets of each word: numbers, runs of letters and digits, single other characters.

    >>> text = "2.5 mg/d of B-12."
    >>> [text[first:end] for first, end in words_in(text)]
    ['2.5', 'mg', '/', 'd', 'of', 'B', '-', '12', '.']
    """
    return [match.span() for match in _WORD.finditer(text)]


def _records(path: Path, columns: Sequence[str]) -> Rows:
    """Returns the needed columns of each record."""
    wanted = Wanted({}, frozenset(columns))
    rows = [row for table in files.tables_in(path, wanted) for row in rows_of(table)]
    for column in columns:
        if rows and column not in wanted.there:
            raise DataError(
                f"{path} has no column {column!r}; it has {', '.join(wanted.there)}. Rename it, or use "
                f"a .txt file with one text on each line"
            )
    return rows


def _lines(path: Path, columns: Sequence[str]) -> Rows:
    """Returns one row for each line."""
    if len(columns) > 1:
        raise DataError(
            f"{path}: this run's prompt is made of {', '.join(columns)}; give a file with these columns"
        )
    rows = []
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        try:
            rows.append({columns[0]: line.decode("utf-8")})
        except UnicodeDecodeError:
            raise DataError(f"{path}, line {number} is not UTF-8; save the file as UTF-8") from None
    return rows
