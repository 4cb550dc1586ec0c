"""What a distillation takes, before anything is loaded: memory by arithmetic, time by a short trial."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from fedslm.config import TrainingConfig
from fedslm.distillation.models import student_sections
from fedslm.distillation.pipeline import DistillationJob
from fedslm.models import footprint
from fedslm.models.base import device_of, resolve_config

_SIDE, _TRIALS = 1024, 5
_BOTH_WAYS = 3.0  # a pass and its way back, in passes


@dataclass(frozen=True)
class Estimate:
    """What it takes.

    Attributes:
        student_bytes: The student's frozen weights.
        teacher_bytes: The teacher's.
        training_bytes: The student's adapter, its optimizer and activations; rough.
        seconds: On this machine; rough: half or twice as much is usual.
        parameters: Of student and teacher.
        trained: Parameters of the student's adapter.
        device: Where it computes.
        device_bytes: Memory there; None if it is not known.
    """

    student_bytes: int
    teacher_bytes: int
    training_bytes: int
    seconds: float
    parameters: tuple[int, int]
    trained: int
    device: str
    device_bytes: int | None

    def total_bytes(self, *, two_passes: bool) -> int:
        """At once: both models, or the larger of them where the teacher leaves first."""
        learning = self.student_bytes + self.training_bytes
        if two_passes:
            return max(learning, self.teacher_bytes)
        return learning + self.teacher_bytes


def estimate(job: DistillationJob) -> Estimate:
    """Adds up memory, and times a matrix product on the device for the rest.

    Raises:
        ModelError: A model cannot be found.
    """
    run, settings = job.run, job.settings
    model, lora, task = student_sections(settings, run.task)
    classes = len(run.labels)
    own = footprint.footprint(resolve_config(model), model, lora, task, classes)
    theirs = footprint.footprint(resolve_config(run.model), run.model, run.lora, task, classes)
    keys = frozenset(own.shapes)
    training = TrainingConfig(optimizer="adamw")
    records = min(settings.micro_batch_size, settings.batch_size)
    needs = footprint.memory(own, own.shapes, keys, training, records=records, private=False)
    device, held = footprint.machine(model)
    tokens = settings.steps * settings.batch_size * run.task.max_length
    again = 1 if settings.method == "proxy-target" else 0  # what both models say without adapters
    passes = (_BOTH_WAYS + again) * own.parameters + (1 + again) * theirs.parameters
    work = 2.0 * tokens * passes
    return Estimate(
        student_bytes=own.base_bytes,
        teacher_bytes=theirs.base_bytes,
        training_bytes=needs.total - needs.base,
        seconds=work / _speed(device_of(model)),
        parameters=(own.parameters, theirs.parameters),
        trained=footprint.parameters(own.shapes, keys),
        device=device,
        device_bytes=held,
    )


def _speed(device: torch.device) -> float:
    """Floating-point operations in a second of a float32 matrix product."""
    matrix = torch.ones((_SIDE, _SIDE), device=device)
    _ = float((matrix @ matrix).sum())
    began = time.perf_counter()
    for _ in range(_TRIALS):
        total = float((matrix @ matrix).sum())
    del total
    return _TRIALS * 2.0 * _SIDE**3 / (time.perf_counter() - began)
