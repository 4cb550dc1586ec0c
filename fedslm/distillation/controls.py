"""The arms of a transfer proof: the student trained by the federated teacher and by control teachers.

All arms use the same public records and the same number of steps with the same adapter; only the
teacher differs. Without controls, a gain proves nothing: it may come from the public records, or from
distillation as such.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from fedslm import layout
from fedslm.data import store
from fedslm.distillation.models import Student, Teacher
from fedslm.distillation.pipeline import DistillationJob, Watcher, prepare_contexts, train_student
from fedslm.errors import DataError, RunError
from fedslm.inference.inputs import Rows
from fedslm.inference.trained import FinishedRun
from fedslm.records import AdapterState
from fedslm.storage import load_adapter, save_adapter

FEDERATED, BASE, UNTUNED, PUBLIC, LABELS, POOLED = (
    "federated teacher",
    "untuned student",
    "untuned teacher",
    "public teacher",
    "public labels",
    "pooled private records",
)
CONTROLS = (BASE, UNTUNED, PUBLIC, LABELS)
WHAT = {
    FEDERATED: "the student after distillation from the federated small model",
    BASE: "the student before distillation (control)",
    UNTUNED: "distilled from the small model before federation (control)",
    PUBLIC: "distilled from the small model tuned only on the public records (control)",
    LABELS: "the student tuned on the public records' own labels or texts (control)",
    POOLED: "the student tuned on all private records together (upper reference; not covered by any ε)",
}


class LeftOut(Exception):
    """An arm that cannot be run here, with the reason."""


@dataclass(frozen=True)
class ControlTrainer:
    """Trains the arms one after another with the same two models.

    Attributes:
        run: The run whose federated model teaches.
        job: The distillation that is evaluated.
        teacher: The small model with the federated adapter.
        student: The larger model.
        directory: Directory for the arms' adapters; a finished arm is not trained again.
        watcher: Receives progress.
    """

    run: FinishedRun
    job: DistillationJob
    teacher: Teacher
    student: Student
    directory: Path
    watcher: Watcher

    def adapter(self, arm: str, seed: int) -> AdapterState:
        """Returns the student's adapter of one arm.

        Args:
            arm: One of :data:`WHAT`.
            seed: Seed of the starting adapter and of the order of records.

        Raises:
            LeftOut: The arm cannot be run here.
        """
        student = replace(self.student, seed=seed)
        if arm == BASE:
            return student.initial
        path = self._place(arm, seed)
        kept = path / "adapter.safetensors"
        if not kept.exists():
            job, teacher = self._job_and_teacher(arm, seed)
            told = _Named(self.watcher, f"{arm}, seed {seed}")
            try:
                prepare_contexts(job, teacher, student.reader, path, told)
            except DataError as error:
                raise LeftOut(str(error)) from error
            adapter, _ = train_student(job, student, teacher, path, told)
            save_adapter(kept, adapter)
        return load_adapter(kept)

    def keep(self, arm: str, seed: int, adapter: AdapterState) -> None:
        """Stores an adapter that has already been trained."""
        save_adapter(self._place(arm, seed) / "adapter.safetensors", adapter)

    def _place(self, arm: str, seed: int) -> Path:
        """Returns the directory of an arm's files."""
        return self.directory / f"{arm.replace(' ', '-')}-{seed}"

    def _job_and_teacher(self, arm: str, seed: int) -> tuple[DistillationJob, Teacher]:
        """Returns an arm's distillation job and teacher."""
        job, teacher = self.job, self.teacher
        if arm == FEDERATED:
            return job, teacher
        if arm == UNTUNED:
            return job, teacher.of(teacher.trained.initial)
        if arm == PUBLIC:
            return job, teacher.of(self._public_teacher(seed))
        settings = job.settings.model_copy(update={"method": "labels", "cached_samples": 0})
        rows = job.rows if arm == LABELS else _pooled(self.run)
        return replace(job, settings=settings, rows=rows), teacher

    def _public_teacher(self, seed: int) -> AdapterState:
        """Tunes the small model's adapter on the public records, for as long as clients train."""
        path = self.directory / f"public-teacher-adapter-{seed}"
        kept = path / "adapter.safetensors"
        if not kept.exists():
            run, trained = self.run, self.teacher.trained
            training, adam = run.training, run.training.optimizer == "adamw"
            update = {
                "method": "labels",
                "steps": max(1, training.local_steps * int(run.report["rounds"])),
                "batch_size": training.batch_size,
                "micro_batch_size": training.micro_batch_size,
                "learning_rate": training.learning_rate if adam else self.job.settings.learning_rate,
                "general_weight": 0.0,
                "cached_samples": 0,
            }
            settings = self.job.settings.model_copy(update=update)
            job = replace(self.job, settings=settings, general=())
            small = Student(trained.model, trained.task, run.lora, run.model, run.seed)
            told = _Named(self.watcher, f"{PUBLIC}'s own tuning, seed {seed}")
            try:
                prepare_contexts(job, self.teacher, self.teacher.reader, path, told)
            except DataError as error:
                raise LeftOut(str(error)) from error
            adapter, _ = train_student(job, small, self.teacher, path, told)
            save_adapter(kept, adapter)
        return load_adapter(kept)


@dataclass(frozen=True)
class _Named:
    """A watcher that prefixes progress with the arm's name."""

    watcher: Watcher
    name: str

    def on_progress(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Passes progress on."""
        self.watcher.on_progress(f"{self.name}: {stage}", done, total, note)


def _pooled(run: FinishedRun) -> Rows:
    """Returns all private records of a simulation.

    Raises:
        LeftOut: The records are not available: real nodes keep theirs.
    """
    directory = run.directory / layout.DATA
    count = len(run.report["clients"])
    try:
        return [dict(row) for client in range(count) for row in store.read_client(directory, client)]
    except (DataError, RunError, OSError) as error:
        raise LeftOut("the private records are not on this machine") from error
