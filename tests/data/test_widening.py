"""Tests of columns that one odd record widens: what the other records say stays the same."""

from __future__ import annotations

import json
import sqlite3
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from fedslm.config import DataConfig, TaskConfig
from fedslm.data.labels import check
from fedslm.data.sources import load, load_train
from fedslm.data.tables import rows_in
from fedslm.data.turns import turns_of
from fedslm.errors import DataError
from fedslm.models.base import DEMO_DIRECTORY, load_tokenizer
from fedslm.tasks import build

USER, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
SHARE_GPT = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]


def written(directory: Path, rows: list[dict[str, Any]]) -> DataConfig:
    """Rows as a training split."""
    (directory / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(source=str(directory))


@pytest.mark.parametrize("before", [2, 1001], ids=["beside", "after a piece"])
@pytest.mark.parametrize(
    ("name", "row", "odd"),
    [
        ("classification", {"text": "a note", "label": 1}, {"text": "x", "label": 1.5}),
        ("classification", {"text": 37, "label": 1}, {"text": 37.5, "label": 0}),
        ("multi-label", {"text": "a note", "label": [1]}, {"text": "x", "label": [0.5]}),
        ("token-classification", {"text": ["a"], "label": [1]}, {"text": ["a"], "label": [0.5]}),
        ("causal-lm", {"text": 37, "label": None}, {"text": 0.5, "label": None}),
    ],
)
def test_a_fraction_changes_no_other_record(
    tmp_path: Path, name: Any, row: dict[str, Any], odd: dict[str, Any], before: int
) -> None:
    """Integers are what they were: one record cannot leave all others out, or rewrite them."""
    task, labels = TaskConfig(name=name), ("0", "1") if row["label"] else ()
    examples = []
    for rows in ([row] * before, [*[row] * before, odd]):
        data = written(tmp_path, rows)
        found = rows_in(load_train(data, task, 0))[:before][-2:]
        examples.append(build(task, data, labels).prepare(found, load_tokenizer(DEMO_DIRECTORY)))
    assert examples[0].kept == (0, 1)
    assert examples[0] == examples[1]


def test_a_decimal_with_more_digits_changes_no_other_record() -> None:
    """A data base's numerics share one number of digits; each is written with its own."""
    values = pa.array([Decimal(1), Decimal("2.5"), Decimal("0.125")])
    rows = Dataset(pa.table({"text": values, "label": values})).to_list()
    made = build(TaskConfig(name="classification"), DataConfig(source="x"), ("1", "2.5", "0.125"))
    assert made.prepare(rows, load_tokenizer(DEMO_DIRECTORY)).kept == (0, 1, 2)


@pytest.mark.parametrize("before", [12, 1200])
def test_bytes_among_texts_are_named(tmp_path: Path, before: int) -> None:
    """SQLite keeps bytes in any column: they are the odd record, and make no bytes of the texts."""
    with sqlite3.connect(tmp_path / "notes.db") as connection:
        connection.execute("CREATE TABLE notes (text, label)")
        rows = [*[("a note", "a")] * before, (b"a note", "b")]
        connection.executemany("INSERT INTO notes VALUES (?, ?)", rows)
    connection.close()
    with pytest.raises(DataError, match=rf"'text' cannot be read: str .* and bytes \(rows {before}\)"):
        load(f"sqlite:///{tmp_path / 'notes.db'}", "train", "SELECT * FROM notes")


@pytest.mark.parametrize("first", ["texts", "bytes"])
def test_a_piece_of_bytes_is_named(tmp_path: Path, first: str) -> None:
    """Nor does a file whose texts were saved as bytes, whichever file is read first."""
    parts = [pa.array(["a", "b"]), pa.array([b"a", b"b"])]
    for number, part in enumerate(parts if first == "texts" else parts[::-1]):
        pq.write_table(pa.table({"text": part}), tmp_path / f"train-{number:05d}-of-00002.parquet")
    with pytest.raises(DataError, match=r"from row 2 on .* column 'text' holds texts and bytes"):
        load(str(tmp_path), "train")


@pytest.mark.parametrize(
    "others",
    [
        [SHARE_GPT],
        [[{**USER, "content": [{"type": "text", "text": "Why?"}]}, ANSWER]],
        [[USER, {**ANSWER, "weight": 1}], [USER, {**ANSWER, "weight": "low"}]],
        [
            [USER, {**ANSWER, "tool_calls": [{"arguments": {"day": 1}}]}],
            [USER, {**ANSWER, "tool_calls": [{"arguments": "{}"}]}],
        ],
    ],
    ids=["ShareGPT", "parts", "weights", "tools"],
)
@pytest.mark.parametrize("turned", [False, True])
def test_conversations_of_several_forms_are_each_read(
    tmp_path: Path, others: list[Any], turned: bool
) -> None:
    """What one conversation holds beside its texts does not decide whether another one is read."""
    rows = [{"messages": each} for each in [[USER, ANSWER], *others]]
    data = written(tmp_path, rows[::-1] if turned else rows)
    data = data.model_copy(update={"text_column": "messages", "label_column": None})
    found = rows_in(load_train(data, TaskConfig(name="instruction"), 0))
    assert [turns_of(row["messages"]) for row in found] == [(USER, ANSWER)] * len(rows)


def test_a_picture_among_turns_is_not_dropped_from_them(tmp_path: Path) -> None:
    """A conversation that is not all text is refused; it does not become one without the picture."""
    shown = {**USER, "content": [{"type": "image", "url": "x"}]}
    data = written(tmp_path, [{"messages": [USER, ANSWER]}, {"messages": [USER, shown, ANSWER]}])
    data = data.model_copy(update={"text_column": "messages", "label_column": None})
    task = TaskConfig(name="instruction")
    with pytest.raises(DataError, match=r"but turns without text, or of an unknown role \(rows 1\)"):
        check(load_train(data, task, 0), data, task, "training")
