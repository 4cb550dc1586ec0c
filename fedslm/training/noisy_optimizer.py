"""Opacus' optimizer with the sum and the noise on an integer grid.

Opacus decides when a step is taken, holds the per-record gradients, and divides the noisy sum by the
normaliser. The clip, the sum and the noise are ours: Opacus adds up in float32, where n crafted
gradients let one unit move the sum by C(1 + n²·2⁻²⁶), and torch's CPU generator keeps 32 bits of its
seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fedslm.errors import PrivacyError
from fedslm.privacy.discrete import DiscreteGaussian
from fedslm.privacy.encoding import FINE_BITS, Words, encoded, grid_of
from fedslm.privacy.gaussian import GaussianNoise
from fedslm.privacy.plan import PrivatePlan
from fedslm.training.sums import MOST_UNITS, clip_

if TYPE_CHECKING:
    from opacus.optimizers import DPOptimizer


def sharing_optimizer(optimizer: torch.optim.Optimizer, plan: PrivatePlan) -> DPOptimizer:
    """Returns Opacus' optimizer for one step whose sum leaves with a share of the noise.

    Formal guarantees:
        * After the step, ``words`` is Σ + Z modulo 2^32 in steps of the plan's grid, in the order of
          the parameters: Σ the exact sum of the units' clipped gradients, each of norm at most C / γ
          (:func:`~fedslm.training.sums.clipped`), and Z discrete Gaussian noise of the plan's variance
          from secure randomness. Nothing else of the step remains: the parameters do not move.

    Raises:
        PrivacyError: The plan shares no noise.
    """
    from opacus.optimizers import DPOptimizer
    from opacus.optimizers.optimizer import _mark_as_processed

    shares = plan.shares
    if shares is None:
        raise PrivacyError("this plan shares no noise")
    variance = shares.variance(plan.clip_norm, plan.noise_multiplier)

    class SharingOptimizer(with_noise(DPOptimizer)):  # type: ignore[misc]
        """Leaves the encoded sum in place of a gradient."""

        words: Words | None = None

        def add_noise(self) -> None:
            """Encodes the sum with this node's share of the noise, once."""
            total = self._sum.taken().cpu().numpy()
            self.words = encoded(total, DiscreteGaussian().draw(total.size, variance))
            for parameter in self.params:
                parameter.grad = parameter.summed_grad = torch.zeros_like(parameter)
                _mark_as_processed(parameter.summed_grad)

    return SharingOptimizer(
        optimizer,
        noise_multiplier=plan.noise_multiplier,
        max_grad_norm=plan.clip_norm,
        expected_batch_size=plan.normaliser,
        loss_reduction="mean",
        bits=shares.grid_bits,
    )


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
    """Returns Opacus' optimizer with clip, sum and noise replaced.

    Formal guarantees:
        * What a step releases is (Σ + Z)·γ, rounded to the parameters' precision and divided by the
          normaliser. Σ is the exact sum of the units' clipped gradients
          (:func:`~fedslm.training.sums.clipped`), and Z = round(N / γ) for Gaussian N of standard
          deviation σC from secure randomness. Σ is on the grid, so Σ + Z = round((Σγ + N) / γ):
          post-processing of the Gaussian mechanism that the plan charges.
        * A sample of more than :data:`~fedslm.training.sums.MOST_UNITS` units is refused: its sum could
          be inexact.
    """
    from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed

    class NoisyOptimizer(optimizer):  # type: ignore[misc]
        """Clips and sums on the grid; draws noise from secure randomness."""

        def __init__(self, *arguments: Any, bits: int = FINE_BITS, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self._sum = _NoisySum(self.params, self.noise_multiplier, self.max_grad_norm, bits)

        def clip_and_accumulate(self) -> None:
            """Adds the clipped gradients of some units to the sum, once."""
            for parameter in self.params:
                _check_processed_flag(parameter.grad_sample)
            self._sum.add(self.grad_samples)
            for parameter in self.params:
                _mark_as_processed(parameter.grad_sample)

        def add_noise(self) -> None:
            """Adds noise to the sum, once, and rounds to each parameter's precision."""
            # Dividing by a public constant is post-processing: the accountant needs only σ.
            self._sum.noise_multiplier = self.noise_multiplier
            for parameter, (exact, noisy) in zip(self.params, self._sum.released(), strict=True):
                parameter.summed_grad = exact.view_as(parameter)
                parameter.grad = noisy.to(parameter).view_as(parameter)
                _mark_as_processed(parameter.summed_grad)

    return NoisyOptimizer


class _NoisySum:
    """The sum of a step's clipped gradients, and its noise.

    Args:
        parameters: The trained tensors.
        noise_multiplier: σ.
        clip_norm: C.
        bits: The grid, see :func:`fedslm.privacy.encoding.grid_of`.
    """

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        noise_multiplier: float,
        clip_norm: float,
        bits: int,
    ) -> None:
        self._bits = bits
        self._sizes = [parameter.numel() for parameter in parameters]
        self.noise_multiplier, self._clip_norm = noise_multiplier, clip_norm
        self._noise, self._units = GaussianNoise(), 0
        self._total: torch.Tensor | None = None  # in steps of the grid
        self._rows = torch.empty((0, 0), dtype=torch.float64)  # room for one pass, used again

    def add(self, samples: Sequence[torch.Tensor]) -> None:
        """Clips units and adds them.

        Args:
            samples: For each parameter the gradients of the units, shape (units, ...).

        Raises:
            PrivacyError: The sample has too many units for an exact sum.
        """
        # One norm over all tensors: k tensors clipped to C one by one would have sensitivity C·√k.
        rows = self._joined(samples)
        self._units += len(rows)
        if self._units > MOST_UNITS:
            raise PrivacyError(
                f"a sample has {self._units} units; it may have {MOST_UNITS}: lower sample_rate"
            )
        total = clip_(rows, self._clip_norm, self._bits).sum(dim=0)
        self._total = total if self._total is None else self._total + total

    def taken(self) -> torch.Tensor:
        """Returns the exact sum in steps of the grid, and begins the next sum.

        Raises:
            PrivacyError: Nothing was added.
        """
        if self._total is None:
            raise PrivacyError("noise was asked for before a sum: the step is out of order")
        total, self._total, self._units = self._total, None, 0
        return total

    def released(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields each parameter's exact and noisy sum in float64, and begins the next sum.

        Raises:
            PrivacyError: Nothing was added.
        """
        grid, total = grid_of(self._clip_norm, self._bits), self.taken()
        noise = self._noise.draw(tuple(total.shape), self.noise_multiplier * self._clip_norm)
        steps = torch.from_numpy(noise).to(total.device).div(grid).round_()
        exact, noisy = total * grid, (total + steps) * grid
        split = torch.functional.split
        yield from zip(split(exact, self._sizes), split(noisy, self._sizes), strict=True)

    def _joined(self, samples: Sequence[torch.Tensor]) -> torch.Tensor:
        """Copies each unit's gradients into one row of float64."""
        count, width = len(samples[0]), sum(self._sizes)
        if len(self._rows) < count or self._rows.shape[1] != width:
            device = "cpu" if samples[0].device.type == "mps" else samples[0].device
            self._rows = torch.empty((count, width), dtype=torch.float64, device=device)
        rows, start = self._rows[:count], 0
        for sample, size in zip(samples, self._sizes, strict=True):
            rows[:, start : start + size].copy_(sample.detach().flatten(1))
            start += size
        return rows
