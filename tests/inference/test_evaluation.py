"""Tests of evaluations: the run's own figures, intervals around them, and the base beside."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.finished import KINDS, rows_of
from support.tiny import write_rows

from fedslm.errors import ConfigError, DataError
from fedslm.inference import tables
from fedslm.inference.evaluation import (
    Elsewhere,
    Evaluation,
    EvaluationOptions,
    evaluate,
    other_rows,
    own_rows,
)
from fedslm.inference.generation import prompts_of, write_greedily
from fedslm.inference.text_scores import ROUGE
from fedslm.inference.trained import Trained, load_trained, open_run
from fedslm.tasks import build

Finished = Callable[[str], Path]
FEW = EvaluationOptions(resamples=1000)


def open_(finished_run: Finished, kind: str) -> Trained:
    """A run's model."""
    return load_trained(open_run(finished_run(kind)))


def measured(
    trained: Trained, rows: list[dict[str, Any]], asked: EvaluationOptions = FEW
) -> Evaluation:
    """An evaluation without a bar."""
    return evaluate(trained, rows, lambda done, total: None, asked)


@pytest.mark.parametrize("kind", KINDS)
def test_the_run_s_own_figures_come_out(kind: str, finished_run: Finished) -> None:
    """On its public split: tuned is what the run measured last, base what it measured first."""
    trained = open_(finished_run, kind)
    steps: list[tuple[int, int]] = []
    found = evaluate(trained, own_rows(trained.run), lambda *step: steps.append(step), FEW)
    for key, estimates in (("metrics_after", "tuned"), ("metrics_before", "base")):
        values = {name: getattr(each, estimates).value for name, each in found.metrics.items()}
        assert values == pytest.approx(trained.run.report[key], rel=1e-5)
    for each in found.metrics.values():
        assert each.difference.value == pytest.approx(each.tuned.value - each.base.value)
        for estimate in (each.base, each.tuned, each.difference):
            assert estimate.low <= estimate.value <= estimate.high
    assert trained.task.headline in found.metrics
    assert found.metrics["loss"].tuned.low < found.metrics["loss"].tuned.high
    assert (found.records, found.skipped, found.truncated, found.written) == (30, 0, 0, 0)
    assert steps == [(30, 60), (60, 60)]
    assert trained.model.adapter.read().sha256() == trained.run.report["adapter_sha256"]


def test_an_interval_knows_what_training_did(finished_run: Finished) -> None:
    """Training helped: the paired interval of the difference in loss is below zero."""
    trained = open_(finished_run, "seq2seq")
    found = measured(trained, own_rows(trained.run)).metrics["loss"]
    assert found.difference.high < 0
    assert found.tuned.high < found.base.low


@pytest.mark.parametrize("kind", ["classification", "seq2seq"])
def test_other_data_is_measured(kind: str, finished_run: Finished, tmp_path: Path) -> None:
    """Rows of another file count; those that cannot be used are left out and counted."""
    trained = open_(finished_run, kind)
    rows = rows_of(12, 5)
    rows[2] |= {"text": "wrist " * 60}
    rows[5] |= {"label": "liver", "answer": ""}
    write_rows(tmp_path / "new.jsonl", rows)
    read = other_rows(trained.run, Elsewhere(str(tmp_path / "new.jsonl")))
    found = measured(trained, read)
    assert (found.records, found.skipped, found.truncated) == (11, 1, 1)
    alone = measured(trained, [row for at, row in enumerate(rows) if at != 5])
    assert found.metrics == alone.metrics


def test_a_sample_of_other_data_is_seeded(finished_run: Finished, tmp_path: Path) -> None:
    """The same few records each time; all of them without a limit."""
    run = open_run(finished_run("classification"))
    write_rows(tmp_path / "new.jsonl", rows_of(40, 5))
    source = str(tmp_path)
    first, again = (other_rows(run, Elsewhere(source, "new", max_records=7)) for _ in range(2))
    assert len(first) == 7
    assert first == again
    assert len(other_rows(run, Elsewhere(source, "new"))) == 40


def test_the_training_split_is_refused(finished_run: Finished) -> None:
    """The private split itself is no data to be measured on."""
    run = open_run(finished_run("classification"))
    with pytest.raises(DataError, match="private training split"):
        other_rows(run, Elsewhere(run.data.source, "train"))


def test_a_database_is_measured(finished_run: Finished, tmp_path: Path) -> None:
    """Rows may come from a query; an evaluation split that was deleted is said to be gone."""
    rows = rows_of(9, 5)
    with closing(sqlite3.connect(tmp_path / "notes.db")) as connection, connection:
        connection.execute("create table notes (text, label)")
        values = [(row["text"], row["label"]) for row in rows]
        connection.executemany("insert into notes values (?, ?)", values)
    run = open_run(finished_run("classification"))
    query = "select text, label from notes order by rowid"
    found = other_rows(run, Elsewhere(f"sqlite:///{tmp_path}/notes.db", query=query))
    assert found == [{"text": row["text"], "label": row["label"]} for row in rows]
    with pytest.raises(DataError, match=r"evaluation\.parquet is not there any more"):
        own_rows(replace(run, directory=tmp_path))


def test_a_missing_column_is_named(finished_run: Finished, tmp_path: Path) -> None:
    """The columns that there are, are listed."""
    write_rows(tmp_path / "new.jsonl", [{"text": "a", "diagnosis": "heart"}])
    run = open_run(finished_run("classification"))
    with pytest.raises(DataError, match="text, diagnosis"):
        other_rows(run, Elsewhere(str(tmp_path / "new.jsonl")))


def test_records_that_cannot_be_used_give_no_figure(finished_run: Finished) -> None:
    """Not one usable record is an error, not a zero."""
    trained = open_(finished_run, "classification")
    with pytest.raises(DataError, match="none of 2 record"):
        measured(trained, [{"text": "a", "label": "liver"}, {"text": "", "label": "heart"}])


def test_answers_of_conversations_are_scored(finished_run: Finished) -> None:
    """The prompt is all that stands before the last answer, and that answer is the reference."""
    trained = open_(finished_run, "instruction")
    data = trained.run.data.model_copy(update={"label_column": None})
    task = trained.run.task.model_copy(update={"prompt": None})
    run = replace(trained.run, data=data, task=task)
    trained = replace(trained, run=run, task=build(task, data, ()))
    user, assistant = ([{"role": role, "content": "fever"}] for role in ("user", "assistant"))
    asked = [
        [*user, *assistant, {"role": "user", "content": row["text"]}]
        for row in own_rows(trained.run)[:6]
    ]
    prompts = prompts_of(trained, [{"text": turns} for turns in asked], 64)
    texts = write_greedily(trained, prompts, 64, lambda more: None)
    rows = [
        {"text": [*turns, {"role": "assistant", "content": text}]}
        for turns, text in zip(asked, texts, strict=True)
        if text
    ]
    assert rows
    assert prompts_of(trained, rows[:1], 64)[0] in prompts  # an answer at the end is left out
    found = evaluate(trained, rows, lambda *_: None, EvaluationOptions(1000, len(rows)))
    assert found.written == len(rows)
    assert found.metrics["exact_match"].tuned.value == 1.0


@pytest.mark.parametrize("kind", ["instruction", "seq2seq"])
def test_written_texts_are_scored(kind: str, finished_run: Finished) -> None:
    """References that are what the tuned model writes: it scores 1, its base does not."""
    trained = open_(finished_run, kind)
    rows = own_rows(trained.run)[:12]
    texts = write_greedily(trained, prompts_of(trained, rows, 64), 64, lambda more: None)
    rows = [{**row, "answer": text} for row, text in zip(rows, texts, strict=True)]
    assert all(texts)
    steps: list[tuple[int, int]] = []
    found = evaluate(trained, rows, lambda *step: steps.append(step), EvaluationOptions(1000, 5))
    assert found.written == 5
    assert set(ROUGE) < set(found.metrics)
    for name in ("rouge1", "rougeL", "exact_match"):  # a single word has no ROUGE-2
        assert found.metrics[name].tuned.value == 1.0
        assert found.metrics[name].base.value < 0.5
    assert steps[-1] == (2 * (12 + 5), 2 * (12 + 5))
    assert "loss" in found.metrics
    assert trained.model.adapter.read().sha256() == trained.run.report["adapter_sha256"]
    again = measured(trained, rows, EvaluationOptions(1000, 5))
    assert again.metrics == found.metrics


def test_an_interrupted_evaluation_leaves_the_trained_model(finished_run: Finished) -> None:
    """Ctrl-C while the base is measured: the model is the trained one again."""
    trained = open_(finished_run, "causal-lm")

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(trained, own_rows(trained.run), interrupt, FEW)
    assert trained.model.adapter.read().sha256() == trained.run.report["adapter_sha256"]


def test_few_resamples_are_refused(finished_run: Finished) -> None:
    """An interval from a few draws would not be one."""
    with pytest.raises(ConfigError, match="--resamples: value 999 must be at least 1000"):
        measured(open_(finished_run, "classification"), rows_of(3, 0), EvaluationOptions(999))


@pytest.mark.parametrize("kind", ["classification", "causal-lm", "preference"])
def test_tasks_without_references_have_no_rouge(kind: str, finished_run: Finished) -> None:
    """Where nothing says what should be written, writing cannot be scored."""
    with pytest.raises(ConfigError, match="--generate: is for instruction and seq2seq"):
        measured(open_(finished_run, kind), rows_of(3, 0), EvaluationOptions(1000, 5))


@pytest.mark.parametrize(
    ("head", "remark"),
    [("labels", "starts from the names of the classes"), ("public", "is fitted to public records")],
)
def test_a_table_says_what_a_head_starts_from(head: str, remark: str, finished_run: Finished) -> None:
    """Only a random head is called untrained."""
    trained = open_(finished_run, "classification")
    found = measured(trained, rows_of(6, 3))
    task = trained.run.task.model_copy(update={"head": head})
    notes = tables.notes_of(replace(trained, run=replace(trained.run, task=task)), found, 1000)
    assert any(remark in note for note in notes)
    assert "untrained" not in " ".join(notes)


def test_a_head_from_deleted_public_records_is_said(finished_run: Finished) -> None:
    """The base cannot be rebuilt: the error names the file, and says what still works."""
    trained = open_(finished_run, "classification")
    assert not (trained.run.directory / "data" / "public.parquet").exists()
    task = trained.run.task.model_copy(update={"head": "public"})
    public = replace(trained, run=replace(trained.run, task=task))
    with pytest.raises(
        DataError, match=r"public.parquet is not there.*put the file back, or use predict"
    ):
        measured(public, rows_of(6, 3))


def test_a_table_says_what_the_base_is(finished_run: Finished) -> None:
    """What a new head of the base starts from; a language model's base is the plain one."""
    for kind, remark in (("classification", "head is untrained"), ("seq2seq", "without the adapter")):
        trained = open_(finished_run, kind)
        found = measured(trained, rows_of(6, 3))
        notes = tables.notes_of(trained, found, 1000)
        assert any(remark in note for note in notes)
        text = tables.markdown_of("title", found, notes)
        lines = text.splitlines()
        assert lines[2] == "| metric | base | tuned | difference |"
        loss = found.metrics["loss"]
        row = next(line for line in lines if line.startswith("| loss |"))
        found_in_row = [float(part) for part in re.findall(r"[-+]?\d+\.\d+", row)]
        estimates = (loss.base, loss.tuned, loss.difference)
        expected = [x for each in estimates for x in (each.value, each.low, each.high)]
        assert found_in_row == pytest.approx(expected, rel=1e-3, abs=1e-4)
        assert all(f"- {note}" in lines for note in notes)
        values = json.loads(json.dumps(tables.json_of(found), allow_nan=False))
        assert values["metrics"]["loss"]["tuned"]["value"] == loss.tuned.value
        assert values["confidence"] == 0.95
