"""Tests of the guess of a task: what the columns and the base say, and when they do not decide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from support.tiny import write_base

from fedslm.config import ModelConfig
from fedslm.config.tasks import TASKS
from fedslm.drafting.guess import best, guesses, reads_of
from fedslm.drafting.survey import columns_of

ENCODER, DECODER, BOTH = "both ways", "forwards", "a text, then writes another"
TEXT = "the patient has a small wound"
TURNS = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]


def rows(**columns: Any) -> Any:
    """Columns of twelve records; a function gives the value of each, other values are repeated."""
    made = [{k: v(i) if callable(v) else v for k, v in columns.items()} for i in range(12)]
    return columns_of(Dataset.from_list(made))


def note(number: int) -> str:
    """A text of its own for each record."""
    return f"{TEXT} of {number} cm"


def one_of(*values: Any) -> Any:
    """A value that repeats."""
    return lambda number: values[number % len(values)]


CASES = [
    (rows(entry=note, department=one_of("heart", "bone")), ENCODER, ["classification"]),
    (rows(entry=note, department=one_of("heart", "bone")), DECODER, ["classification"]),
    (rows(entry=note, label=one_of(0, 1, 2)), ENCODER, ["classification"]),
    (rows(entry=note, ward=one_of("a", "b")), ENCODER, ["classification"]),
    (rows(entry=note, ward=one_of("a", "b")), DECODER, ["classification", "causal-lm"]),
    (rows(words=["a", "wound"], marks=one_of(["O", "B-x"], ["O", "O"])), ENCODER, ["token-classification"]),
    (rows(entry=note, findings=one_of(["a", "b"], ["a"], [])), ENCODER, ["multi-label"]),
    (
        rows(entry=note, label=one_of("x", "y"), findings=one_of(["a", "b"], ["a"])),
        ENCODER,
        ["multi-label", "classification"],
    ),
    (rows(prompt=note, completion=note), DECODER, ["instruction"]),
    (rows(prompt=note, completion=note), BOTH, ["seq2seq"]),
    (rows(prompt=note, completion=note), None, ["instruction", "seq2seq"]),
    (rows(prompt=note, completion=note), ENCODER, []),
    (rows(question=note, answer=one_of("4", "7")), DECODER, ["instruction"]),
    (rows(question=note, answer=one_of(4, 7)), DECODER, ["instruction"]),
    (rows(claim=note, reply=note), DECODER, ["instruction", "causal-lm"]),
    (rows(instruction=note, input="", output=note), DECODER, ["instruction"]),
    (rows(messages=lambda _: TURNS), DECODER, ["instruction"]),
    (rows(prompt=note, chosen=note, rejected=note), DECODER, ["preference"]),
    (rows(line=note, number=lambda number: number), DECODER, ["causal-lm"]),
    (rows(line=note), ENCODER, []),
    (rows(number=lambda number: number), DECODER, []),
]  # fmt: skip


@pytest.mark.parametrize(
    ("columns", "reads", "tasks"),
    CASES,
    ids=[f"{[c.name for c in case[0]]}-{case[1]}" for case in CASES],
)
def test_what_is_guessed(columns: Any, reads: Any, tasks: list[str]) -> None:
    """One task where it is clear; several, or none, where it is not. Each guess names its columns."""
    found = best(guesses(columns, text=None, label=None), reads)
    assert [each.task for each in found] == tasks
    assert all(any(column.name in each.why for column in columns) for each in found)


def test_a_named_column_decides() -> None:
    """`--label` and `--text` leave only what they can mean."""
    columns = rows(entry=note, ward=one_of("a", "b"), reply=note, findings=one_of(["a"], ["a", "b"]))
    for label, task in (("ward", "classification"), ("findings", "multi-label")):
        found = best(guesses(columns, text="entry", label=label), DECODER)
        assert [each.task for each in found] == [task], label


def test_every_task_can_be_guessed() -> None:
    """A new task in the table needs a guess, or a line here that says why not."""
    made = {each.task for columns, *_ in CASES for each in guesses(columns, text=None, label=None)}
    assert made == set(TASKS)


@pytest.mark.parametrize(
    ("family", "task", "reads"),
    [("bert", "classification", ENCODER), ("llama", "causal-lm", DECODER), ("t5", "seq2seq", BOTH)],
)
def test_how_a_base_reads(tmp_path: Path, family: str, task: str, reads: str) -> None:
    """It is read from config.json; an unknown architecture leaves it open, unless it says so itself."""
    base = write_base(tmp_path, family, task)
    assert reads_of(ModelConfig(base=str(base))) == reads
    config = base / "config.json"
    text = config.read_text()
    config.write_text(text.replace(f'"model_type": "{family}"', '"model_type": "other"'))
    assert reads_of(ModelConfig(base=str(base))) == (BOTH if family == "t5" else None)
