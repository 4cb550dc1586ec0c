"""The embedded model, and observable steps of the real path, for the self-test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedslm.config import DeviceName, LoraConfig, ModelConfig, TaskConfig
from fedslm.errors import PrivacyError
from fedslm.models.adapter import attach
from fedslm.models.base import DEMO_DIRECTORY, device_of, load_base, load_tokenizer
from fedslm.models.initial import initial_state
from fedslm.models.loaded import LoadedModel
from fedslm.privacy.plan import PrivatePlan
from fedslm.records import AdapterState
from fedslm.rng import stream
from fedslm.tasks.base import Example, Tensors
from fedslm.tasks.classification import Classification
from fedslm.training.batches import Unit
from fedslm.training.local import enter_training
from fedslm.training.shapes import Shapes
from fedslm.training.steps import PrivateStep, stepping

WILD, BROKEN = 2, 3  # classes: the gradient is infinite; the batch cannot be computed
_MICRO_BATCH = 8
SHAPES = Shapes({16: (4, 8), 24: (4,), 40: (4,)})
"""Public shapes whose bits the self-test does not compare: that is the bit-proof's task."""


class AdversarialTask(Classification):
    """Classification in which some classes make the record's gradient infinite, or the batch fail."""

    def per_example_loss(self, logits: torch.Tensor, batch: Tensors) -> torch.Tensor:
        """Returns each record's loss; it is infinite for one class, and another class raises."""
        labels = batch["labels"]
        if bool((labels == BROKEN).any()):
            raise ValueError("a record that cannot be computed")
        losses = super().per_example_loss(logits, batch)
        return losses * torch.where(labels == WILD, math.inf, 1.0)


@dataclass(frozen=True)
class Bench:
    """The embedded model and the operations that the checks need."""

    model: LoadedModel
    task: AdversarialTask
    start: AdapterState

    @classmethod
    def load(cls, device: DeviceName = "auto") -> Bench:
        """Loads a separate model on a device, so that the node's stays loaded."""
        base = ModelConfig(base="demo", device=device, dtype="float32")
        config = TaskConfig(name="classification", pooling="mean", max_length=32)
        labels = ("a", "b", "wild", "broken")
        tokenizer = load_tokenizer(DEMO_DIRECTORY)
        network = load_base(base, config, len(labels), tokenizer)
        adapter = attach(network, LoraConfig(rank=4, alpha=4.0))
        model = LoadedModel(adapter, tokenizer, device_of(base), "", torch.float32)
        shapes = {key: tuple(each.shape) for key, each in adapter.parameters.items()}
        initial, generator = initial_state(shapes, 0), stream(0, "self-test")
        noisy = {k: v + 0.1 * generator.standard_normal(v.shape) for k, v in initial.tensors.items()}
        start = AdapterState({key: value.astype(np.float32) for key, value in noisy.items()})
        return cls(model, AdversarialTask(labels, "text", "label", 32), start)

    def steps(self, plan: PrivatePlan, batches: Sequence[Sequence[Unit]]) -> Seen:
        """Takes steps of the real path, all in one round, and records them."""
        adapter = self.model.adapter
        adapter.write(self.start)
        adapter.train_only(set(self.start))
        enter_training(self.model)
        optimizer = torch.optim.SGD(list(adapter.parameters.values()), lr=1e-6)
        exact, noise = [], []

        def look(private: Any) -> None:
            exact.append(_flat([p.summed_grad for p in private.params]))
            noisy = _flat([p.grad for p in private.params]) * plan.normaliser
            noise.append(noisy - exact[-1])

        with stepping(self.model, self.task, plan, optimizer, _MICRO_BATCH, shapes=SHAPES) as step:
            if not isinstance(step, PrivateStep):
                raise PrivacyError("a private plan gave a step without privacy")
            step.optimizer.attach_step_hook(look)
            for units in batches:
                step(units)
        after = adapter.read()
        moved = all(bool((after[key] != self.start[key]).any()) for key in after)
        if len(exact) != len(batches):
            raise PrivacyError(f"{len(batches)} steps were taken, {len(exact)} released something")
        return Seen(exact, noise, moved)

    def total(self, plan: PrivatePlan, units: Sequence[Unit]) -> torch.Tensor:
        """Returns the sum of one step before noise."""
        return self.steps(plan, [units]).exact[0]


@dataclass(frozen=True)
class Seen:
    """The sums and the noise that the hook recorded in each step, and whether every tensor moved."""

    exact: list[torch.Tensor]
    noise: list[torch.Tensor]
    moved: bool


def _flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenates all values into one float64 vector on the CPU."""
    return torch.cat([tensor.detach().cpu().double().flatten() for tensor in tensors])


def example(length: int, target: int = 0) -> Example:
    """Creates a record of a given length."""
    tokens = stream(length, "self-test", target).integers(5, 1700, size=length)
    return Example(tuple(int(token) for token in tokens), target)
