"""Distillation between rounds: the student learns from the federated model, and may teach it in return.

Mutual learning follows FedCoLLM (arXiv 2411.11707): after the student has learned, the small model's
adapter learns from it by forward KL before the next broadcast. Under privacy this is post-processing:
it reads the adapter that rounds released, the student and public records.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fedslm.config import DistillConfig
from fedslm.distillation import losses
from fedslm.distillation.contexts import Context, load_contexts
from fedslm.distillation.models import (
    Student,
    Teacher,
    load_kept,
    load_student,
    load_teacher,
    student_reader,
)
from fedslm.distillation.objective import Objective, Target
from fedslm.distillation.pipeline import DistillationJob, prepare_contexts, train_student
from fedslm.distillation.run import job_of, tests_there
from fedslm.distillation.training import StudentTrainer, TrainingSet
from fedslm.inference.trained import TunedModel
from fedslm.models.loaded import load as load_model
from fedslm.records import AdapterState
from fedslm.storage import load_adapter, save_adapter

DIRECTORY = "distilling"


class Quiet:
    """A watcher that ignores progress."""

    def on_progress(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Does nothing."""


@dataclass(frozen=True)
class StudentSays:
    """Targets for mutual learning: the student's predictions over the shared tokens or classes.

    Attributes:
        student: The student with the adapter that it has learned.
        contexts: Contexts in the student's tokens, in the order of the training set.
        vocabulary: Number of tokens that both models share, or of classes.
    """

    student: Student
    contexts: Sequence[Context]
    vocabulary: int

    def of(self, numbers: Sequence[int], contexts: Sequence[Context]) -> Target:
        """Computes the student's predictions."""
        with torch.no_grad():
            logits = self.student.logits([self.contexts[number].student for number in numbers])
        return Target(losses.soft_target(logits[:, : self.vocabulary]))


def follow(
    run: TunedModel, settings: DistillConfig, round: int, trained: frozenset[str]
) -> AdapterState | None:
    """Trains the student on the adapter of a round and, if configured, the adapter on the student.

    The student continues from its state after the last such round; its adapter is stored in the run
    directory. A round that is repeated after a crash starts from the same state and gives the same
    result.

    Args:
        run: The federated model after the round.
        settings: The ``[distill]`` section.
        round: Number of the round.
        trained: Keys that rounds change: mutual learning changes no others.

    Returns:
        The adapter for the next broadcast; None if ``mutual_steps`` is 0.
    """
    folder = run.directory / DIRECTORY
    path = folder / f"round-{round:05d}"
    job, _ = job_of(run, settings, tests_there(run))
    teacher = load_teacher(run, job.settings)
    load = load_model if settings.cached_samples else load_kept  # two passes: little memory
    student = load_student(run, job.settings, load=load)
    earlier = [each for each in sorted(folder.glob("student-*.safetensors")) if _round(each) < round]
    if earlier:
        student = replace(student, start=load_adapter(earlier[-1]))
    prepare_contexts(job, teacher, student_reader(run, job.settings), path, Quiet())
    adapter, _ = train_student(job, student, teacher, path, Quiet())
    save_adapter(folder / f"student-{round:05d}.safetensors", adapter)
    if not settings.mutual_steps:
        return None
    student.model.adapter.write(adapter)
    return _back(job, teacher, student, path, trained)


def _round(path: Path) -> int:
    """Returns the round of a student's file."""
    return int(path.stem.rpartition("-")[2])


def _back(
    job: DistillationJob, teacher: Teacher, student: Student, path: Path, trained: frozenset[str]
) -> AdapterState:
    """Returns the small model's adapter after it has learned from the student."""
    settings = job.settings.model_copy(
        update={
            "steps": job.settings.mutual_steps,
            "method": "forward-kl",
            "temperature": 1.0,
            "general_weight": 0.0,
        }
    )
    contexts = load_contexts(path / "contexts.jsonl")
    own = [replace(each, student=each.teacher) for each in contexts]
    run = job.run
    small = Student(
        teacher.trained.model, teacher.task, run.lora, run.model, run.seed, start=teacher.tuned
    )
    says = StudentSays(student, contexts, job.vocabulary)
    objective = Objective("forward-kl", settings, job.vocabulary, settings.steps)
    training_set = TrainingSet(own, objective, says)
    trainer = StudentTrainer(
        small, training_set, settings, path / "back", lambda *_: None, trained=trained
    )
    return trainer.run()
