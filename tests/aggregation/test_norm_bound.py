"""Tests of the norm bound."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedslm.aggregation.mean import WeightedMean
from fedslm.aggregation.norm_bound import NormBound, median_norm
from fedslm.records import AdapterState, ClientUpdate

NORMS = st.just(0.0) | st.floats(1e-30, 1e12)
SLACKS = st.floats(1, 20)


@settings(max_examples=25, deadline=None)
@given(slack=SLACKS, reference=NORMS, norm=NORMS)
def test_nothing_is_longer_than_the_bound(slack: float, reference: float, norm: float) -> None:
    """A scaled update is as long as it was or as the bound, whichever is shorter."""
    factor = NormBound(slack, reference).factor(norm)
    assert 0 <= factor <= 1
    assert factor * norm == pytest.approx(min(norm, slack * reference), rel=1e-12, abs=0)


@settings(max_examples=25, deadline=None)
@given(slack=SLACKS, norm=NORMS)
def test_without_a_reference_nothing_is_bounded(slack: float, norm: float) -> None:
    """Nothing is scaled down before there is a median."""
    assert NormBound(slack, None).factor(norm) == 1


def test_what_is_within_the_bound_is_not_touched() -> None:
    """Up to the bound itself the factor is exactly one, beyond it less."""
    bound = NormBound(3.0, 0.1)
    assert bound.factor(3.0 * 0.1) == 1.0
    assert bound.factor(0.0) == 1.0
    assert bound.factor(math.nextafter(3.0 * 0.1, 1)) < 1
    assert NormBound(3.0, 0.0).factor(0.0) == 1.0
    assert NormBound(3.0, 0.0).factor(5.0) == 0.0


@settings(max_examples=25, deadline=None)
@given(norms=st.lists(NORMS, min_size=1, max_size=30), seed=st.integers(0, 10**6))
def test_the_median_is_the_lower_one(norms: list[float], seed: int) -> None:
    """It is one of the norms; half of them at least are not above and half are not below it."""
    found = median_norm(norms)
    assert found in norms
    assert 2 * sum(norm <= found for norm in norms) >= len(norms)
    assert 2 * sum(norm >= found for norm in norms) > len(norms)
    order = np.random.default_rng(seed).permutation(len(norms))
    assert median_norm([norms[i] for i in order]) == found


@settings(max_examples=25, deadline=None)
@given(
    honest=st.lists(st.floats(0.5, 2), min_size=1, max_size=12),
    hostile=st.lists(st.sampled_from([0.0, 1e9, 1e30]), max_size=11),
    seed=st.integers(0, 10**6),
)
def test_a_minority_does_not_move_the_median_out(
    honest: list[float], hostile: list[float], seed: int
) -> None:
    """With fewer than half hostile the median lies within the honest norms."""
    norms = np.array(honest + hostile[: len(honest) - 1])
    np.random.default_rng(seed).shuffle(norms)
    assert min(honest) <= median_norm(list(norms)) <= max(honest)


@settings(max_examples=25, deadline=None)
@given(
    slack=SLACKS,
    size=st.sampled_from([1.0, 1e3, 1e6, 1e15]),
    weight=st.floats(0.1, 10),
    seed=st.integers(0, 99),
)
def test_one_update_moves_a_mean_by_its_share(
    slack: float, size: float, weight: float, seed: int
) -> None:
    """Beside clients that do not move, one hostile client moves the mean by its share of the bound."""
    row = (size * np.random.default_rng(seed).standard_normal(50)).astype(np.float32)
    update = AdapterState({"score.weight": row})
    bound = NormBound(slack, 1.0)
    mean = WeightedMean(update.shapes)
    mean.add(ClientUpdate(0, update, weight), bound.limit)
    for client in range(1, 5):
        mean.add(ClientUpdate(client, AdapterState({"score.weight": 0 * row}), 1.0))
    length = float(np.linalg.norm(row.astype(float)))
    expected = min(length, slack) * weight / (weight + 4)
    assert mean.result().norm() == pytest.approx(expected, rel=1e-4)
