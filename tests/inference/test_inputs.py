"""Tests of reading what a model is asked about."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from fedslm.errors import DataError
from fedslm.inference.inputs import read_inputs, text_of, words_in

ROWS = [{"note": "heart", "age": "7"}, {"note": "bone, wrist", "age": "8"}]


def write(directory: Path, name: str) -> Path:
    """Writes ROWS in a format."""
    path = directory / name
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif name.endswith(".parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        table = 'note,age\nheart,7\n"bone, wrist",8\n'
        path.write_text(lines if "json" in name else table)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet"])
def test_every_format_gives_its_rows_in_order(tmp_path: Path, name: str) -> None:
    """All formats of training data can be asked about."""
    assert read_inputs(write(tmp_path, name), ["note", "age"]) == ROWS


def test_a_text_file_gives_each_line(tmp_path: Path) -> None:
    """Blank lines too, so that answers can be laid beside the lines; a byte order mark is none."""
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffHerz\r\n\nKnöchel".encode())
    assert read_inputs(path, ["note"]) == [{"note": "Herz"}, {"note": ""}, {"note": "Knöchel"}]


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.csv", b"text,age\na,1\n", ("no column 'note'", "it has text, age")),
        ("a.jsonl", b'{"text": "a"}\n', ("no column 'note'", "it has text")),
        ("a.txt", b"", ("is empty",)),
        ("a.jsonl", b"", ("is empty",)),
        ("a.jsonl", b"\n", ("is empty",)),
        ("a.txt", b"good\nb\xffd\n", ("line 2", "not UTF-8")),
        ("a.jsonl", b"{", ("line 1", "json")),
        ("a.pdf", b"x", ("unknown format",)),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, parts: tuple[str, ...]) -> None:
    """What is wrong with a file, and where."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_inputs(path, ["note"])
    for part in (name, *parts):
        assert part in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """A file that is not there."""
    with pytest.raises(DataError, match="no such file"):
        read_inputs(tmp_path / "no.txt", ["note"])


def test_a_text_file_has_one_column(tmp_path: Path) -> None:
    """A prompt of several columns needs a file with columns."""
    path = tmp_path / "a.txt"
    path.write_text("a\n")
    with pytest.raises(DataError, match="question, context"):
        read_inputs(path, ["question", "context"])


def test_values_become_text() -> None:
    """Numbers are text, nothing is an empty text, and a list is a mistake, named by its row."""
    assert [text_of({"note": value}, "note", 1) for value in ("a", 7, None)] == ["a", "7", ""]
    with pytest.raises(DataError, match="row 4: column 'note' holds a list"):
        text_of({"note": ["a"]}, "note", 4)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Fever, 38.5°C.", ["Fever", ",", "38.5", "°", "C", "."]),
        ("  two\twords\n", ["two", "words"]),
        ("patient's B12 1,000 IU", ["patient", "'", "s", "B12", "1,000", "IU"]),
        ("Übelkeit", ["Übelkeit"]),
        ("", []),
        ("...", [".", ".", "."]),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    """Words stand where they are said to stand."""
    assert [text[begin:end] for begin, end in words_in(text)] == expected
