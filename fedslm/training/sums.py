"""Clipped gradients and their sum as integers on a public grid: exact, in any order.

The grid is γ = 2⁻³⁰ of the largest power of two that is at most the clip norm C, or a coarser one for a
sum modulo 2³² (:mod:`fedslm.privacy.encoding`). Integers are held in
float64, which adds whole numbers exactly up to 2⁵³. With Σ the sum on the grid and N the noise,
round((Σ + N) / γ) = Σ / γ + round(N / γ): what is released is post-processing of the Gaussian
mechanism, and no floating-point number ever holds data and noise together before it is rounded.

References:
    Mironov 2012; Casacuberta et al. 2022 (arXiv 2207.10635): attacks on sums and noise in floating
    point.
"""

from __future__ import annotations

import math

import torch

from fedslm.errors import PrivacyError
from fedslm.privacy.encoding import FINE_BITS, grid_of

MOST_UNITS = 2**22  # each adds at most 2^31 grid steps: the sum stays below 2^53
_ROOM = 1 - 2.0**-20  # share of the clip norm; the rest is reserved for rounding in float64
_LONGEST = 2.0**10  # clip norms; a longer gradient of one of several records is scaled down to this


def clipped(units: torch.Tensor, clip_norm: float, bits: int = FINE_BITS) -> torch.Tensor:
    """Clips each unit's gradient to an integer vector of norm at most ``clip_norm`` / γ.

    Formal guarantees:
        * For any finite float32 values, and any multiples of 2⁻³⁰ from :func:`on_grid`, of d <= 2^32
          numbers, and any grid: a result q consists of integers with ‖q‖·γ <= ``clip_norm`` = C
          exactly, rounding included. The sum over at most :data:`MOST_UNITS` units is exact in any
          order, so adding or removing one unit moves it by at most C.
        * A row of the result depends only on its own row of ``units``, if the device's elementwise
          operations and row sums do; the bit-proof of fixed shapes tests that.

    With u = 2⁻⁵³: squares of float32 are exact in float64, so the computed norm is right to (d/2 +
    1)·u; the quotient and the product round once each. Before it is rounded to the grid, a gradient is
    no longer than (C·(1 - 2⁻²⁰) - γ√d/2)·(1 + (d/2 + 4)·u) <= C - γ√d/2, since (d/2 + 4)·u < 2⁻²⁰.
    Rounding to the grid adds at most γ√d/2.

    Args:
        units: Shape (units, d), finite; float32 or float64.
        clip_norm: C.
        bits: The grid, see :func:`fedslm.privacy.encoding.grid_of`.

    Returns:
        Integers in float64, in steps of γ, shape (units, d); on the CPU if the device has no float64.

    Raises:
        PrivacyError: The grid is too coarse for so many values.
    """
    return clip_(double(units).clone(), clip_norm, bits)


def clip_(units: torch.Tensor, clip_norm: float, bits: int) -> torch.Tensor:
    """The same in place, for float64: a new buffer for each pass costs more than the arithmetic."""
    grid = grid_of(clip_norm, bits)
    room = clip_norm * _ROOM - grid * math.sqrt(units.shape[1]) / 2
    if room <= 0:
        raise PrivacyError(f"a grid of {bits} bits is too coarse for {units.shape[1]:,} values")
    factors = (room / _norms(units)).clamp(max=1.0) / grid  # a norm of zero gives inf, and so 1
    return units.mul_(factors.unsqueeze(1)).round_()


def on_grid(records: torch.Tensor, clip_norm: float) -> torch.Tensor:
    """Rounds the gradients of single records to the grid, so that a unit's sum is exact in any order.

    Formal guarantees:
        * The sum of at most 2¹¹ rows (:data:`fedslm.privacy.plan.MOST_RECORDS_PER_UNIT`) is exact in
          float64, in any order.
        * A gradient longer than 2¹⁰ clip norms is scaled down to that length: a unit's sum cannot
          overflow, and one record cannot be lost in the rounding of another.

    Args:
        records: Shape (records, d), finite float32.
        clip_norm: C.

    Returns:
        Multiples of γ in float64, shape (records, d).
    """
    exact, grid = double(records), grid_of(clip_norm)
    factors = (_LONGEST * clip_norm / _norms(exact)).clamp(max=1.0) / grid
    return (exact * factors.unsqueeze(1)).round_().mul_(grid)


def zero_non_finite(rows: torch.Tensor) -> torch.Tensor:
    """Zeroes, in place, every row that has a NaN or an infinity.

    Args:
        rows: Shape (rows, d).

    Returns:
        Number of rows that were zeroed, as a tensor on their device: reading it would wait for a GPU.
    """
    # The largest and the smallest value show every NaN and infinity, and need no buffer.
    bad = ~(torch.isfinite(rows.amax(dim=1)) & torch.isfinite(rows.amin(dim=1)))
    rows.masked_fill_(bad.unsqueeze(1), 0.0)
    return bad.sum()


def double(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the same values in float64, on the CPU if they are on an Apple GPU (no float64)."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).detach().double()


def _norms(rows: torch.Tensor) -> torch.Tensor:
    """Returns the L2 norm of each row of float64 values."""
    norms: torch.Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms
