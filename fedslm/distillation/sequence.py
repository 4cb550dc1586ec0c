"""Filtered sequence-level distillation: the teacher writes, and the student learns the texts.

It needs no common tokenizer (Kim and Rush 2016, arXiv 1606.07947). Of several texts for each prompt
those are kept that the teacher is surest of; what the student finds as unlikely as garbage is dropped,
and a fifth of what it then learns are texts of its own, so that it stays near itself.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedslm.config import DistillConfig
from fedslm.distillation.contexts import (
    Context,
    beginnings,
    longest_of,
    most_new_tokens,
    write_all,
)
from fedslm.distillation.models import Student, Teacher
from fedslm.errors import DataError
from fedslm.inference.generation import Sampling
from fedslm.inference.inputs import Rows
from fedslm.inference.texts import continuation, prompt_tokens
from fedslm.inference.trained import OnProgress, TunedModel
from fedslm.models.loaded import LoadedModel
from fedslm.storage import json_text, write_text
from fedslm.tasks import tokens
from fedslm.tasks.base import Example, Tokens
from fedslm.tasks.instruction import Instruction
from fedslm.tasks.passes import passes, width_of
from fedslm.tasks.prompts import Prompts
from fedslm.training.batches import forward

_TEMPERATURE = 0.7
_KEPT = 0.5  # of the teacher's texts
_REPLAYED = 0.2  # of what is learned
_EXTREME = 4.0  # median absolute deviations


@dataclass(frozen=True)
class Written:
    """A text that the teacher wrote.

    Attributes:
        prompt: Text of the prompt.
        text: What follows.
    """

    prompt: str
    text: str


def teacher_texts(
    rows: Rows, teacher: Teacher, settings: DistillConfig, on_progress: OnProgress
) -> list[Written]:
    """The surest half of what the teacher writes for each prompt.

    Args:
        rows: Public records; prompts are made of them.
        teacher: The model that writes.
        settings: ``samples_per_prompt``.
        on_progress: Is told how many prompts are done, of how many.

    Raises:
        DataError: It writes nothing.
    """
    run, model = teacher.trained.run, teacher.trained.model
    prompts = [each.tokens for each in beginnings(rows, run, teacher.reader)]
    model.adapter.write(teacher.tuned)
    model.adapter.network.eval()
    count = settings.samples_per_prompt
    sampling = Sampling(most_new_tokens(run), _TEMPERATURE, count, run.seed)
    answers = write_all(model, prompts, sampling, on_progress)
    found = [
        each
        for prompt, texts in zip(prompts, answers, strict=True)
        for each in _surest(prompt, texts, model, as_instruction(run))
    ]
    if not found:
        raise DataError("the teacher wrote nothing that can be learned; give other public records")
    return found


def student_contexts(written: Sequence[Written], student: Student, run: TunedModel) -> list[Context]:
    """What the student learns: the texts that are plausible to it, and a fifth of its own.

    Args:
        written: By the teacher.
        student: With the loss of :func:`as_instruction`.
        run: The teacher's.

    Raises:
        DataError: No text is left.
    """
    examples = [_for_student(each, student) for each in written]
    kept = _plausible([each for each in examples if _has_targets(each)], student)
    if not kept:
        raise DataError("no text of the teacher is left after filtering; give more public records")
    own = _replay([each.prompt for each in written], student, run, len(kept))
    return [Context(each, each, labelled=True) for each in (*kept, *own)]


def as_instruction(run: TunedModel) -> Instruction:
    """A loss on what follows a prompt alone, whatever the run's task was."""
    return Instruction(Prompts.of(run.task, run.data), run.data.label_column)


def learner_of(student: Student, run: TunedModel) -> Student:
    """The student with a loss on texts behind prompts."""
    return replace(student, task=as_instruction(run))


def save_texts(path: Path, written: Sequence[Written]) -> None:
    """Writes texts, one JSON line each."""
    write_text(path, "".join(f"{json_text(asdict(each))}\n" for each in written))


def load_texts(path: Path) -> list[Written]:
    """Reads texts back.

    Raises:
        DataError: The file is damaged.
    """
    try:
        return [Written(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} is damaged: {error}; remove {path.parent}") from error


def _surest(
    prompt: Tokens, answers: Sequence[Tokens], model: LoadedModel, task: Instruction
) -> list[Written]:
    """Of one prompt's texts the half with the highest mean log-probability of a token, each once."""
    shown = str(model.tokenizer.decode(list(prompt), skip_special_tokens=True))
    texts = [continuation(model.tokenizer, prompt, new) for new in answers]
    there = [at for at, text in enumerate(texts) if text.strip()]
    if not there:
        return []
    examples = [_behind(prompt, answers[at]) for at in there]
    scores = _mean_log_probabilities(model, task, examples)
    ranked = [there[at] for at in np.argsort(-scores)[: max(1, round(_KEPT * len(there)))]]
    return [Written(shown, text) for text in dict.fromkeys(texts[at] for at in ranked)]


def _behind(prompt: Tokens, new: Tokens) -> Example:
    """New tokens behind a prompt; they alone are targets."""
    return Example((*prompt, *new), targets=(*(tokens.IGNORED,) * len(prompt), *new))


def _has_targets(example: Example) -> bool:
    """Whether there is a token to be predicted."""
    return any(target != tokens.IGNORED for target in example.targets[1:])


def _mean_log_probabilities(
    model: LoadedModel, task: Instruction, examples: Sequence[Example]
) -> NDArray[np.float64]:
    """Mean log-probability of each example's target tokens, shape (examples,)."""
    found = np.empty(len(examples))
    for chosen in passes(examples, width_of(task, model.vocabulary)):
        with torch.no_grad():
            logits, batch = forward(model, task, [examples[at] for at in chosen])
            found[chosen] = -task.per_example_loss(logits, batch).double().cpu().numpy()
    return found


def _for_student(written: Written, student: Student) -> Example:
    """A text in the student's tokens, prompt and text joined as the student writes them."""
    prompt = prompt_tokens(written.prompt, student.tokenizer)
    whole = prompt_tokens(written.prompt + written.text, student.tokenizer)
    pairs = enumerate(zip(prompt, whole, strict=False))
    shortest = min(len(prompt), len(whole))
    shared = next((at for at, (first, second) in pairs if first != second), shortest)
    end = student.tokenizer.eos_token_id
    ids = (whole if end is None else (*whole, int(end)))[: longest_of(student.model)]
    return _behind(ids[:shared], ids[shared:])


def _plausible(examples: list[Example], student: Student) -> list[Example]:
    """Leaves out texts that the plain student finds far less likely than most."""
    if not examples:
        return []
    with student.model.adapter.disabled():
        scores = _mean_log_probabilities(student.model, as_task(student), examples)
    centre = float(np.median(scores))
    spread = float(np.median(np.abs(scores - centre)))
    limit = centre - _EXTREME * max(spread, 1e-6)
    return [each for each, score in zip(examples, scores, strict=True) if score >= limit]


def as_task(student: Student) -> Instruction:
    """The learner's loss.

    Raises:
        DataError: The student was not made by :func:`learner_of`.
    """
    if not isinstance(student.task, Instruction):
        raise DataError("a student learns texts by the loss of an instruction")
    return student.task


def _replay(prompts: Sequence[str], student: Student, run: TunedModel, kept: int) -> list[Example]:
    """Texts of the plain student's own, a fifth of the whole."""
    wanted = round(kept * _REPLAYED / (1 - _REPLAYED))
    asked = [prompt_tokens(text, student.tokenizer) for text in list(dict.fromkeys(prompts))[:wanted]]
    if not asked:
        return []
    sampling = Sampling(most_new_tokens(run), 1.0, 1, run.seed)
    with student.model.adapter.disabled():
        answers = write_all(student.model, asked, sampling, lambda *_: None)
    made = [_behind(prompt, new) for prompt, (new,) in zip(asked, answers, strict=True)]
    return [each for each in made if _has_targets(each)]
