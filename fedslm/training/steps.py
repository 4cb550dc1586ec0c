"""One optimizer step on a logical batch: plain, or DP-SGD through Opacus.

The plan's type decides which one runs; only :func:`stepping` makes that decision.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch

from fedslm.errors import TrainingError, plural
from fedslm.models.loaded import LoadedModel
from fedslm.privacy.gaussian import GaussianNoise
from fedslm.privacy.plan import Plan, PrivatePlan
from fedslm.tasks.base import Example, Task
from fedslm.training.batches import Unit, forward, micro_batches

if TYPE_CHECKING:
    from opacus.optimizers import DPOptimizer


logger = logging.getLogger(__name__)  # the client's own log
_ROOM = 1 - 2.0**-20  # share of the clip norm; the rest is reserved for rounding


class Step(Protocol):
    """Takes one optimizer step on a logical batch."""

    def __call__(self, units: Sequence[Unit]) -> None:
        """Moves the parameters by one step."""


class PlainStep:
    """A step along the mean gradient over the logical batch.

    Args:
        model: The model.
        task: The task with the loss.
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

    def __call__(self, units: Sequence[Unit]) -> None:
        """Moves the parameters by one step."""
        self._optimizer.zero_grad(set_to_none=True)
        count = sum(len(unit) for unit in units)
        for part in micro_batches(units, self._micro_batch_size):
            examples = [example for unit in part for example in unit]
            logits, batch = forward(self._model, self._task, examples)
            loss = self._task.per_example_loss(logits, batch).sum() / count
            loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()


class PrivateStep:
    """Clipped per-unit gradients, summed, noised and divided by a public constant.

    Formal guarantees:
        * The pre-noise sum moves by at most ``plan.clip_norm`` (L2, over all trained parameters
          jointly) when one unit is added or removed: the gradients of a unit's records are summed and
          clipped once, losses are not coupled. Each unit has its own pass, so that nothing else
          affects its gradient; with ``plan.batched`` this holds up to the rounding of shared passes.
        * The bound includes the rounding of clip and sum for up to 2^16 units in a sample, however they
          are split into micro-batches; :func:`clipped_sum` states the bound beyond that. Gradients are
          float32, whatever the precision of the base; norm, clip and sum are float64.
        * A record whose gradient is not finite or cannot be computed contributes exactly zero.
        * An empty batch adds the same noise as any other.
        * Noise is secure randomness, with a separate stream for each round; it is added in float64.

    Edge cases (the tests are in tests/training):
        * Empty batch: a sum of zero with the same noise. A skipped step would reveal that no unit was
          sampled, and the accountant charges one (test_an_empty_batch_is_noise_and_nothing_else).
        * A sample of one unit: divided by ``normaliser``, not by 1. A divisor that counts units would
          reveal how many there are (test_one_unit_is_divided_by_the_normaliser_too).
        * A gradient that is not finite: the record counts as zero, as does a unit whose sum overflows.
          0·inf is NaN: no clip factor would remove it (test_bad_records_leave_the_rest_of_a_patient,
          test_a_sum_that_overflows_contributes_zero).
        * A gradient of zero: C / 0 is infinite and is clamped to a factor of 1, which adds zero
          (test_a_gradient_of_zero_adds_zero).
        * The least clip norm, 1e-6: the bound holds. The denominator is only the norm: Opacus' norm +
          1e-6 would halve a gradient of 1e-6 (test_a_clipped_gradient_is_as_long_as_the_bound_allows).
        * A unit larger than a micro-batch: one pass, never split, since the clip applies to the sum
          over its records (test_sum_equals_autograd_clipped_once_per_patient).
        * A unit without records: plans never produce one. It raises before any pass
          (test_a_unit_without_records_is_refused).

    Args:
        model: The model, with Opacus hooks attached.
        task: The per-example loss.
        optimizer: Opacus' optimizer.
        micro_batch_size: Most records in one forward pass; with 1, each unit gets its own pass.
    """

    def __init__(
        self, model: LoadedModel, task: Task, optimizer: DPOptimizer, micro_batch_size: int
    ) -> None:
        self._model, self._task = model, task
        self.optimizer, self._micro_batch_size = optimizer, micro_batch_size

    def __call__(self, units: Sequence[Unit]) -> None:
        """Moves the parameters by one step."""
        parts = list(micro_batches(units, self._micro_batch_size))
        self.optimizer.zero_grad(set_to_none=True)
        if not parts:
            self._no_gradients()
            self.optimizer.step()
        for position, part in enumerate(parts, start=1):
            self._gradients(part)
            self.optimizer.signal_skip_step(do_skip=position < len(parts))
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def rehearse(self, example: Example) -> None:
        """Runs one made-up record, before anything is charged.

        Raises:
            TrainingError: This model has no per-record gradients.
        """
        self.optimizer.zero_grad(set_to_none=True)
        self._attempt([example])
        self.optimizer.zero_grad(set_to_none=True)

    def _gradients(self, part: Sequence[Unit]) -> None:
        """Fills ``grad_sample`` with one finite gradient per unit.

        If the batch cannot be computed, each record is tried separately, and one that cannot be
        computed counts as zero: a failing record moves the sum by no more than any other record.
        """
        records = [example for unit in part for example in unit]
        try:
            samples = self._attempt(records)
        except TrainingError:
            raise  # caused by the model, not by a record
        except Exception:  # a failing record must not be visible outside
            samples = self._one_by_one(records)
        zeroed = zero_non_finite(samples)
        if len(records) > len(part):
            samples = sum_by_unit(samples, [len(unit) for unit in part])
            zeroed += zero_non_finite(samples)  # a sum of finite numbers may overflow
        if zeroed:
            logger.warning("%s of a batch had a gradient that is not finite", plural(zeroed, "record"))
        for parameter, sample in zip(self.optimizer.params, samples, strict=True):
            parameter.grad_sample = sample

    def _attempt(self, part: Sequence[Example]) -> list[torch.Tensor]:
        """Computes the per-record gradients of one batch, float32, each of shape (records, ...)."""
        logits, batch = forward(self._model, self._task, part)
        with warnings.catch_warnings():
            # Below the first adapted layer nothing needs gradients; the hooks need none there either.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            self._task.per_example_loss(logits, batch).sum().backward()  # type: ignore[no-untyped-call]
        samples = [parameter.grad_sample for parameter in self.optimizer.params]
        rows = self._task.rows_per_example
        if any(sample is None or len(sample) != rows * len(part) for sample in samples):
            raise TrainingError(
                f"per-record gradients do not match the batch of {len(part)} records; a layer mixes "
                f"records or was not called"
            )
        samples = [sample.float() for sample in samples]
        return samples if rows == 1 else sum_by_unit(samples, [rows] * len(part))

    def _one_by_one(self, part: Sequence[Example]) -> list[torch.Tensor]:
        """Computes per-record gradients of a batch that failed as a whole."""
        rows = []
        for record in part:
            forget_activations(self._model.adapter.network)
            try:
                rows.append(self._attempt([record]))
            except TrainingError:
                raise
            except Exception:  # the failure depends only on the record; it counts as zero
                logger.warning("a record cannot be computed and counts as zero", exc_info=True)
                rows.append([p.new_zeros((1, *p.shape)) for p in self.optimizer.params])
        forget_activations(self._model.adapter.network)
        return [torch.cat(column) for column in zip(*rows, strict=True)]

    def _no_gradients(self) -> None:
        """Fills ``grad_sample`` for an empty batch."""
        for parameter in self.optimizer.params:
            parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))


def forget_activations(network: torch.nn.Module) -> None:
    """Removes what a failed forward pass leaves in Opacus' hooks."""
    for module in network.modules():
        for name in ("activations", "max_batch_len"):
            module.__dict__.pop(name, None)  # some wrappers forward hasattr to the module they wrap
    for parameter in network.parameters():
        if hasattr(parameter, "_forward_counter"):
            parameter._forward_counter = 0
        if hasattr(parameter, "_current_grad_sample"):
            del parameter._current_grad_sample
        if hasattr(parameter, "grad_sample"):
            parameter.grad_sample = None


def private_optimizer(optimizer: torch.optim.Optimizer, plan: PrivatePlan) -> DPOptimizer:
    """Returns Opacus' optimizer with the plan's clip, noise and normaliser."""
    from opacus.optimizers import DPOptimizer

    return with_noise(DPOptimizer)(
        optimizer,
        noise_multiplier=plan.noise_multiplier,
        max_grad_norm=plan.clip_norm,
        expected_batch_size=plan.normaliser,
        loss_reduction="mean",
    )


def with_noise(optimizer: type[DPOptimizer]) -> type[DPOptimizer]:
    """Returns Opacus' optimizer with its two weak parts replaced: the sum and the noise.

    Opacus adds clipped gradients up in float32, where n crafted ones let a single unit move the sum by
    C(1 + n²·2⁻²⁶): see :func:`clipped_sum`. torch's own CPU generator keeps 32 bits of its seed, few
    enough to try them all: see :class:`fedslm.privacy.gaussian.GaussianNoise`. Opacus still decides
    when a step is taken, and what the noisy sum is divided by.
    """
    from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed

    class NoisyOptimizer(optimizer):  # type: ignore[misc]
        """Clips and sums in float64; draws noise from secure randomness."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self._noise = GaussianNoise()

        def clip_and_accumulate(self) -> None:
            """Adds a micro-batch's clipped gradients to the sum, once."""
            totals = clipped_sum(self.grad_samples, self.max_grad_norm)
            for parameter, total in zip(self.params, totals, strict=True):
                _check_processed_flag(parameter.grad_sample)
                # Also in float64: the proof in clipped_sum counts the additions between micro-batches.
                before = parameter.summed_grad
                parameter.summed_grad = total if before is None else before + total
                _mark_as_processed(parameter.grad_sample)

        def add_noise(self) -> None:
            """Adds noise to each summed gradient, once, and rounds to the parameter's precision."""
            # σC on a sum of sensitivity C. Dividing it by a public constant is post-processing: the
            # accountant needs only σ.
            stddev = self.noise_multiplier * self.max_grad_norm
            for parameter in self.params:
                _check_processed_flag(parameter.summed_grad)
                noise = torch.from_numpy(self._noise.draw(tuple(parameter.shape), stddev))
                noisy = parameter.summed_grad.cpu() + noise
                parameter.grad = noisy.to(parameter).view_as(parameter)
                _mark_as_processed(parameter.summed_grad)

    return NoisyOptimizer


def clipped_sum(samples: Sequence[torch.Tensor], clip_norm: float) -> list[torch.Tensor]:
    """Clips each unit's gradient over all tensors jointly, and sums the units, in float64.

    Formal guarantees:
        * Let a sample hold n <= 2^16 units with finite float32 gradients of d <= 2^32 numbers, split
          into micro-batches in any way, and let the results be added in float64. Whatever the gradients
          are, adding or removing one unit moves the total by at most ``clip_norm`` = C (L2), rounding
          included. For n < 2^26 it moves by at most C(1 + (n² + d)·2⁻⁵³).

    With u = 2⁻⁵³: squares of float32 are exact in float64, so the computed norm is right to
    ((d - 1)/2 + 1)·u; the clip norm's room, the quotient and the product round once each. A clipped
    gradient is therefore no longer than (1 - 2⁻²⁰)·C·(1 + (d/2 + 4)·u). An addition whose result holds
    k units rounds by at most u·k·C: adding n units up, in whatever order, errs by at most
    (n² + n)/2·u·C, and the n - 1 of a neighbour by (n² - n)/2·u·C. One unit moves the total by at most
    (1 - 2⁻²⁰ + (n² + d/2 + 4)·u)·C to first order in u, and n² + d/2 + 4 is well below 2^33.

    Args:
        samples: One tensor of shape (units, ...) for each parameter.
        clip_norm: C.

    Returns:
        The sum for each parameter, float64; on the CPU if the device has no float64.
    """
    # One norm over all tensors: k tensors clipped to C one by one would have sensitivity C·√k.
    squares = sum(_double(sample).flatten(1).square().sum(dim=1) for sample in samples)
    factors = (clip_norm * _ROOM / torch.as_tensor(squares).sqrt()).clamp(max=1.0)
    return [torch.einsum("i,i...", factors, _double(sample)) for sample in samples]


def _double(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the same values in float64, on the CPU if they are on an Apple GPU (no float64)."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).detach().double()


def sum_by_unit(samples: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
    """Sums the per-record gradients of each unit.

    Args:
        samples: One tensor of shape (records, ...) for each parameter; a unit's records are adjacent.
        sizes: Number of records of each unit.

    Returns:
        One tensor of shape (units, ...) for each parameter.
    """
    device = samples[0].device
    owners = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(device)
    return [
        sample.new_zeros((len(sizes), *sample.shape[1:])).index_add_(0, owners, sample)
        for sample in samples
    ]


def zero_non_finite(samples: Sequence[torch.Tensor]) -> int:
    """Zeroes, in place, every record whose gradient has a NaN or an infinity anywhere.

    Args:
        samples: One tensor of shape (batch, ...) for each parameter.

    Returns:
        Number of records that were zeroed. It stays on the client.
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
    """Yields the step that a plan requires, and removes the hooks that it attached.

    Args:
        model: The model; its trained parameters are those that require gradients.
        task: The per-example loss.
        plan: The plan that will be charged.
        optimizer: Over the trained parameters.
        micro_batch_size: Most records in one forward pass.
    """
    if not isinstance(plan, PrivatePlan):
        yield PlainStep(model, task, optimizer, micro_batch_size)
        return
    from opacus.grad_sample.grad_sample_module import GradSampleHooks

    network = model.adapter.network
    hooks = GradSampleHooks(network, batch_first=True, loss_reduction="sum")
    # In a shared pass other records affect a record's padding, and so its rounding; a hostile adapter
    # amplifies that beyond the clip norm (tests/training/test_isolation.py).
    size = micro_batch_size if plan.batched else 1  # a pass never splits a unit
    try:
        yield PrivateStep(model, task, private_optimizer(optimizer, plan), size)
    finally:
        forget_activations(network)
        hooks.cleanup()
