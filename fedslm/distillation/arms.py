"""The arms of a proof of transfer: what the student becomes if something else teaches it.

All arms see the same public records and take the same steps with the same adapter; only the teacher
differs. Without them a gain says nothing: it may come from the public records, or from distilling.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from fedslm.data import shards
from fedslm.distillation.lesson import Plan, Watcher, learn, listen
from fedslm.distillation.pair import Student, Teacher
from fedslm.errors import DataError, RunError
from fedslm.inference.inputs import Rows
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
    BASE: "the student before (control)",
    UNTUNED: "distilled from the small model before federation (control)",
    PUBLIC: "distilled from the small model tuned only on the public records (control)",
    LABELS: "the student tuned on the public records' own labels or texts (control)",
    POOLED: "the student tuned on all private records together (ceiling; covered by no ε)",
}


class LeftOut(Exception):
    """An arm that cannot be run here, and why."""


@dataclass(frozen=True)
class Workshop:
    """Both models, in which the arms are trained one after another.

    Attributes:
        plan: The distillation that is to be proved.
        teacher: The small model with the federated adapter.
        student: The larger one.
        directory: Where arms leave their adapters; a finished one is not trained again.
        watcher: Is told how it goes.
    """

    plan: Plan
    teacher: Teacher
    student: Student
    directory: Path
    watcher: Watcher

    def adapter(self, arm: str, seed: int) -> AdapterState:
        """The student's adapter of one arm.

        Args:
            arm: One of :data:`WHAT`.
            seed: Of the starting adapter and the order of records.

        Raises:
            LeftOut: The arm cannot be run here.
        """
        student = replace(self.student, seed=seed)
        if arm == BASE:
            return student.initial
        path = self._place(arm, seed)
        kept = path / "adapter.safetensors"
        if not kept.exists():
            plan, teacher = self._lesson(arm, seed)
            told = _Named(self.watcher, f"{arm}, seed {seed}")
            try:
                listen(plan, teacher, student.reader, path, told)
            except DataError as error:
                raise LeftOut(str(error)) from error
            adapter, _ = learn(plan, student, teacher, path, told)
            save_adapter(kept, adapter)
        return load_adapter(kept)

    def keep(self, arm: str, seed: int, adapter: AdapterState) -> None:
        """Takes over an adapter that is trained already."""
        save_adapter(self._place(arm, seed) / "adapter.safetensors", adapter)

    def _place(self, arm: str, seed: int) -> Path:
        """Where an arm's files lie."""
        return self.directory / f"{arm.replace(' ', '-')}-{seed}"

    def _lesson(self, arm: str, seed: int) -> tuple[Plan, Teacher]:
        """What an arm learns, and from whom."""
        plan, teacher = self.plan, self.teacher
        if arm == FEDERATED:
            return plan, teacher
        if arm == UNTUNED:
            return plan, teacher.of(teacher.trained.initial)
        if arm == PUBLIC:
            return plan, teacher.of(self._public_teacher(seed))
        settings = plan.settings.model_copy(update={"method": "labels", "cached_samples": 0})
        rows = plan.rows if arm == LABELS else _pooled(plan)
        return replace(plan, settings=settings, rows=rows), teacher

    def _public_teacher(self, seed: int) -> AdapterState:
        """The small model's adapter, tuned on the public records as long as clients tuned theirs."""
        path = self.directory / f"public-teacher-adapter-{seed}"
        kept = path / "adapter.safetensors"
        if not kept.exists():
            run, trained = self.plan.run, self.teacher.trained
            training, adam = run.training, run.training.optimizer == "adamw"
            update = {
                "method": "labels",
                "steps": max(1, training.local_steps * int(run.report["rounds"])),
                "batch_size": training.batch_size,
                "micro_batch_size": training.micro_batch_size,
                "learning_rate": training.learning_rate if adam else self.plan.settings.learning_rate,
                "general_weight": 0.0,
                "cached_samples": 0,
            }
            settings = self.plan.settings.model_copy(update=update)
            plan = replace(self.plan, settings=settings, general=())
            small = Student(trained.model, trained.task, run.lora, run.model, run.seed)
            told = _Named(self.watcher, f"{PUBLIC}'s own tuning, seed {seed}")
            try:
                listen(plan, self.teacher, self.teacher.reader, path, told)
            except DataError as error:
                raise LeftOut(str(error)) from error
            adapter, _ = learn(plan, small, self.teacher, path, told)
            save_adapter(kept, adapter)
        return load_adapter(kept)


@dataclass(frozen=True)
class _Named:
    """A watcher that says which arm it is."""

    watcher: Watcher
    name: str

    def on_progress(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Passes on."""
        self.watcher.on_progress(f"{self.name}: {stage}", done, total, note)


def _pooled(plan: Plan) -> Rows:
    """All private records of a simulation.

    Raises:
        LeftOut: They are not here: real nodes keep theirs.
    """
    directory = plan.run.directory / "data"
    count = len(plan.run.report["clients"])
    try:
        return [dict(row) for client in range(count) for row in shards.read_client(directory, client)]
    except (DataError, RunError, OSError) as error:
        raise LeftOut("the private records are not on this machine") from error
