"""Per-record evaluation of models on the same test records, for paired comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from fedslm.data.columns import Wanted
from fedslm.data.missing import is_missing
from fedslm.data.sources import cut, load
from fedslm.data.tables import rows_in
from fedslm.distillation import losses
from fedslm.distillation.models import Reader, Student, Teacher
from fedslm.errors import DataError, plural, told_as
from fedslm.inference.bootstrap import Statistics
from fedslm.inference.inputs import Rows
from fedslm.inference.trained import OnProgress, TunedModel
from fedslm.models.loaded import LoadedModel
from fedslm.records import AdapterState
from fedslm.tasks.base import Example, Task
from fedslm.tasks.causal_lm import CausalLM
from fedslm.tasks.passes import bounded_budget, passes
from fedslm.training.batches import forward
from fedslm.training.evaluation import statistics

_PIECE_EXAMPLES = 256
_MOST_GENERAL = 500
_SPEAKERS = 3  # models whose logits a pass of proxy-tuning holds


@dataclass(frozen=True)
class Tests:
    """Test records in the form that both models read.

    Attributes:
        rows: Records that both can read.
        teacher: The records in the teacher's tokens.
        student: The records in the student's tokens.
    """

    rows: Rows
    teacher: tuple[Example, ...]
    student: tuple[Example, ...]


def tests_of(rows: Rows, teacher: Reader, student: Reader) -> Tests:
    """Prepares the test records that both models can read.

    Raises:
        DataError: There are none.
    """
    found = [reader.task.prepare(rows, reader.tokenizer) for reader in (teacher, student)]
    theirs, own = (dict(zip(each.kept, each.examples, strict=True)) for each in found)
    kept = sorted(theirs.keys() & own.keys())
    if not kept:
        raise DataError(
            f"none of {plural(len(rows), 'test record')} can be used: they have no text or "
            f"unknown labels"
        )
    return Tests(
        [rows[at] for at in kept], tuple(theirs[at] for at in kept), tuple(own[at] for at in kept)
    )


def measure(
    model: LoadedModel,
    task: Task,
    examples: Sequence[Example],
    adapter: AdapterState,
    on_progress: OnProgress = lambda *_: None,
) -> Statistics:
    """Returns the task's statistics for each example, under an adapter."""
    parts = []
    for start in range(0, len(examples), _PIECE_EXAMPLES):
        piece = examples[start : start + _PIECE_EXAMPLES]
        parts.append(statistics(model, task, piece, adapter))
        on_progress(start + len(piece), len(examples))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def measure_decoding(
    teacher: Teacher,
    student: Student,
    examples: Sequence[Example],
    *,
    vocabulary: int,
    alpha: float,
    clip: float,
) -> Statistics:
    """Returns statistics of decoding-time proxy-tuning: no training; every step runs three models.

    Args:
        teacher: Provides S* and S0.
        student: Provides L0.
        examples: Language examples, in the tokens that both models share.
        vocabulary: Number of tokens that both models share.
        alpha: Weight of the change made by federation.
        clip: Maximum change of a log-probability.

    References:
        Liu et al. 2024, Tuning Language Models by Proxy (arXiv 2401.08565).
    """
    small, large = teacher.trained.model, student.model
    # The logits of all three stand at the same positions.
    logits_of = partial(forward, keep_all=not (small.keeps_positions and large.keeps_positions))
    order: list[int] = []
    parts: dict[str, list[np.ndarray[tuple[int, ...], np.dtype[np.float64]]]] = {}
    tokens = bounded_budget(_SPEAKERS * vocabulary, large.device.type)
    for numbers in passes(examples, tokens):
        order += numbers
        chosen = [examples[at] for at in numbers]
        with torch.no_grad():
            small.adapter.write(teacher.tuned)
            tuned, _ = logits_of(small, teacher.task, chosen)
            with small.adapter.disabled():
                untuned, _ = logits_of(small, teacher.task, chosen)
            with large.adapter.disabled():
                base, batch = logits_of(large, student.task, chosen)
            sliced = [each[..., :vocabulary] for each in (base, tuned, untuned)]
            mixed = losses.proxy_target(*sliced, alpha=alpha, clip=clip)
            for name, values in student.task.statistics(mixed, batch).items():
                parts.setdefault(name, []).append(values.cpu().double().numpy())
    back = np.argsort(order)
    return {name: np.concatenate(values)[back] for name, values in parts.items()}


def general_examples(
    run: TunedModel, source: str, split: str, reader: Reader, most: int = _MOST_GENERAL
) -> tuple[Example, ...]:
    """Returns general text in a model's tokens, for regularization and for measuring perplexity.

    Raises:
        DataError: The text cannot be read, or contains nothing usable.
    """
    wanted = Wanted({}, frozenset({run.data.text_column, "text"}))
    with told_as({"data.source": "distill.general_source"}):
        dataset = load(source, split, seed=run.seed, wanted=wanted)
    column = run.data.text_column if run.data.text_column in wanted.there else "text"
    if column not in wanted.there:
        there = ", ".join(wanted.there)
        raise DataError(f"{source} ({split}) has no column {column!r}; it has {there}")
    task = general_task(run)
    found = (row[column] for row in rows_in(cut(dataset, most, run.seed)))
    rows = [{"text": text} for text in found if not is_missing(text)]
    examples = task.prepare(rows, reader.tokenizer).examples
    if not examples:
        raise DataError(f"{source} ({split}) holds no text")
    return examples


def general_task(run: TunedModel) -> CausalLM:
    """Returns plain language modelling with the maximum length of the run's records."""
    return CausalLM("text", run.task.max_length)
