"""Tests of sums as whole numbers modulo 2^32."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedslm.errors import FederationError
from fedslm.privacy.encoding import COARSE_BITS, coarse_bits, decoded, encoded, grid_of

INSIDE = st.integers(-(2**30), 2**30)


@given(st.lists(st.tuples(INSIDE, st.integers(-(2**40), 2**40)), min_size=1, max_size=9), st.randoms())
def test_a_sum_of_encoded_vectors_decodes_to_the_sum(
    pairs: list[tuple[int, int]], order: object
) -> None:
    """Whatever each vector is modulo 2^32, and in any order, a sum that fits is read as it is."""
    total = sum(steps + noise for steps, noise in pairs)
    pairs.append((0, -total + total % 1000))  # now the sum fits
    order.shuffle(pairs)  # type: ignore[attr-defined]
    words = np.zeros(1, np.uint32)
    for steps, noise in pairs:
        words += encoded(np.array([float(steps)]), np.array([noise]))
    assert decoded(words).tolist() == [total % 1000]


@pytest.mark.parametrize("value", [0, 1, -1, 3 * 2**29, -3 * 2**29])
def test_what_fits_is_read(value: int) -> None:
    """Up to three quarters of 2^31 a number is read as it was."""
    assert decoded(encoded(np.array([value / 1]), np.zeros(1, np.int64))).tolist() == [value]


@pytest.mark.parametrize("value", [3 * 2**29 + 1, -3 * 2**29 - 1, 2**31, -(2**31), 2**31 + 2**29 - 1])
def test_what_may_have_wrapped_is_refused(value: int) -> None:
    """Nearer to the end, or a little beyond it, the sum is refused and not misread."""
    words = encoded(np.array([0.0, value / 1]), np.zeros(2, np.int64))
    with pytest.raises(FederationError, match="1 of 2 numbers"):
        decoded(words)


@pytest.mark.parametrize("clients", [1, 10, 100, 3_000])
@pytest.mark.parametrize("units", [1, 30, 1_000])
def test_a_grid_leaves_room_for_every_sum(clients: int, units: int) -> None:
    """Above the coarsest grid, gradients that all agree fill at most half of the range."""
    bits = coarse_bits(clients, units)
    if bits > 16:
        assert clients * units * 2 ** (bits + 1) <= 2**30
    if bits < COARSE_BITS:
        assert clients * units * 2 ** (bits + 2) > 2**30


@pytest.mark.parametrize("clip_norm", [1e-6, 0.3, 1.0, 1.5, 11.8])
def test_a_grid_is_a_power_of_two_below_the_clip_norm(clip_norm: float) -> None:
    """C / γ is between 2^bits and 2^(bits + 1), so multiplying by γ is exact."""
    grid = grid_of(clip_norm, 20)
    assert 2**20 <= clip_norm / grid < 2**21
    assert np.log2(grid) == np.rint(np.log2(grid))
