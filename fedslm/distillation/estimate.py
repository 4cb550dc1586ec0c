"""Cost of a distillation before any model is loaded: computed memory, and time from a short trial."""

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
_BOTH_WAYS = 3.0  # a forward and a backward pass, in units of a forward pass


@dataclass(frozen=True)
class Estimate:
    """The estimated cost.

    Attributes:
        student_bytes: Size of the student's frozen weights.
        teacher_bytes: Size of the teacher's weights.
        training_bytes: Size of the student's adapter, its optimizer and activations; a rough estimate.
        seconds: Time on this machine; rough: a factor of two in either direction is usual.
        parameters: Number of parameters of student and teacher.
        trained: Number of parameters of the student's adapter.
        device: Device that computes.
        device_bytes: Memory of the device; None if unknown.
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
        """Peak memory: both models, or the larger of them if the teacher is unloaded first."""
        learning = self.student_bytes + self.training_bytes
        if two_passes:
            return max(learning, self.teacher_bytes)
        return learning + self.teacher_bytes


def estimate(job: DistillationJob) -> Estimate:
    """Computes the memory, and estimates the time from a timed matrix product on the device.

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
    again = 1 if settings.method == "proxy-target" else 0  # predictions of both models without adapters
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
    """Floating-point operations per second of a float32 matrix product."""
    matrix = torch.ones((_SIDE, _SIDE), device=device)
    _ = float((matrix @ matrix).sum())
    began = time.perf_counter()
    for _ in range(_TRIALS):
        total = float((matrix @ matrix).sum())
    del total
    return _TRIALS * 2.0 * _SIDE**3 / (time.perf_counter() - began)
