"""One optimizer step on a logical batch: plain, or DP-SGD through Opacus.

Which one runs is decided by the plan's type in :func:`stepping`, and nowhere else.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch

from fedslm.errors import TrainingError
from fedslm.models.loaded import LoadedModel
from fedslm.privacy.gaussian import GaussianNoise
from fedslm.privacy.plan import ExamplePlan, Plan
from fedslm.tasks.base import Example, Task
from fedslm.training.batches import forward, micro_batches

if TYPE_CHECKING:
    from opacus.optimizers import DPOptimizer


logger = logging.getLogger(__name__)  # the client's own log


class Step(Protocol):
    """Takes one optimizer step on a logical batch."""

    def __call__(self, examples: Sequence[Example]) -> None:
        """Moves the parameters."""


class PlainStep:
    """The mean gradient over the logical batch.

    Args:
        model: The model.
        task: The loss.
        optimizer: Over the trained parameters.
        micro_batch_size: Most records in one forward pass.
    """

    def __init__(
        self,
        model: LoadedModel,
        task: Task,
        optimizer: torch.optim.Optimizer,
        micro_batch_size: int,
    ) -> None:
        self._model, self._task = model, task
        self._optimizer, self._micro_batch_size = optimizer, micro_batch_size

    def __call__(self, examples: Sequence[Example]) -> None:
        """Moves the parameters."""
        self._optimizer.zero_grad(set_to_none=True)
        for part in micro_batches(examples, self._micro_batch_size):
            logits, batch = forward(self._model, self._task, part)
            loss = self._task.per_example_loss(logits, batch).sum() / len(examples)
            loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()


class PrivateStep:
    """Clipped per-record gradients, summed, noised and divided by a public constant.

    Formal guarantees:
        * The pre-noise sum moves by at most ``plan.clip_norm`` (L2, over all trained parameters
          jointly) when one record is added or removed: one clip per record, losses not coupled.
        * Clipping is done in float32, whatever the precision of the base.
        * A record whose gradient is not finite or cannot be computed contributes exactly zero.
        * An empty batch adds the same noise as any other.
        * Noise comes from operating-system entropy, on its own generator for each round.

    Args:
        model: The model, with Opacus hooks attached.
        task: The per-example loss.
        optimizer: Opacus' optimizer.
        micro_batch_size: Most records in one forward pass.
    """

    def __init__(
        self, model: LoadedModel, task: Task, optimizer: DPOptimizer, micro_batch_size: int
    ) -> None:
        self._model, self._task = model, task
        self._optimizer, self._micro_batch_size = optimizer, micro_batch_size

    def __call__(self, examples: Sequence[Example]) -> None:
        """Moves the parameters."""
        parts = list(micro_batches(examples, self._micro_batch_size))
        self._optimizer.zero_grad(set_to_none=True)
        if not parts:
            self._no_gradients()
            self._optimizer.step()
        for position, part in enumerate(parts, start=1):
            self._gradients(part)
            self._optimizer.signal_skip_step(do_skip=position < len(parts))
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)

    def _gradients(self, part: Sequence[Example]) -> None:
        """Fills ``grad_sample`` with one finite gradient per record.

        If the batch cannot be computed, each record is tried alone, and one that cannot be computed
        counts as zero: what a record does to the computation moves the sum by no more than any record.
        """
        try:
            samples = self._attempt(part)
        except (RuntimeError, ValueError, IndexError, MemoryError):
            samples = self._one_by_one(part)
        zeroed = zero_non_finite(samples)
        if zeroed:
            logger.warning("%d record(s) of a batch had a gradient that is not finite", zeroed)
        for parameter, sample in zip(self._optimizer.params, samples, strict=True):
            parameter.grad_sample = sample

    def _attempt(self, part: Sequence[Example]) -> list[torch.Tensor]:
        """Per-record gradients of one batch, float32, each of shape (records, ...)."""
        logits, batch = forward(self._model, self._task, part)
        with warnings.catch_warnings():
            # Below the first adapted layer nothing needs gradients, nor do the hooks.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            self._task.per_example_loss(logits, batch).sum().backward()  # type: ignore[no-untyped-call]
        samples = [parameter.grad_sample for parameter in self._optimizer.params]
        if any(sample is None or len(sample) != len(part) for sample in samples):
            raise TrainingError(
                f"per-record gradients do not match the batch of {len(part)} records; a layer mixes "
                f"records or was not called"
            )
        return [sample.float() for sample in samples]

    def _one_by_one(self, part: Sequence[Example]) -> list[torch.Tensor]:
        """Per-record gradients of a batch that failed as a whole."""
        rows = []
        for record in part:
            forget_activations(self._model.adapter.network)
            try:
                rows.append(self._attempt([record]))
            except (RuntimeError, ValueError, IndexError, MemoryError):
                logger.warning("a record cannot be computed and counts as zero", exc_info=True)
                rows.append([p.new_zeros((1, *p.shape)) for p in self._optimizer.params])
        forget_activations(self._model.adapter.network)
        return [torch.cat(column) for column in zip(*rows, strict=True)]

    def _no_gradients(self) -> None:
        """Fills ``grad_sample`` for a batch of no records."""
        for parameter in self._optimizer.params:
            parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))


def forget_activations(network: torch.nn.Module) -> None:
    """Drops what a forward pass that never came back leaves behind in Opacus' hooks."""
    for module in network.modules():
        for name in ("activations", "max_batch_len"):
            module.__dict__.pop(name, None)  # some wrappers answer hasattr for what they wrap
    for parameter in network.parameters():
        if hasattr(parameter, "_forward_counter"):
            parameter._forward_counter = 0
        if hasattr(parameter, "_current_grad_sample"):
            del parameter._current_grad_sample
        if hasattr(parameter, "grad_sample"):
            parameter.grad_sample = None


def with_noise(optimizer: type[DPOptimizer]) -> type[DPOptimizer]:
    """Opacus' optimizer with noise from :class:`fedslm.privacy.gaussian.GaussianNoise`.

    torch's own CPU generator keeps 32 bits of its seed: few enough to try them all.
    """
    from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed

    class NoisyOptimizer(optimizer):  # type: ignore[misc]
        """Clips and sums as Opacus does; draws noise from the operating system's entropy."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self._noise = GaussianNoise()

        def add_noise(self) -> None:
            """Adds noise to each summed gradient, once."""
            stddev = self.noise_multiplier * self.max_grad_norm
            for parameter in self.params:
                _check_processed_flag(parameter.summed_grad)
                noise = torch.from_numpy(self._noise.draw(tuple(parameter.shape), stddev))
                noisy = parameter.summed_grad + noise.to(parameter.summed_grad)
                parameter.grad = noisy.view_as(parameter)
                _mark_as_processed(parameter.summed_grad)

    return NoisyOptimizer


def zero_non_finite(samples: Sequence[torch.Tensor]) -> int:
    """Zeroes, in place, every record whose gradient has a NaN or an infinity anywhere.

    Args:
        samples: One tensor of shape (batch, ...) for each parameter.

    Returns:
        Number of records that were zeroed. It stays with the client.
    """
    finite = torch.stack([torch.isfinite(s).flatten(1).all(dim=1) for s in samples]).all(dim=0)
    zeroed = int((~finite).sum())
    if zeroed:
        for sample in samples:
            sample[~finite] = 0
    return zeroed


@contextmanager
def stepping(
    model: LoadedModel,
    task: Task,
    plan: Plan,
    optimizer: torch.optim.Optimizer,
    micro_batch_size: int,
) -> Iterator[Step]:
    """Gives the step that a plan asks for, and detaches whatever it attached.

    Args:
        model: The model; its trained parameters are those that require gradients.
        task: The per-example loss.
        plan: The plan that will be charged.
        optimizer: Over the trained parameters.
        micro_batch_size: Most records in one forward pass.
    """
    if not isinstance(plan, ExamplePlan):
        yield PlainStep(model, task, optimizer, micro_batch_size)
        return
    from opacus.grad_sample.grad_sample_module import GradSampleHooks
    from opacus.optimizers import DPOptimizer

    network = model.adapter.network
    hooks = GradSampleHooks(network, batch_first=True, loss_reduction="sum")
    private = with_noise(DPOptimizer)(
        optimizer,
        noise_multiplier=plan.noise_multiplier,
        max_grad_norm=plan.clip_norm,
        expected_batch_size=plan.normaliser,
        loss_reduction="mean",
    )
    try:
        yield PrivateStep(model, task, private, micro_batch_size)
    finally:
        forget_activations(network)
        hooks.cleanup()
