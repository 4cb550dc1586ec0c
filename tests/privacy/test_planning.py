"""What a budget buys a whole client: no amplification by sampling, against closed forms."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from fedslm.errors import PrivacyError
from fedslm.privacy.planning import BudgetQuery, plan_budget

CLIENT = BudgetQuery(1.0, 1e-5, steps=50, noise_multiplier=8.0, unit="client")


def gaussian_epsilon(noise: float, releases: int, delta: float) -> float:
    """Epsilon of Gaussian releases of sensitivity 1 (Balle and Wang 2018, theorem 8; Dong et al. 2022)."""
    mu = math.sqrt(releases) / noise

    def excess(epsilon: float) -> float:
        near, far = norm.cdf(mu / 2 - epsilon / mu), norm.logcdf(-mu / 2 - epsilon / mu)
        return float(near - math.exp(epsilon + far) - delta)

    return float(brentq(excess, 0.0, 200.0, xtol=1e-9))


@pytest.mark.parametrize(("noise", "rounds"), [(8.0, 50), (5.0, 10), (2.0, 1)])
def test_a_clients_epsilon_is_that_of_the_rounds_that_it_joins(noise: float, rounds: int) -> None:
    """The worst case, a client in all of its rounds: the closed form of so many Gaussian releases."""
    found = plan_budget(replace(CLIENT, steps=rounds, noise_multiplier=noise))
    exact = gaussian_epsilon(noise, rounds, 1e-5)
    assert exact <= found.epsilon <= exact + 0.01
    assert (found.steps, found.rounds, found.sample_rate) == (rounds, rounds, 1.0)


def test_a_clients_noise_pays_for_all_its_rounds() -> None:
    """What is calibrated costs at most epsilon by the closed form, and a little less noise would not."""
    found = plan_budget(replace(CLIENT, noise_multiplier=None, epsilon=4.0))
    assert gaussian_epsilon(found.noise_multiplier, 50, 1e-5) <= 4.0
    assert gaussian_epsilon(found.noise_multiplier * 0.99, 50, 1e-5) > 4.0


def test_sampling_buys_a_client_nothing() -> None:
    """A sample rate below 1, or several steps in a round, is refused for a client: cohorts are public."""
    for changed in (replace(CLIENT, sample_rate=0.1), replace(CLIENT, steps_per_round=5)):
        with pytest.raises(PrivacyError, match="sampling protects no client"):
            plan_budget(changed)


@pytest.mark.parametrize("unit", ["clients", "Client", "none", ""])
def test_a_unit_that_is_none_is_refused(unit: Any) -> None:
    """A word that is almost "client" does not get the amplification by sampling that a client has not."""
    with pytest.raises(PrivacyError, match=r"unit='.*' must be record, user or client"):
        plan_budget(BudgetQuery(0.1, 1e-5, steps=10, noise_multiplier=4.0, unit=unit))


def test_a_delta_that_lets_everything_be_seen_is_warned_of() -> None:
    """With delta above the chance to be sampled at all, (0, delta) holds without any noise."""
    loose = plan_budget(BudgetQuery(1e-7, 1e-5, steps=2, noise_multiplier=1.0)).warnings
    assert any("the chance of a unit to join any of the 2 steps" in each for each in loose)
    assert not plan_budget(BudgetQuery(0.1, 1e-5, steps=2, noise_multiplier=1.0)).warnings


def test_a_plan_beyond_its_budget_is_warned_of() -> None:
    """Noise, steps and a budget that does not pay for them."""
    asked = BudgetQuery(0.1, 1e-5, steps=2, epsilon=0.5, noise_multiplier=1.0)
    assert any("is more than the budget, epsilon=0.5" in each for each in plan_budget(asked).warnings)
