"""Tests of a client's part of a sum: what one unit moves, how much noise there is, and a canary attack."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedslm.errors import PrivacyError
from fedslm.privacy.discrete import DiscreteGaussian
from fedslm.privacy.encoding import Words, decoded, grid_of
from fedslm.privacy.plan import ExamplePlan
from fedslm.privacy.shares import NoiseShares
from fedslm.training.noisy_optimizer import sharing_optimizer

HONEST = 2
PLAN = ExamplePlan(
    epsilon=1e6,
    delta=1e-5,
    clip_norm=0.7,
    noise_multiplier=1.0,
    sample_rate=1.0,
    normaliser=4,
    steps_per_round=1,
    shares=NoiseShares(threshold=3, max_colluding=1, grid_bits=20, protocol="ideal"),
)
CANARIES, TIMES = 4_000, 5
CHANCE = 1e-6


def part(plan: ExamplePlan, rows: torch.Tensor) -> Words:
    """One client's part of the sum, for these gradients of its units."""
    parameter = torch.nn.Parameter(torch.zeros(rows.shape[1]))
    optimizer = sharing_optimizer(torch.optim.SGD([parameter], lr=1.0), plan)
    parameter.grad_sample = rows.clone()  # type: ignore[attr-defined]
    optimizer.step()
    assert not parameter.detach().any()
    words: Words = optimizer.words
    return words


def summed(plan: ExamplePlan, clients: list[torch.Tensor]) -> np.ndarray:
    """The decoded sum over clients."""
    total = np.zeros(clients[0].shape[1], np.uint32)
    for rows in clients:
        total += part(plan, rows)
    return decoded(total)


@given(seed=st.integers(0, 2**32 - 1), units=st.integers(0, 6), length=st.floats(-6, 12))
@settings(max_examples=40, deadline=None)
def test_sums_of_neighbouring_federations_differ_by_at_most_the_sensitivity(
    seed: int, units: int, length: float
) -> None:
    """With the noise taken away, one unit more at one client moves the sum by at most C/γ steps, exactly."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(units + 1, 37, generator=generator) * 10**length
    other = torch.randn(3, 37, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiscreteGaussian, "draw", lambda self, count, variance: np.zeros(count, np.int64))
        with_it = summed(PLAN, [rows, other])
        without = summed(PLAN, [rows[:-1], other])
    moved = sum(int(step) ** 2 for step in with_it - without)
    reach = PLAN.clip_norm / grid_of(PLAN.clip_norm, 20)
    assert moved <= reach**2
    assert moved >= min(1.0, 10**length / 0.7 * 2) ** 2 * reach**2 * 0.2


def test_shares_add_up_to_the_noise_that_is_charged() -> None:
    """The variance of a sum of the honest parts is the plan's, to five standard errors."""
    empty = torch.zeros(0, 40_000)
    values = summed(PLAN, [empty] * HONEST) * grid_of(PLAN.clip_norm, 20) / PLAN.clip_norm
    assert abs(values.var() - 1) < 5 * math.sqrt(2 / 40_000)


def test_a_plan_with_all_of_the_noise_leaves_no_part() -> None:
    """Its own path adds the noise; a part of a sum would have less."""
    with pytest.raises(PrivacyError, match="shares no noise"):
        part(replace(PLAN, shares=None), torch.zeros(1, 3))


def lower_bound() -> float:
    """Attacks the sum of the honest parts with canaries; a lower bound on μ of Gaussian privacy.

    Each canary has its own coordinate and is in the data of one client or not, by a coin. The attacker
    sees the sum. True and false positive rates at one threshold are bounded by Clopper and Pearson.
    """
    generator = np.random.default_rng(0)
    reach = PLAN.clip_norm / grid_of(PLAN.clip_norm, 20)
    hits = alarms = members = others = 0
    for _ in range(TIMES):
        present = generator.random(CANARIES) < 0.5
        rows = torch.diag(torch.from_numpy(present * 5.0).float())[present]
        clients = list(torch.tensor_split(rows, HONEST))
        accused = summed(PLAN, clients) / reach > 0.5
        hits, members = hits + int((accused & present).sum()), members + int(present.sum())
        alarms, others = alarms + int((accused & ~present).sum()), others + int((~present).sum())
    missed = stats.beta.ppf(1 - CHANCE, members - hits + 1, hits)
    false = stats.beta.ppf(1 - CHANCE, alarms + 1, others - alarms)
    return float(stats.norm.ppf(1 - false) - stats.norm.ppf(missed))


def test_canaries_find_no_more_than_is_charged() -> None:
    """The noise multiplier is 1, so μ is 1; the attack comes near it, and not above."""
    assert 0.8 < lower_bound() <= 1


def test_canaries_see_a_share_for_one_node_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares as if one more node were honest: the noise of the honest ones is too little."""
    monkeypatch.setattr(
        NoiseShares, "honest_nodes", property(lambda own: own.threshold - own.max_colluding + 1)
    )
    assert lower_bound() > 1


def test_canaries_see_two_thirds_of_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each share with two thirds of its standard deviation."""
    draw = DiscreteGaussian.draw
    monkeypatch.setattr(
        DiscreteGaussian, "draw", lambda self, count, variance: draw(self, count, variance * 4 // 9)
    )
    assert lower_bound() > 1
