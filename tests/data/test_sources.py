"""Tests of where examples come from."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from fedslm.config import DataConfig, TaskConfig
from fedslm.data import sources
from fedslm.data.sources import cut
from fedslm.errors import DataError

Rows = list[dict[str, Any]]
ROWS: Rows = [
    {"text": "chest pain, worse at night", "label": "heart", "client": "a"},
    {"text": 'she said "no"\nand left', "label": "other", "client": None},
    {"text": "naïve café – 37,5 °C", "label": "heart", "client": "b"},
]
NEEDED: Rows = [{key: row[key] for key in ("text", "label")} for row in ROWS]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read from or left in the user's cache of data sets."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "EXTRACTED_DATASETS_PATH", tmp_path / "extracted")


def write_jsonl(path: Path, rows: Rows) -> None:
    """Writes JSON lines, compressed if the name says so."""
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_table(path: Path, rows: Rows) -> None:
    """Writes CSV or TSV."""
    delimiter = "\t" if path.suffix == ".tsv" else ","
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: Rows) -> None:
    """Writes Parquet."""
    datasets.Dataset.from_list(rows).to_parquet(str(path))


WRITERS: dict[str, Callable[[Path, Rows], None]] = {
    ".jsonl": write_jsonl,
    ".jsonl.gz": write_jsonl,
    ".json": write_jsonl,
    ".csv": write_table,
    ".tsv": write_table,
    ".parquet": write_parquet,
}


def load_train(data: DataConfig, task: str = "classification") -> datasets.Dataset:
    """The private split, for a task."""
    return sources.load_train(data, TaskConfig(name=task), 0)  # type: ignore[arg-type]


def load_evaluation(data: DataConfig, task: str = "classification") -> datasets.Dataset:
    """The public split, for a task."""
    return sources.load_evaluation(data, TaskConfig(name=task), 0)  # type: ignore[arg-type]


def config(source: Path, **values: Any) -> DataConfig:
    """A config for one source."""
    return DataConfig(source=str(source), **values)


@pytest.mark.parametrize("ending", WRITERS)
def test_a_file_is_read_as_it_was_written(tmp_path: Path, ending: str) -> None:
    """Every format gives the rows with their columns, quotes, line breaks, accents and blanks."""
    path = tmp_path / f"notes{ending}"
    WRITERS[ending](path, ROWS)
    assert sources.load(str(path), "train").to_list() == ROWS
    assert load_train(config(path)).to_list() == NEEDED


@pytest.mark.parametrize("ending", WRITERS)
def test_a_directory_gives_its_splits(tmp_path: Path, ending: str) -> None:
    """In a directory the file that is named like the split is read, and no other."""
    WRITERS[ending](tmp_path / f"train{ending}", ROWS)
    WRITERS[ending](tmp_path / f"test{ending}", ROWS[:1])
    WRITERS[ending](tmp_path / f"training{ending}", ROWS[:2])
    (tmp_path / "README.md").write_text("hello")
    assert load_train(config(tmp_path)).to_list() == NEEDED
    assert load_evaluation(config(tmp_path)).to_list() == NEEDED[:1]
    assert len(load_train(config(tmp_path, train_split="training"))) == 2


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    """No cache gives old rows for a file that has changed."""
    path = tmp_path / "notes.jsonl"
    write_jsonl(path, ROWS)
    assert len(load_train(config(path))) == 3
    write_jsonl(path, ROWS[:2])
    assert load_train(config(path)).to_list() == NEEDED[:2]


def test_evaluation_may_come_from_elsewhere(tmp_path: Path) -> None:
    """The public split may have a source of its own."""
    write_jsonl(tmp_path / "private.jsonl", ROWS)
    write_jsonl(tmp_path / "public.jsonl", ROWS[:1])
    data = config(tmp_path / "private.jsonl", evaluation_source=str(tmp_path / "public.jsonl"))
    assert len(load_train(data)) == 3
    assert load_evaluation(data).to_list() == NEEDED[:1]


def test_evaluation_is_cut_repeatably(tmp_path: Path) -> None:
    """A long public split is cut to a seeded sample, and a short one is left in order."""
    rows = [{"text": f"note {number}", "label": "x"} for number in range(100)]
    write_jsonl(tmp_path / "test.jsonl", rows)
    write_jsonl(tmp_path / "train.jsonl", rows[:1])
    whole = load_evaluation(config(tmp_path))
    one, same, other = (cut(whole, 20, seed)["text"] for seed in (0, 0, 1))
    assert len(set(one)) == 20
    assert list(one) == list(same)
    assert list(one) != list(other)
    assert list(one) != [row["text"] for row in rows[:20]]
    assert cut(whole, 100, 0).to_list() == rows


def test_the_private_split_is_never_the_public_one(tmp_path: Path) -> None:
    """One file, or the same split twice, would publish metrics and labels of private records."""
    rows = [{"text": "note", "label": "x"}]
    write_jsonl(tmp_path / "notes.jsonl", rows)
    write_jsonl(tmp_path / "train.jsonl", rows)
    for data in (
        config(tmp_path / "notes.jsonl"),
        config(tmp_path, evaluation_split="train"),
        config(tmp_path, evaluation_source=str(tmp_path / "train.jsonl")),
        config("demo", evaluation_split="train"),
    ):
        with pytest.raises(DataError, match="is the private training split"):
            load_evaluation(data)


@pytest.mark.parametrize("name", ["nothing.jsonl", "nothing.csv.gz", "nothing", "deep/er/nothing"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    """A path that does not exist is an error with the path, and is not looked up anywhere else."""
    with pytest.raises(DataError, match="no such file or directory") as caught:
        load_train(config(tmp_path / name))
    assert name in str(caught.value)


def test_a_missing_split_lists_what_is_there(tmp_path: Path) -> None:
    """A directory without the split says which files it has."""
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(DataError, match=r"has no split 'test'; found train\.jsonl"):
        load_evaluation(config(tmp_path))


def test_an_empty_directory_has_no_split(tmp_path: Path) -> None:
    """A directory without data files says so."""
    with pytest.raises(DataError, match="no data files"):
        load_train(config(tmp_path))


def test_a_missing_split_of_the_demo_is_named() -> None:
    """The demo data has three splits, and a fourth is an error that lists them."""
    with pytest.raises(DataError, match="no split 'valid'; known: train, public, test"):
        load_train(DataConfig(source="demo", train_split="valid"))


@pytest.mark.parametrize("key", ["text_column", "label_column"])
def test_a_missing_column_lists_what_is_there(tmp_path: Path, key: str) -> None:
    """A column that is not there is an error with its key and the columns there are."""
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(DataError, match=f"data.{key}='body' is not a column .* text, label, client"):
        load_train(config(tmp_path, **{key: "body"}))


def test_no_label_is_needed_without_a_label_column(tmp_path: Path) -> None:
    """A language model's data needs no label."""
    write_jsonl(tmp_path / "train.jsonl", [{"text": "a"}])
    assert load_train(config(tmp_path, label_column=None), "causal-lm").column_names == ["text"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("notes.jsonl", b""),
        ("notes.jsonl", b'{"text": "a"\n'),
        ("notes.json", b"nonsense"),
        ("notes.csv", b""),
        ("notes.csv", b"text,label\n"),
        ("notes.csv", b'text,label\n"a'),
        ("notes.parquet", b""),
        ("notes.parquet", b"PAR1 and no more"),
        ("notes.jsonl.gz", b"not compressed"),
        ("notes.txt", b"a"),
        ("notes", b"a"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    """A file that is empty, damaged or of no known format is an error of ours with its path."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        load_train(config(tmp_path / name))


def _with_indices(path: Path, indices: list[int | None]) -> DataConfig:
    """A file whose labels are class indices with names."""
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["cold", "flu"])}
    )
    rows = {"text": ["note"] * len(indices), "label": indices}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))
    return config(path)


def test_class_indices_become_names(tmp_path: Path) -> None:
    """Labels that are stored as indices are read as the names they stand for."""
    data = _with_indices(tmp_path / "train.parquet", [1, 0, 1])
    assert list(load_train(data)["label"]) == ["flu", "cold", "flu"]


@pytest.mark.parametrize("missing", [-1, None])
def test_a_missing_class_index_is_no_class(tmp_path: Path, missing: int | None) -> None:
    """The mark for "not labelled" (-1 on the hub) must not be read as the last class."""
    data = _with_indices(tmp_path / "train.parquet", [0, missing])
    try:
        labels = list(load_train(data)["label"])
    except DataError:
        return
    assert labels[0] == "cold"
    assert labels[1] not in ("cold", "flu")


def test_no_file_of_the_private_split_is_public(tmp_path: Path) -> None:
    """A split may lie in several files: none of them, nor another name of one, serves as public data."""
    for number in range(2):
        path = tmp_path / f"train-0000{number}-of-00002.jsonl"
        path.write_text(json.dumps({"text": f"note {number}", "label": "a"}) + "\n")
    (tmp_path / "other.jsonl").hardlink_to(tmp_path / "train-00001-of-00002.jsonl")
    for name in ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "other.jsonl"):
        config = DataConfig(source=str(tmp_path), evaluation_source=str(tmp_path / name))
        with pytest.raises(DataError, match="is the private training split"):
            load_evaluation(config)
