"""Tests of which files are a split: nothing that may be a part of it is left out without a word."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from fedslm.data.sources import load
from fedslm.data.splits import files_of
from fedslm.errors import DataError


def fill(directory: Path, *names: str) -> Path:
    """Writes one record of its own into each file; names that end with a slash are empty folders."""
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir()
        elif path.suffix.lower() == ".gz":
            path.write_bytes(gzip.compress(json.dumps({"text": name}).encode()))
        elif path.suffix.lower() == ".txt":
            path.write_text(name)
        else:
            path.write_text(json.dumps({"text": name}) if "json" in name.lower() else f"text\n{name}\n")
    return directory


def texts(directory: Path, split: str = "train") -> list[Any]:
    """The texts of a split."""
    return list(load(str(directory), split)["text"])


def refusal(directory: Path, split: str = "train") -> str:
    """What is said of a split that is not clear: one screen at most, with the directory."""
    with pytest.raises(DataError) as caught:
        load(str(directory), split)
    text = str(caught.value)
    assert f"data.source={str(directory)!r}" in text
    assert len(text) < 900
    return text


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize(
    "names",
    [
        ("{}.part1.jsonl", "{}.part2.jsonl"),
        ("{}.jsonl", "{}.csv"),
        ("{}.jsonl", "{}.JSONL.GZ"),
        ("{}.jsonl", "{}.part2.jsonl"),
        ("{}.jsonl", "{}_2.jsonl"),
        ("{}.csv", "{} (1).csv"),
        ("{}1.jsonl", "{}2.jsonl"),
        ("{}.jsonl", "{}-00001-of-00002.jsonl"),
        ("{}.jsonl", "{}/a.txt"),
        ("{}.jsonl", "{}/more.jsonl"),
        ("{}.jsonl", "{}.jsonl.zst"),
        ("{}.jsonl", "{}.xlsx"),
        ("{}.jsonl", "{}.pq"),
        ("{}.csv", "{}.jsonlines"),
        ("{}.csv", "{}.2.orc"),
        ("{}.jsonl", "{}.txt"),
        ("{}/a.txt", "{}_2/b.txt"),
    ],
)
def test_what_may_be_a_part_is_not_left_out(tmp_path: Path, split: str, names: tuple[str, ...]) -> None:
    """Two files that may both be the split are refused, and both are named."""
    chosen = [name.format(split) for name in names]
    text = refusal(fill(tmp_path, *chosen), split)
    for name in chosen:
        assert name.split("/")[0] in text
    assert "keep one of them" in text


@pytest.mark.parametrize(
    ("names", "part"),
    [
        (["0-of-3", "2-of-3"], "lacks 1 of 3 pieces, the first of them 00001-of-00003"),
        (["1-of-3", "2-of-3"], "lacks 1 of 3 pieces, the first of them 00000-of-00003"),
        (["1-of-3", "3-of-3"], "lacks 1 of 3 pieces, the first of them 00002-of-00003"),
        (["0-of-1000000000000"], "lacks 999999999999 of 1000000000000 pieces"),
        (["0-of-2", "1-of-2", "1-of-3"], "do not match"),
        (["0-of-2", "1-of-2", "01-of-2"], "do not match"),
        (["0-of-2", "1-of-2", "2-of-2"], "do not match"),
        (["0-of-0"], "do not match"),
    ],
)
def test_all_pieces_must_be_there(tmp_path: Path, names: list[str], part: str) -> None:
    """Names that say how many pieces there are are counted: a missing one is named."""
    text = refusal(fill(tmp_path, *(f"train-{name}.jsonl" for name in names)))
    assert part in text
    assert f"train-{names[0]}.jsonl" in text


def test_pieces_come_in_order(tmp_path: Path) -> None:
    """They count from 0 or from 1, by number rather than by name; the hub adds a hash."""
    for number in range(1, 11):
        fill(tmp_path / "ones", f"train-{number}-of-10.jsonl")
    assert texts(tmp_path / "ones") == [f"train-{number}-of-10.jsonl" for number in range(1, 11)]
    names = ["train-00000-of-00002-0a1b.jsonl", "train-00001-of-00002-ff00.jsonl"]
    assert texts(fill(tmp_path / "hub", *names, "test-00000-of-00001.jsonl")) == names


def test_a_piece_in_another_form_is_named(tmp_path: Path) -> None:
    """A piece in a form that is not read is named, not left out."""
    fill(tmp_path, "train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl.zst")
    assert "train-00001-of-00002.jsonl.zst is in an unsupported format" in refusal(tmp_path)


def test_other_splits_are_no_parts(tmp_path: Path) -> None:
    """Other names, notes, backups and hidden files stand beside a split as before."""
    others = ("training.jsonl", "train-small.jsonl", "pretrain.jsonl", "test.jsonl", "README.md")
    hidden = (
        ".train.jsonl",
        "._train.jsonl",
        ".cache/train.jsonl",
        "train.jsonl.bak",
        "train.jsonl.lock",
    )
    assert texts(fill(tmp_path, "train.jsonl", *others, *hidden)) == ["train.jsonl"]
    assert texts(tmp_path, "train-small") == ["train-small.jsonl"]
    fill(tmp_path / "years", "train_1.jsonl", "train_10.jsonl", "train_1/")
    assert texts(tmp_path / "years", "train_1") == ["train_1.jsonl"]


@pytest.mark.parametrize("name", ["train.JSONL", "Train.Csv", "train.jsonl.GZ", "TRAIN.CSV"])
def test_the_case_of_a_name_is_no_matter(tmp_path: Path, name: str) -> None:
    """A name is read as other systems and programs write it."""
    assert texts(fill(tmp_path, name)) == [name]


@pytest.mark.parametrize(
    "name",
    [
        *("train.jsonl.zst", "train.zip", "train.parquet.gz", "train.txt", "train/a.csv"),
        *("train.pq", "train.xls", "train.parquet/part-0.parquet"),
    ],
)
def test_a_form_that_is_not_read_is_named(tmp_path: Path, name: str) -> None:
    """A split that cannot be read is not said to be absent."""
    text = refusal(fill(tmp_path, name))
    assert name.split("/")[0] in text
    assert "convert it" in text


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    """A file whose content was not fetched is an error with its name."""
    (tmp_path / "train.jsonl").symlink_to(tmp_path / "elsewhere.jsonl")
    with pytest.raises(DataError, match=r"train\.jsonl is a link to a file that is not there"):
        files_of(tmp_path, "train")


def test_hidden_texts_are_no_records(tmp_path: Path) -> None:
    """What a file manager or an editor leaves in a folder of texts is neither a record nor a label."""
    hidden = ("._a.txt", ".DS_Store", ".checkpoints/a.txt", "pos/._b.txt", "notes.md")
    folder = fill(tmp_path / ".hidden" / "train", "pos/a.txt", "pos/B.TXT", "neg/c.txt", *hidden)
    rows = load(str(folder.parent), "train").to_list()
    assert [(row["file"], row["label"]) for row in rows] == [
        ("neg/c.txt", "neg"),
        ("pos/B.TXT", "pos"),
        ("pos/a.txt", "pos"),
    ]


@pytest.mark.parametrize("name", ["pos/more/b.txt", "b.txt.gz", "pos/b.jsonl", "labels.csv", "neg.zip"])
def test_a_text_that_would_be_left_out_is_named(tmp_path: Path, name: str) -> None:
    """In a folder of texts whatever else holds records is refused, in any depth."""
    fill(tmp_path / "train", "pos/a.txt", name)
    with pytest.raises(DataError, match=r"train: a folder of texts may contain only .*") as caught:
        load(str(tmp_path), "train")
    assert str(caught.value).endswith(name)


def test_a_folder_of_splits_is_no_split(tmp_path: Path) -> None:
    """A split that is not there is not all the others together."""
    fill(tmp_path, "readme.txt", "train/a.txt", "test/b.txt")
    assert "has no split 'validation'; found readme.txt, test/, train/" in refusal(
        tmp_path, "validation"
    )
