"""Trains a student from public records in two halves: first the teacher's targets, then the training.

The halves share only files and, in one-pass mode, the teacher in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fedslm.config import DistillConfig
from fedslm.distillation.cache import Cached, write_cache
from fedslm.distillation.contexts import (
    Context,
    class_contexts,
    load_contexts,
    public_texts,
    save_contexts,
    text_contexts,
)
from fedslm.distillation.models import LANGUAGE, Reader, Student, Teacher
from fedslm.distillation.objective import Objective
from fedslm.distillation.sequence import (
    learner_of,
    load_texts,
    save_texts,
    student_contexts,
    teacher_texts,
)
from fedslm.distillation.training import Live, StudentTrainer, TargetSource, TrainingSet
from fedslm.errors import DataError
from fedslm.inference.inputs import Rows
from fedslm.inference.trained import OnProgress, TunedModel
from fedslm.records import AdapterState
from fedslm.tasks.base import Example

_CONTEXTS, _TEXTS, _TARGETS, _STEPS = "contexts.jsonl", "texts.jsonl", "targets", "steps"


class Watcher(Protocol):
    """Receives the progress of a distillation."""

    def on_progress(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Called when so much of a stage is done."""


@dataclass(frozen=True)
class DistillationJob:
    """Everything that defines one distillation.

    Attributes:
        run: The run whose model teaches.
        settings: Settings with a method other than "auto".
        vocabulary: Number of tokens that both models share, or of classes; 0 if none are compared.
        rows: Public records.
        general: General text in the student's tokens, to keep the student close to its original state.
    """

    run: TunedModel
    settings: DistillConfig
    vocabulary: int
    rows: Rows
    general: tuple[Example, ...] = ()

    @property
    def objective(self) -> Objective:
        """Returns the method with its settings."""
        settings = self.settings
        return Objective(settings.method, settings, self.vocabulary, settings.steps)

    @property
    def is_language(self) -> bool:
        """Whether tokens are learned, not classes."""
        return self.run.task.name in LANGUAGE


def prepare_contexts(
    job: DistillationJob, teacher: Teacher, reader: Reader, directory: Path, watcher: Watcher
) -> None:
    """Writes the contexts and stored targets to disk; results of an interrupted call are kept.

    Args:
        job: The distillation job.
        teacher: The model that teaches, with the adapter to be distilled.
        reader: The student's task and tokenizer.
        directory: Directory for contexts (or texts) and, with two passes, targets.
        watcher: Receives progress.

    Raises:
        DataError: No public record can be used.
    """
    settings = job.settings
    if settings.method == "sequence":
        if not (directory / _TEXTS).exists():
            told = _stage(watcher, "teacher writes")
            save_texts(directory / _TEXTS, teacher_texts(job.rows, teacher, settings, told))
        return
    if not (directory / _CONTEXTS).exists():
        save_contexts(directory / _CONTEXTS, _contexts(job, teacher, reader, watcher))
    if settings.cached_samples and settings.method != "labels":
        contexts = load_contexts(directory / _CONTEXTS)
        told = _stage(watcher, "teacher answers")
        write_cache(directory / _TARGETS, teacher, job.objective, contexts, told)


def train_student(
    job: DistillationJob, student: Student, teacher: Teacher | None, directory: Path, watcher: Watcher
) -> tuple[AdapterState, list[float]]:
    """Trains the student on the files that :func:`prepare_contexts` wrote.

    Args:
        job: The distillation job.
        student: Its adapter is overwritten.
        teacher: The same as in :func:`prepare_contexts`; None in the second of two passes.
        directory: The same as in :func:`prepare_contexts`.
        watcher: Receives progress.

    Returns:
        The student's adapter, and the loss of each step.

    Raises:
        TrainingError: The loss is not finite.
    """
    settings, source = job.settings, _source(job, student, teacher, directory)
    weight = settings.label_weight
    if settings.method == "sequence":
        student = learner_of(student, job.run)
        if not (directory / _CONTEXTS).exists():
            texts = load_texts(directory / _TEXTS)
            save_contexts(directory / _CONTEXTS, student_contexts(texts, student, job.run))
    if source is None:
        weight = weight or 1.0
    contexts = load_contexts(directory / _CONTEXTS)
    training_set = TrainingSet(contexts, job.objective, source, weight, job.general)

    def told(done: int, total: int, loss: float) -> None:
        watcher.on_progress("student learns", done, total, f"loss {loss:.4f}")

    trainer = StudentTrainer(student, training_set, settings, directory / _STEPS, told)
    adapter = trainer.run()
    return adapter, trainer.losses


def _contexts(
    job: DistillationJob, teacher: Teacher, reader: Reader, watcher: Watcher
) -> Sequence[Context]:
    """Returns the contexts that the method uses."""
    alone = job.settings.method == "labels"
    if job.is_language:
        if alone:
            return public_texts(job.rows, job.run, reader)
        told = _stage(watcher, "teacher writes")
        return text_contexts(job.rows, teacher, job.settings, told)
    column = str(job.run.data.label_column)
    contexts = class_contexts(job.rows, column, teacher.reader, reader)
    if not alone:
        return contexts
    labelled = [context for context in contexts if context.labelled]
    if not labelled:
        raise DataError(f'method="labels": no public record has a known label in {column!r}')
    return labelled


def _source(
    job: DistillationJob, student: Student, teacher: Teacher | None, directory: Path
) -> TargetSource | None:
    """Returns the source of targets; None where labels or texts are learned."""
    if job.settings.method in ("labels", "sequence"):
        return None
    if job.settings.cached_samples or teacher is None:
        return Cached(directory / _TARGETS, student.model.device, whole=not job.is_language)
    return Live(teacher, student, job.objective)


def _stage(watcher: Watcher, name: str) -> OnProgress:
    """Returns a progress callback for a named stage."""

    def told(done: int, total: int) -> None:
        watcher.on_progress(name, done, total)

    return told
