"""One client's local work in a round: loads the adapter, takes the plan's steps, reads it back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar, assert_never

import numpy as np
import torch

from fedslm.config import TrainingConfig
from fedslm.errors import DataError, NotRepeated, TrainingError
from fedslm.models.loaded import LoadedModel
from fedslm.models.networks import forgets_activations
from fedslm.privacy.encoding import Words
from fedslm.privacy.plan import NoPrivacy, Plan, PrivatePlan
from fedslm.records import AdapterState
from fedslm.rng import seed_of, stream
from fedslm.tasks.base import Example, Task
from fedslm.tasks.lazy import owners_of
from fedslm.training.checks import check_moved, check_parameters
from fedslm.training.shapes import Shapes
from fedslm.training.steps import PrivateStep, stepping

logger = logging.getLogger(__name__)  # the client's own log
T = TypeVar("T")


@dataclass(frozen=True)
class LocalWork:
    """The work that the server requests from a client.

    Attributes:
        adapter: The whole adapter to start from.
        trained: Keys to train; the others stay bit-identical.
        seed: The run's seed.
        round: Round number, from 1.
        client: Index of the client.
        correction: Added to every gradient: SCAFFOLD's c - cₖ; empty without it.
        shapes: The public shapes that were proved here, for a plan with ``passes = "fixed"``; without
            them such a plan runs isolated.
    """

    adapter: AdapterState
    trained: frozenset[str]
    seed: int
    round: int
    client: int
    correction: AdapterState = field(default_factory=lambda: AdapterState({}))
    shapes: Shapes | None = None


def train(
    model: LoadedModel,
    task: Task,
    examples: Sequence[Example],
    plan: Plan,
    training: TrainingConfig,
    work: LocalWork,
) -> AdapterState:
    """Trains on one client's examples.

    Args:
        model: The loaded model; its adapter is overwritten.
        task: The task to learn.
        examples: The client's examples; may be empty under privacy.
        plan: Sampler, clip and noise.
        training: Optimizer and micro-batch size.
        work: Where to start and what to train.

    Returns:
        The trained tensors.

    If a repeated pass gives other bits, nothing of this attempt is released: the shapes are withdrawn,
    and the round is computed again with isolated passes, fresh samples and fresh noise.

    Raises:
        DataError: There is nothing to train on (without privacy).
        TrainingError: A self-check failed.
    """
    if not examples and isinstance(plan, NoPrivacy):
        raise DataError("this client has no usable records")
    return _repeated(lambda: _trained(model, task, examples, plan, training, work), work)


def _repeated(attempt: Callable[[], T], work: LocalWork) -> T:
    """Makes an attempt, and another one with isolated passes if a repeated pass gave other bits."""
    try:
        return attempt()
    except NotRepeated as error:  # only a private step repeats a pass
        if work.shapes is None:
            raise
        logger.error("%s; this round starts again, and each unit has its own pass from now on", error)
        work.shapes.withdraw()
        return attempt()


def _begun(model: LoadedModel, training: TrainingConfig, work: LocalWork) -> torch.optim.Optimizer:
    """Writes the adapter, and returns the optimizer of what is trained."""
    model.adapter.write(work.adapter)
    model.adapter.train_only(set(work.trained))
    enter_training(model)
    optimizer = _optimizer(model, training)
    check_parameters(model.adapter, optimizer)
    return optimizer


def _trained(
    model: LoadedModel,
    task: Task,
    examples: Sequence[Example],
    plan: Plan,
    training: TrainingConfig,
    work: LocalWork,
) -> AdapterState:
    """Takes the steps of a round; see :func:`train`."""
    keys = sorted(work.trained)
    optimizer = _begun(model, training, work)
    hold(optimizer, model, training, work)
    torch.manual_seed(seed_of(work.seed, "dropout", work.round, work.client))
    seeded = stream(work.seed, "batches", work.round, work.client)
    before = work.adapter.select(work.trained)
    unmoved: frozenset[str] = frozenset()
    try:
        with stepping(
            model, task, plan, optimizer, training.micro_batch_size, shapes=work.shapes
        ) as step:
            for number, batch in enumerate(plan.batches(owners_of(examples), seeded)):
                step([[examples[record] for record in unit] for unit in batch])
                if number == 0:
                    unmoved = _zero_gradients(model)
                    check_moved(before, model.adapter.read(keys), unmoved)
    finally:
        model.adapter.network.eval()
    after = model.adapter.read(keys)
    check_moved(before, after, unmoved if plan.steps_per_round == 1 else frozenset())
    if not after.is_finite():
        raise TrainingError("local training diverged: the adapter holds NaN or infinity")
    return after


def share_of_sum(
    model: LoadedModel,
    task: Task,
    examples: Sequence[Example],
    plan: PrivatePlan,
    training: TrainingConfig,
    work: LocalWork,
) -> Words:
    """Computes one client's part of a round's sum over clients; the adapter does not move.

    Args:
        model: The loaded model; its adapter is overwritten.
        task: The task to learn.
        examples: The client's examples; may be empty.
        plan: Takes one step, and shares the noise.
        training: Micro-batch size.
        work: Where to start and what to train.

    Returns:
        The sum of the units' clipped gradients with this client's share of the noise, modulo 2^32 in
        steps of the plan's grid: the values of the trained tensors in the sorted order of their keys.

    A repeated pass that gives other bits is treated as by :func:`train`.

    Raises:
        TrainingError: A self-check failed.
    """
    return _repeated(lambda: _shared(model, task, examples, plan, training, work), work)


def _shared(
    model: LoadedModel,
    task: Task,
    examples: Sequence[Example],
    plan: PrivatePlan,
    training: TrainingConfig,
    work: LocalWork,
) -> Words:
    """Takes the one step of :func:`share_of_sum`."""
    optimizer = _begun(model, training, work)
    seeded = stream(work.seed, "batches", work.round, work.client)  # not used under privacy
    try:
        with stepping(
            model, task, plan, optimizer, training.micro_batch_size, shapes=work.shapes
        ) as step:
            (batch,) = plan.batches(owners_of(examples), seeded)
            step([[examples[record] for record in unit] for unit in batch])
            words = step.optimizer.words if isinstance(step, PrivateStep) else None
    finally:
        model.adapter.network.eval()
    if not isinstance(words, np.ndarray):
        raise TrainingError("internal check failed: the step left no sum")
    held = [p for group in optimizer.param_groups for p in group["params"]]
    parts = np.split(words, np.cumsum([parameter.numel() for parameter in held])[:-1])
    names = {id(parameter): key for key, parameter in model.adapter.parameters.items()}
    ordered = sorted(zip(held, parts, strict=True), key=lambda pair: names[id(pair[0])])
    return np.concatenate([part for _, part in ordered])


def rehearse(model: LoadedModel, task: Task, plan: PrivatePlan, trained: frozenset[str]) -> None:
    """Runs one made-up record, so that a base without per-record gradients fails before any charge.

    Raises:
        TrainingError: This base has no per-record gradients.
    """
    model.adapter.train_only(set(trained))
    enter_training(model)
    parameters = [p for p in model.adapter.parameters.values() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    try:
        with stepping(model, task, plan, optimizer, 1) as step:
            if isinstance(step, PrivateStep):
                step.rehearse(task.made_up())
    except Exception as error:
        raise TrainingError(f"this base gives no gradient for each record: {error}") from error
    finally:
        model.adapter.network.eval()


def enter_training(model: LoadedModel) -> None:
    """Puts trained modules and LoRA's dropout into training mode; the frozen base has no dropout.

    Layers that recompute their activations are also put into training mode, since they do so only in
    that mode; the modules inside them stay in evaluation mode.
    """
    network = model.adapter.network.eval()
    for name, module in network.named_modules():
        trained = any(p.requires_grad for p in module.parameters(recurse=False))
        if trained or forgets_activations(module) or ".lora_dropout." in name:
            module.training = True


def _optimizer(model: LoadedModel, training: TrainingConfig) -> torch.optim.Optimizer:
    """Returns the local optimizer over the trained parameters."""
    parameters = [p for p in model.adapter.parameters.values() if p.requires_grad]
    rate, decay = training.learning_rate, training.weight_decay
    match training.optimizer:
        case "adamw":
            return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, fused=True)
        case "sgd":
            return torch.optim.SGD(parameters, lr=rate, weight_decay=decay)
        case _:
            assert_never(training.optimizer)


def hold(
    optimizer: torch.optim.Optimizer, model: LoadedModel, training: TrainingConfig, work: LocalWork
) -> None:
    """Limits client drift, before each step of the client's optimizer.

    Under privacy this comes after clipping and noise, and adds only the adapter of the round's start
    and noised tensors: it is post-processing.

    References:
        FedProx: Li et al. 2020 (arXiv 1812.06127): the gradient of (mu / 2)·‖w - w₀‖².
        SCAFFOLD: Karimireddy et al. 2020 (arXiv 1910.06378): the correction c - cₖ.
    """
    strength = training.proximal_strength if training.drift == "fedprox" else 0.0
    if not strength and not work.correction:
        return
    named = {key: p for key, p in model.adapter.parameters.items() if p.requires_grad}
    starts = {key: p.detach().clone() for key, p in named.items()}
    corrections = {key: torch.tensor(work.correction[key]).to(named[key]) for key in work.correction}

    def before_step(*_: object) -> None:
        for key, parameter in named.items():
            if parameter.grad is None:
                continue
            if strength:
                parameter.grad.add_(parameter.detach() - starts[key], alpha=strength)
            if key in corrections:
                parameter.grad.add_(corrections[key])

    optimizer.register_step_pre_hook(before_step)


def _zero_gradients(model: LoadedModel) -> frozenset[str]:
    """Returns the trained tensors whose gradient exists and is exactly zero: A, while B is zero."""
    return frozenset(
        key
        for key, parameter in model.adapter.parameters.items()
        if parameter.requires_grad
        and parameter.grad is not None
        and not bool(parameter.grad.any())
        and ".lora_A." in key
    )
