"""The contexts both models process: public records, with part of the texts continued by the teacher.

A text that the teacher continues contains domain language that public text lacks. It comes only from
the federated adapter, so that under differential privacy it is post-processing, like everything here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedslm.config import DistillConfig
from fedslm.data.missing import name_of
from fedslm.distillation.models import Reader, Teacher
from fedslm.errors import DataError, plural
from fedslm.inference.generation import Sampling, generation_settings, new_tokens
from fedslm.inference.trained import OnProgress, TunedModel
from fedslm.models.loaded import LoadedModel
from fedslm.rng import seed_of, stream
from fedslm.storage import json_text, write_text
from fedslm.tasks.base import Example, Row, Tokens
from fedslm.tasks.instruction import Instruction
from fedslm.tasks.tokens import IGNORED

_WRITTEN_AT_ONCE = 16


@dataclass(frozen=True)
class Context:
    """One public record as both models read it.

    Attributes:
        teacher: The record in the teacher's tokens.
        student: The record in the student's tokens; identical if the tokenizers are.
        labelled: Whether ``student`` contains a public label or a public text, not a generated one.
    """

    teacher: Example
    student: Example
    labelled: bool


def class_contexts(rows: Sequence[Row], column: str, teacher: Reader, student: Reader) -> list[Context]:
    """Returns contexts of texts to classify; records without a known label are included.

    Args:
        rows: Public records.
        column: Column of the label, if a record has one.
        teacher: The teacher's task and tokenizer.
        student: The student's task and tokenizer.

    Raises:
        DataError: No record can be used.
    """
    known, labels = set(teacher.task.labels), teacher.task.labels
    shown = [{**row, column: name_of(row.get(column))} for row in rows]
    stand_ins = [row if row[column] in known else {**row, column: labels[0]} for row in shown]
    found = [model.task.prepare(stand_ins, model.tokenizer) for model in (teacher, student)]
    theirs, own = (dict(zip(each.kept, each.examples, strict=True)) for each in found)
    contexts = [
        Context(theirs[number], own[number], shown[number][column] in known)
        for number in sorted(theirs.keys() & own.keys())
    ]
    return _some(contexts, len(rows))


def public_texts(rows: Sequence[Row], run: TunedModel, reader: Reader) -> list[Context]:
    """Returns contexts of unmodified public texts; prompts without a completion are left out.

    Raises:
        DataError: No record can be used.
    """
    whole = [each.whole for each in beginnings(rows, run, reader)]
    return _some([Context(each, each, labelled=True) for each in whole if each is not None], len(rows))


def text_contexts(
    rows: Sequence[Row], writer: Teacher, settings: DistillConfig, on_progress: OnProgress
) -> list[Context]:
    """Returns language contexts, for models that share a tokenizer.

    The teacher continues a seeded share of the texts: from a quarter of a plain text, or from only the
    prompt. It also completes every prompt without a public completion.

    Args:
        rows: Public records.
        writer: S*, or the model that teaches this arm.
        settings: Provides ``sampled_fraction``.
        on_progress: Receives the number of generated texts, and the total.

    Raises:
        DataError: No record can be used.
    """
    prompts = beginnings(rows, writer.trained.run, writer.reader)
    generator = stream(writer.trained.run.seed, "distil-sampled")
    drawn = generator.random(len(prompts)) < settings.sampled_fraction
    to_write = [at for at, each in enumerate(prompts) if drawn[at] or each.whole is None]
    room = most_new_tokens(writer.trained.run)
    asked = [prompts[at].tokens for at in to_write]
    written = _write(writer, asked, room, on_progress) if asked else []
    contexts = {at: each.whole for at, each in enumerate(prompts) if each.whole is not None}
    made = {
        at: _continued(prompts[at].tokens, new, writer)
        for at, new in zip(to_write, written, strict=True)
    }
    both = {**contexts, **{at: example for at, example in made.items() if example is not None}}
    order = sorted(both)
    return _some([Context(both[at], both[at], at not in made) for at in order], len(rows))


@dataclass(frozen=True)
class Beginning:
    """The tokens that a model continues.

    Attributes:
        tokens: Tokens of the prompt.
        whole: The public record, prompt and completion together; None if it has no completion.
    """

    tokens: Tokens
    whole: Example | None


def beginnings(rows: Sequence[Row], run: TunedModel, reader: Reader) -> list[Beginning]:
    """Returns the beginning of each record's text, or its prompt; records without text are skipped."""
    task = reader.task
    if not isinstance(task, Instruction):
        prepared = task.prepare(rows, reader.tokenizer)
        return [
            Beginning(each.input_ids[: max(1, each.length // 4)], each) for each in prepared.examples
        ]
    column = run.data.label_column
    filled = rows if column is None else [{**row, column: row.get(column)} for row in rows]
    whole = task.prepare(filled, reader.tokenizer)
    ended = dict(zip(whole.kept, whole.examples, strict=True))
    said = [task.prompts.said(row, column) for row in filled]
    asked = task.prompts.asked(said, reader.tokenizer)
    room = run.task.max_length - 1
    return [
        Beginning(_fitted(prompt.ids, room), ended.get(at))
        for at, (prompt, each) in enumerate(zip(asked, said, strict=True))
        if prompt.ids and any(turn["content"].strip() for turn in each.turns)
    ]


def write_all(
    model: LoadedModel,
    asked: Sequence[Tokens],
    sampling: Sampling,
    on_progress: OnProgress,
) -> list[list[Tokens]]:
    """Generates ``sampling.samples`` texts per prompt; prompts of similar length form a batch.

    A prompt that leaves no room in the model's context keeps its first token and its end.
    """
    asked = [_fitted(ids, longest_of(model) - sampling.max_tokens) for ids in asked]
    order = sorted(range(len(asked)), key=lambda at: len(asked[at]))
    found: list[list[Tokens]] = [[] for _ in asked]
    settings, count = generation_settings(model, sampling), sampling.samples
    for start in range(0, len(order), _WRITTEN_AT_ONCE):
        chosen = order[start : start + _WRITTEN_AT_ONCE]
        seed = seed_of(sampling.seed, "distil-writing", start)
        new = new_tokens(model, [asked[at] for at in chosen], settings, seed)
        for position, at in enumerate(chosen):
            found[at] = new[position * count : (position + 1) * count]
        on_progress(min(start + _WRITTEN_AT_ONCE, len(order)), len(order))
    return found


def longest_of(model: LoadedModel) -> int:
    """Returns the longest sequence that a model supports; very large if there is no limit."""
    positions = getattr(model.adapter.network.config, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else sys.maxsize


def _fitted(ids: Tokens, room: int) -> Tokens:
    """Truncates a prompt to at most ``room`` tokens, but at least one."""
    room = max(room, 1)
    return ids if len(ids) <= room else (*ids[:1], *ids[len(ids) - room + 1 :])[:room]


def _write(
    writer: Teacher, asked: Sequence[Tokens], room: int, on_progress: OnProgress
) -> list[Tokens]:
    """Samples one continuation of each prompt from the teacher."""
    model = writer.trained.model
    model.adapter.write(writer.tuned)
    model.adapter.network.eval()
    sampling = Sampling(room, temperature=1.0, seed=writer.trained.run.seed)
    return [new for (new,) in write_all(model, asked, sampling, on_progress)]


def most_new_tokens(run: TunedModel) -> int:
    """Returns the maximum number of new tokens in a continuation: as in training."""
    task = run.task
    return task.max_target_length or max(1, task.max_length - task.max_length // 4)


def _continued(prompt: Tokens, new: Tokens, writer: Teacher) -> Example | None:
    """Joins prompt and continuation, cut to the maximum length; None if no target is left."""
    longest = writer.trained.run.task.max_length
    if not isinstance(writer.task, Instruction):
        ids = (*prompt, *new)[:longest]
        return Example(ids) if len(ids) > 1 else None
    answer = (*new, *writer.task.prompts.ending(writer.tokenizer))[: longest - len(prompt)]
    if not answer:
        return None
    return Example((*prompt, *answer), targets=(*(IGNORED,) * len(prompt), *answer))


def _some(contexts: list[Context], rows: int) -> list[Context]:
    """Returns the contexts; refuses an empty list."""
    if not contexts:
        raise DataError(
            f"none of {plural(rows, 'public record')} can be used: they have no text; give others "
            f"with --data"
        )
    return contexts


def save_contexts(path: Path, contexts: Sequence[Context]) -> None:
    """Writes contexts, one JSON line each."""
    lines = [json_text(_values(context)) for context in contexts]
    write_text(path, "".join(f"{line}\n" for line in lines))


def load_contexts(path: Path) -> list[Context]:
    """Reads contexts back.

    Raises:
        DataError: The file is damaged.
    """
    try:
        return list(_read(path.read_text(encoding="utf-8").splitlines()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged: {error}; remove {path.parent}") from error


def _values(context: Context) -> dict[str, Any]:
    """Returns a context as plain values."""
    return {
        "teacher": _example(context.teacher),
        "student": None if context.student is context.teacher else _example(context.student),
        "labelled": context.labelled,
    }


def _example(example: Example) -> list[Any]:
    """Returns an example as plain values."""
    return [list(example.input_ids), example.target, list(example.targets)]


def _read(lines: Sequence[str]) -> Iterator[Context]:
    """Parses contexts from lines."""
    for line in lines:
        values = json.loads(line)
        teacher = _made(values["teacher"])
        student = teacher if values["student"] is None else _made(values["student"])
        yield Context(teacher, student, bool(values["labelled"]))


def _made(values: list[Any]) -> Example:
    """Builds an example from plain values."""
    ids, target, targets = values
    return replace(Example(tuple(ids)), target=target, targets=tuple(targets))
