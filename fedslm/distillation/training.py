"""The student's optimizer steps, with checkpoints from which an interrupted distillation resumes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from fedslm.config import DistillConfig
from fedslm.distillation import losses
from fedslm.distillation.contexts import Context
from fedslm.distillation.models import Student, Teacher
from fedslm.distillation.objective import Objective, Target
from fedslm.distillation.schedule import learning_rate
from fedslm.errors import RunError, TrainingError
from fedslm.records import AdapterState
from fedslm.rng import stream
from fedslm.storage import json_text, load_adapter, save_adapter, write_text
from fedslm.tasks import tokens
from fedslm.tasks.base import Example, Task
from fedslm.training.local import enter_training

logger = logging.getLogger(__name__)
OnStep = Callable[[int, int, float], None]  # (done, total, mean loss of the step)
_LONGEST_GRADIENT = 1.0
_CHECKPOINTS = 20  # per distillation


class TargetSource(Protocol):
    """A source of targets: the teacher itself, or its stored targets."""

    def of(self, numbers: Sequence[int], contexts: Sequence[Context]) -> Target:
        """Returns the targets of contexts, which have these numbers in the training set."""


@dataclass(frozen=True)
class Live:
    """Targets computed by the teacher, which is loaded together with the student.

    Attributes:
        teacher: The model that computes the targets.
        student: The student, for methods that use its base model.
        objective: Determines the targets.
    """

    teacher: Teacher
    student: Student
    objective: Objective

    def of(self, numbers: Sequence[int], contexts: Sequence[Context]) -> Target:
        """Computes the teacher's targets."""
        return self.objective.target(self.teacher, self.student, contexts)


@dataclass(frozen=True)
class TrainingSet:
    """The data that a student learns from.

    Attributes:
        contexts: The contexts to learn.
        objective: The loss towards the targets.
        source: Source of the targets; None: only labels are learned.
        label_weight: Weight of the cross-entropy on public labels.
        general: General text used to regularize the student towards its original state.
    """

    contexts: Sequence[Context]
    objective: Objective
    source: TargetSource | None
    label_weight: float = 0.0
    general: Sequence[Example] = ()


@dataclass
class StudentTrainer:
    """Trains the student of one distillation.

    Attributes:
        student: The student; its adapter is trained.
        training_set: The data that it learns from.
        settings: Steps, batch sizes and learning rate.
        directory: Directory of checkpoints; they are removed when the distillation is finished.
        on_step: Receives each step's result.
        trained: Keys of the tensors that may change; None: the whole adapter.
    """

    student: Student
    training_set: TrainingSet
    settings: DistillConfig
    directory: Path
    on_step: OnStep
    trained: frozenset[str] | None = None
    losses: list[float] = field(default_factory=list)

    def run(self) -> AdapterState:
        """Runs all remaining steps.

        Returns:
            The trained adapter.

        Raises:
            RunError: The checkpoint is damaged or cannot be written.
            TrainingError: The loss is not finite.
        """
        network = self.student.model.adapter.network
        self.student.model.adapter.write(self.student.initial)
        optimizer = torch.optim.AdamW(self._parameters().values(), weight_decay=0.0)
        done = self._restore(optimizer)
        every = max(1, self.settings.steps // _CHECKPOINTS)
        enter_training(self.student.model)
        try:
            for step in range(done, self.settings.steps):
                rate = learning_rate(step, self.settings.steps, self.settings.learning_rate)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                self.losses.append(self._step(step, optimizer))
                self.on_step(step + 1, self.settings.steps, self.losses[-1])
                if (step + 1) % every == 0:
                    self._save(step + 1, optimizer)
        finally:
            network.eval()
        return self.student.model.adapter.read()

    def _parameters(self) -> dict[str, torch.nn.Parameter]:
        """Returns the trained parameters; the rest of the adapter is frozen."""
        adapter = self.student.model.adapter
        wanted = set(adapter.parameters) if self.trained is None else set(self.trained)
        adapter.train_only(wanted)
        return {key: each for key, each in adapter.parameters.items() if key in wanted}

    def _step(self, step: int, optimizer: torch.optim.Optimizer) -> float:
        """Runs one optimizer step; returns the mean loss per position."""
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        numbers = batch_of(
            step, len(self.training_set.contexts), self.settings.batch_size, self.student.seed
        )
        chosen = [self.training_set.contexts[number] for number in numbers]
        positions = sum(count_positions(self.student.task, each.student) for each in chosen)
        for part in _parts(numbers, self.training_set.contexts, self.settings.micro_batch_size):
            loss = self._loss(part, step) / max(positions, 1)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        total += self._hold(step)
        if not np.isfinite(total):
            raise TrainingError(
                f"the loss of step {step + 1} is {total}: lower distill.learning_rate or distill.alpha"
            )
        torch.nn.utils.clip_grad_norm_(self._parameters().values(), _LONGEST_GRADIENT)
        optimizer.step()
        return total

    def _loss(self, numbers: Sequence[int], step: int) -> torch.Tensor:
        """Summed loss of some contexts: on the teacher's targets, and on public labels if weighted."""
        training_set, student = self.training_set, self.student
        contexts = [training_set.contexts[number] for number in numbers]
        loss = torch.zeros((), device=student.model.device)
        if training_set.source is not None:
            target = training_set.source.of(numbers, contexts)
            logits = student.logits([context.student for context in contexts])
            loss = loss + training_set.objective.loss(logits, target, step)
        labelled = [context.student for context in contexts if context.labelled]
        if training_set.label_weight and labelled:
            logits = student.logits(labelled)
            loss = loss + training_set.label_weight * _cross_entropy(student, labelled, logits)
        return loss if loss.requires_grad else loss.requires_grad_()

    def _hold(self, step: int) -> float:
        """KL(L0 || student) on general text: keeps the student close to its original state."""
        weight, general = self.settings.general_weight, self.training_set.general
        if not general or not weight:
            return 0.0
        numbers = batch_of(step, len(general), self.settings.micro_batch_size, self.student.seed + 1)
        examples = [general[number] for number in numbers]
        wanted = losses.soft_target(self.student.base_logits(examples), 1.0)
        logits = self.student.logits(examples)
        loss = weight * losses.in_pieces(losses.forward_kl, logits, wanted, most=1 << 24).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def _save(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Writes a checkpoint."""
        keys = list(self._parameters())
        state = optimizer.state_dict()["state"]
        save_adapter(self.directory / f"adapter-{step:07d}.safetensors", self._read())
        for name in ("exp_avg", "exp_avg_sq"):
            moments = AdapterState(
                {
                    key: state[at][name].detach().float().cpu().numpy().copy()
                    for at, key in enumerate(keys)
                    if at in state
                }
            )
            save_adapter(self.directory / f"{name}-{step:07d}.safetensors", moments)
        write_text(self.directory / "state.json", json_text({"step": step, "losses": self.losses}))
        for old in self.directory.glob("*.safetensors"):
            if not old.stem.endswith(f"-{step:07d}"):
                old.unlink()

    def _read(self) -> AdapterState:
        """Returns the current adapter."""
        return self.student.model.adapter.read()

    def _restore(self, optimizer: torch.optim.Optimizer) -> int:
        """Restores the last checkpoint; returns the number of finished steps."""
        path = self.directory / "state.json"
        if not path.exists():
            return 0
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            step, self.losses = int(values["step"]), [float(each) for each in values["losses"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path} is damaged: {error}; remove {self.directory}") from error
        self.student.model.adapter.write(
            load_adapter(self.directory / f"adapter-{step:07d}.safetensors")
        )
        moments = {
            name: load_adapter(self.directory / f"{name}-{step:07d}.safetensors")
            for name in ("exp_avg", "exp_avg_sq")
        }
        for key, parameter in self._parameters().items():
            if key in moments["exp_avg"]:
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(step)),
                    **{
                        n: torch.from_numpy(m.tensors[key].copy()).to(parameter)
                        for n, m in moments.items()
                    },
                }
        logger.info("resumed after step %d", step)
        return step


def batch_of(step: int, count: int, size: int, seed: int) -> list[int]:
    """Numbers of a step's examples: each epoch uses all of them once, in a new order.

    >>> sorted(batch_of(0, 4, 2, 0) + batch_of(1, 4, 2, 0))
    [0, 1, 2, 3]
    """
    first, chosen = step * size, []
    for epoch in range(first // count, (first + size - 1) // count + 1):
        order = stream(seed, "distil-batches", epoch).permutation(count)
        begin, end = max(first - epoch * count, 0), min(first + size - epoch * count, count)
        chosen += [int(number) for number in order[begin:end]]
    return chosen


def count_positions(task: Task, example: Example) -> int:
    """Number of positions of an example: one for a class, or the number of target tokens."""
    if task.labels:
        return 1
    if example.targets and any(target == tokens.IGNORED for target in example.targets):
        return sum(target != tokens.IGNORED for target in example.targets[1:])
    return len(example.input_ids) - 1


def _parts(numbers: Sequence[int], contexts: Sequence[Context], size: int) -> Iterator[list[int]]:
    """Splits a batch into pieces of similar length."""
    ordered = sorted(numbers, key=lambda number: contexts[number].student.length)
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def _cross_entropy(student: Student, examples: Sequence[Example], logits: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy of the positions on their own labels."""
    batch = student.task.collate(examples, int(student.tokenizer.pad_token_id))
    wanted = batch["labels"][batch["labels"] != tokens.IGNORED].to(logits.device)
    return torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="sum")
