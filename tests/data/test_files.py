"""Tests of local files: what each format gives, and what is said of damaged ones."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest

from fedslm.config import DataConfig, TaskConfig
from fedslm.data import sources
from fedslm.data.columns import Wanted
from fedslm.data.files import tables_in
from fedslm.data.sources import load
from fedslm.errors import DataError

TASK = TaskConfig(name="causal-lm")
TAGS = TaskConfig(name="token-classification")


def rows_of(path: Path, split: str = "train") -> list[dict[str, Any]]:
    """The rows of a source."""
    rows: list[dict[str, Any]] = load(str(path), split).to_list()
    return rows


def refusal(path: Path) -> str:
    """What is said of a file that cannot be read: one screen at most."""
    with pytest.raises(DataError) as caught:
        load(str(path), "train")
    text = str(caught.value)
    assert str(path) in text
    assert len(text) < 600
    return text


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_arrow_files_and_streams_are_read(tmp_path: Path, kind: str) -> None:
    """Both forms of Arrow's own format give their rows."""
    table = pa.table({"text": ["a", "b"], "tags": [["O"], ["B-x", "O"]]})
    new = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    with new(str(tmp_path / "train.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert rows_of(tmp_path) == table.to_pylist()


def test_a_data_set_saved_by_the_datasets_library_is_read(tmp_path: Path) -> None:
    """Class indices in its Arrow files keep their names."""
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["x", "y"])}
    )
    saved = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    saved.save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    data, task = DataConfig(source=str(file)), TaskConfig(name="classification")
    assert list(sources.load_train(data, task, 0)["label"]) == ["y", "x"]


def test_lists_of_class_indices_become_tags(tmp_path: Path) -> None:
    """Tags that are stored as indices are read as names; -1 is no tag."""
    tags = datasets.Sequence(datasets.ClassLabel(names=["O", "B-x"]))
    features = datasets.Features({"tokens": datasets.Sequence(datasets.Value("string")), "ner": tags})
    content = {"tokens": [["a", "b"], ["c"]], "ner": [[1, 0], [-1]]}
    path = tmp_path / "train.parquet"
    datasets.Dataset.from_dict(content, features=features).to_parquet(str(path))
    data = DataConfig(source=str(path), text_column="tokens", label_column="ner")
    assert list(sources.load_train(data, TAGS, 0)["ner"]) == [["B-x", "O"], [None]]


@pytest.mark.parametrize("kind", ["list", "large list", "list of two"])
def test_class_indices_in_any_list_become_names(tmp_path: Path, kind: str) -> None:
    """The names are read from lists of every kind that Arrow has."""
    names = datasets.ClassLabel(names=["O", "B-x"])
    tags = {
        "list": datasets.List(names),
        "large list": datasets.LargeList(names),
        "list of two": datasets.List(names, length=2),
    }
    features = datasets.Features({"tokens": datasets.List(datasets.Value("string")), "ner": tags[kind]})
    content = {"tokens": [["a", "b"], ["c", "d"]], "ner": [[1, 0], [0, -1]]}
    path = tmp_path / "train.parquet"
    datasets.Dataset.from_dict(content, features=features).to_parquet(str(path))
    data = DataConfig(source=str(path), text_column="tokens", label_column="ner")
    assert list(sources.load_train(data, TAGS, 0)["ner"]) == [["B-x", "O"], ["O", None]]


def test_text_files_are_records(tmp_path: Path) -> None:
    """In a folder of texts each file is a record; blanks and line breaks stay."""
    for split, names in (("train", "ab"), ("test", "c")):
        (tmp_path / split).mkdir()
        for name in names:
            (tmp_path / split / f"{name}.txt").write_text(f"note {name}\n\nsecond – line\n")
    (tmp_path / "train" / "notes.md").write_text("not a record")
    text = "note {}\n\nsecond – line\n"
    assert rows_of(tmp_path) == [{"text": text.format(x), "file": f"{x}.txt"} for x in "ab"]
    assert rows_of(tmp_path, "test") == [{"text": text.format("c"), "file": "c.txt"}]
    assert rows_of(tmp_path / "train") == rows_of(tmp_path)


def test_folders_of_text_files_are_labels(tmp_path: Path) -> None:
    """Below a split, the folder that a text lies in is its label."""
    for label in ("neg", "pos"):
        (tmp_path / "train" / label).mkdir(parents=True)
        (tmp_path / "train" / label / "1.txt").write_text(f"a {label} text")
    assert rows_of(tmp_path) == [
        {"text": f"a {label} text", "file": f"{label}/1.txt", "label": label}
        for label in ("neg", "pos")
    ]


def test_a_split_may_come_in_pieces(tmp_path: Path) -> None:
    """Files SPLIT-00000-of-00002, as the hub names them, are one split, in order."""
    for number in (1, 0):
        name = tmp_path / f"train-0000{number}-of-00002.parquet"
        datasets.Dataset.from_list([{"text": f"{number}"}]).to_parquet(str(name))
    assert rows_of(tmp_path) == [{"text": "0"}, {"text": "1"}]


def test_columns_may_come_late(tmp_path: Path) -> None:
    """A column that the first thousands of records lack, or that is null there, is read all the same."""
    lines = [{"text": f"{n}", "age": 1, "tags": []} for n in range(1500)]
    lines += [{"text": "late", "age": 2.5, "tags": ["x"], "ward": "b"}]
    path = tmp_path / "notes.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = rows_of(path)
    assert rows[0] == {"text": "0", "age": 1.0, "tags": [], "ward": None}
    assert rows[1500] == lines[1500]
    assert [row["text"] for row in rows] == [line["text"] for line in lines]


def test_a_list_of_records_is_json_too(tmp_path: Path) -> None:
    """A .json file may hold one list, also over many lines."""
    path = tmp_path / "notes.json"
    path.write_text(json.dumps([{"text": "a"}, {"text": "b"}], indent=2))
    assert rows_of(path) == [{"text": "a"}, {"text": "b"}]


def test_identifiers_in_a_table_stay_texts(tmp_path: Path) -> None:
    """CSV has no types: "007" is not 7, "NA" is not nothing, and a byte order mark is no column."""
    path = tmp_path / "notes.csv"
    path.write_bytes(b"\xef\xbb\xbfpatient,text\r\n007,NA\r\n7,\r\n\r\n")
    assert rows_of(path) == [{"patient": "007", "text": "NA"}, {"patient": "7", "text": None}]


def test_a_long_field_is_read(tmp_path: Path) -> None:
    """A text may be longer than a CSV reader's usual limit of 131 072 characters."""
    path = tmp_path / "notes.csv"
    path.write_text("text\n" + "x" * 200_000 + "\n")
    assert len(rows_of(path)[0]["text"]) == 200_000


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".csv.gz"])
@pytest.mark.parametrize("row", ["only", "one{s}two{s}three"])
def test_a_ragged_row_is_named(tmp_path: Path, ending: str, row: str) -> None:
    """A row with more or fewer fields than the header is named by row and line."""
    separator = "\t" if ending == ".tsv" else ","
    lines = ["text{s}label", '"two\nlines"{s}x', row, "last{s}y"]
    content = "\n".join(lines).replace("{s}", separator).encode()
    path = tmp_path / f"notes{ending}"
    path.write_bytes(gzip.compress(content) if ending.endswith(".gz") else content)
    count = 1 if row == "only" else 3
    assert f"row 2 (line 4) has {count} fields, the header has 2" in refusal(path)


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".jsonl.gz"])
def test_bytes_that_are_not_utf8_are_named(tmp_path: Path, ending: str) -> None:
    """A file in another encoding is named with the line and the byte."""
    content = 'text\nplain\n"naïve"\n' if ending == ".csv" else '{"text": "a"}\n\n{"text": "naïve"}\n'
    path = tmp_path / f"notes{ending}"
    encoded = content.encode("latin-1")
    path.write_bytes(gzip.compress(encoded) if ending.endswith(".gz") else encoded)
    text = refusal(path)
    assert "line 3: byte 0xef" in text
    assert "UTF-8" in text


def test_texts_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    """The same in a folder of texts, and in a table whose texts were never checked."""
    (tmp_path / "a.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.txt, line 1: byte 0xef"):
        load(str(tmp_path), "train")
    broken = pa.array([b"ok", b"na\xefve"], pa.binary()).cast(pa.binary()).view(pa.string())
    table = pa.table({"text": broken})
    with pa.ipc.new_file(str(tmp_path / "train.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert "row 1, column 'text'" in (text := refusal(tmp_path / "train.arrow"))
    assert "UTF8" in text


def test_a_name_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    """A file's name, and a column's, that are no Unicode text are errors with the record or the file."""
    (tmp_path / "texts").mkdir()
    for name in (b"a.txt", b"na\xefve.txt"):
        (Path(os.fsdecode(os.fsencode(tmp_path / "texts") + b"/" + name))).write_text("a note")
    assert "column 'file' cannot be read: row 1: " in refusal(tmp_path / "texts")
    table = pa.table([["a"]], schema=pa.schema([pa.field(b"te\xefxt", pa.string())]))
    with pa.ipc.new_file(str(tmp_path / "train.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert "the name of a column is not UTF-8" in refusal(tmp_path / "train.arrow")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ('{"text": "a"}\n{"text": \n', "line 2 cannot be read as json"),
        ('{"text": "a"}\n["b"]\n', "line 2 cannot be read as json: it is not an object"),
        ("[1, 2]", "item 1 cannot be read as json: it is not an object"),
        ("\n\n", "is empty"),
        ('{"text": "a", "label": 1}\n{"text": "b", "label": "x"}\n', "int (rows 0) and str (rows 1)"),
        ('{"text": "a", "tags": ["x", 1]}\n', "'tags' cannot be read"),
        ('{"text": "a"}\n{"text": "\\ud800"}\n', "'text' cannot be read: row 1: 'utf-8' codec"),
        ('{"text": "a"}\n{"text": "a", "tags": ["\\udcff"]}\n', "'tags' cannot be read: row 1"),
        ('{"text": "a"}\n{"te\\udcffxt": "b"}\n', "column 'te\\udcffxt' cannot be read: its name"),
        ('{"tags": ["x"]}\n{"tags": []}\n{"tags": [1]}\n', "'tags' cannot be read: row 2: "),
        (
            '{"id": 1}\n{"id": 100000000000000000000}\n',
            "row 1: a number is too large for 64 bits; write",
        ),
        ('{"text": "a"}\n{"text": "b", "text": "c"}\n', "line 2 has 'text' twice; remove one"),
        ('[{"text": "a", "text": "c"}]', "item 1 has 'text' twice; remove one"),
        ('{\n"data": []\n}\n', "line 1 cannot be read as json: Expecting"),
        ('{"text": "a"},\n', "write one object on each line, or all of them as one list"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, content: str, part: str) -> None:
    """JSON that is cut, of another shape, or of mixed types is named with its lines or rows."""
    path = tmp_path / "notes.jsonl"
    path.write_text(content)
    assert part in refusal(path)


def test_what_is_unusual_in_json_is_read(tmp_path: Path) -> None:
    """NaN is missing within lists too, and a name that stands twice in a column that nobody reads."""
    line = '{"text": "a", "label": ["x", NaN], "meta": {"k": 1, "k": 2}, "id": 1, "id": 2}\n'
    (tmp_path / "train.jsonl").write_text("\ufeff" + line.replace("\n", "\r\n"))
    found = tables_in(tmp_path / "train.jsonl", Wanted({"data.label_column": "label"}))
    assert [table.to_pylist() for table in found] == [[{"label": ["x", None]}]]


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.jsonl", gzip.compress(b'{"text": "a"}', mtime=0), "holds gzip, not jsonl; rename it"),
        ("a.csv", b"PAR1\x15\x04", "holds Parquet, not csv"),
        ("a.csv", b"PK\x03\x04\x14", "holds a ZIP or Excel file, not csv"),
        ("a.csv", b'{"text": "a", "label": "b"}\n', "holds JSON, not a table; rename it"),
        ("a.tsv", b'[\n{"text": "a"}\n]\n', "holds JSON, not a table; rename it"),
    ],
)
def test_a_file_with_another_name_is_named(
    tmp_path: Path, name: str, content: bytes, part: str
) -> None:
    """A file of another format than its name says is no damaged one."""
    (tmp_path / name).write_bytes(content)
    assert part in refusal(tmp_path / name)


def test_types_that_change_late_are_named(tmp_path: Path) -> None:
    """Labels that are numbers for a thousand rows and texts from then on are no one type."""
    lines = [json.dumps({"text": "a", "label": n if n < 1000 else f"{n}"}) for n in range(1002)]
    path = tmp_path / "notes.jsonl"
    path.write_text("\n".join(lines))
    assert "from row 1000 on hold another type" in refusal(path)


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.csv", "text;label\na note;x\n", ["'text;label'", "separated by ';', not by ','"]),
        ("a.csv", "text\tlabel\na, note\tx\n", ["separated by '\\t', not by ','"]),
        ("a.tsv", "text,label\na note,x\n", ["separated by ',', not by '\\t'"]),
        ("a.csv", ",text,label\n0,a note,x\n", ["the first column has no name", "index=False"]),
        ("a.csv", 'text, label\n"a, note", "x"\n', ["a space follows each ','", "remove the spaces"]),
        (
            "a.csv",
            'label,text\nx, "a, note"\n',
            ["row 1 (line 2) has 3 fields", "spaces before quotes"],
        ),
        ("a.csv", 'text,label\na note, "x"\n', ["row 1 (line 2): a space stands before", "remove"]),
    ],
)
def test_a_table_of_another_form_is_named(
    tmp_path: Path, name: str, content: str, parts: list[str]
) -> None:
    """Another separator, an index or spaces behind the separator: it is said what it is, and a remedy."""
    path = tmp_path / name
    path.write_text(content)
    text = refusal(path)
    for part in parts:
        assert part in text


def test_a_table_of_one_column_is_read(tmp_path: Path) -> None:
    """One name is one column, whatever its values hold; a space in a name separates nothing."""
    path = tmp_path / "notes.csv"
    path.write_text('clinical note\n"pain; left | right"\n" ""no"" fever"\n')
    assert rows_of(path) == [{"clinical note": "pain; left | right"}, {"clinical note": ' "no" fever'}]


@pytest.mark.parametrize("header", ["text,text", "text,,label", ""])
def test_a_header_must_name_columns(tmp_path: Path, header: str) -> None:
    """Columns without a name, or with the same one, are refused."""
    path = tmp_path / "notes.csv"
    path.write_text(f"{header}\na,b\n")
    assert "the first line must name each column, once" in refusal(path)


def test_no_copy_of_private_rows_stays(tmp_path: Path) -> None:
    """The scratch directory is empty as soon as a file is loaded, and the rows can still be read."""
    (tmp_path / "notes.jsonl").write_text('{"text": "private"}\n')
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    dataset = load(str(tmp_path / "notes.jsonl"), "train", scratch=scratch)
    assert list(scratch.iterdir()) == []
    assert dataset.to_list() == [{"text": "private"}]


def test_a_variable_in_a_path_is_put_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same config runs where the data lies elsewhere; a variable that is not set is named."""
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "test.jsonl").write_text('{"text": "b"}\n')
    monkeypatch.setenv("NOTES_ROOT", str(tmp_path))
    data = DataConfig(source="$NOTES_ROOT/train.jsonl", evaluation_source="${NOTES_ROOT}/test.jsonl")
    assert sources.load_train(data, TASK, 0).to_list() == [{"text": "a"}]
    assert sources.load_evaluation(data, TASK, 0).to_list() == [{"text": "b"}]
    same = DataConfig(source="$NOTES_ROOT/train.jsonl", evaluation_source=str(tmp_path / "train.jsonl"))
    with pytest.raises(DataError, match="is the private training split"):
        sources.load_evaluation(same, TASK, 0)
    monkeypatch.delenv("NOTES_ROOT")
    with pytest.raises(DataError, match=r"\$NOTES_ROOT.* an environment variable in it is not set"):
        sources.load_train(data, TASK, 0)
