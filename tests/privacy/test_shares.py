"""Tests of noise that nodes share: its accounting against direct summation, and its calibration."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from fedslm.errors import OutOfRange, PrivacyError
from fedslm.privacy import accounting, renyi
from fedslm.privacy.calibration import calibrate
from fedslm.privacy.encoding import grid_of
from fedslm.privacy.shares import NoiseShares, if_all_collude, least_honest, log_closeness
from fedslm.records import Event

SHARES = NoiseShares(threshold=7, max_colluding=2, grid_bits=20, protocol="ideal")


def log_moment(order: int, rate: float, variance: float, shift: int) -> tuple[float, float]:
    """Log moments of the sampled discrete Gaussian by summation over the lattice, both directions.

    P is (1 - q)·N_Z(0, S²) + q·N_Z(shift, S²) and Q is N_Z(0, S²): log E_Q[(P/Q)^α] and log E_P[(Q/P)^α].
    """
    reach = int(60 * math.sqrt(variance)) + 40 * shift
    support = np.arange(-reach, reach + 1, dtype=np.float64)
    base = -(support**2) / (2 * variance)
    log_q = base - np.logaddexp.reduce(base)
    log_shift = (2 * support * shift - shift**2) / (2 * variance)
    log_p = log_q + np.logaddexp(math.log1p(-rate) if rate < 1 else -np.inf, math.log(rate) + log_shift)
    return (
        float(np.logaddexp.reduce(order * log_p + (1 - order) * log_q)),
        float(np.logaddexp.reduce(order * log_q + (1 - order) * log_p)),
    )


@pytest.mark.parametrize("order", [2, 3, 8, 32])
@pytest.mark.parametrize("rate", [0.05, 0.5, 1.0])
@pytest.mark.parametrize(("stddev", "shift"), [(0.5, 1), (2.0, 3), (16.0, 9), (64.0, 50)])
def test_whole_orders_are_exact_for_the_discrete_gaussian(
    order: int, rate: float, stddev: float, shift: int
) -> None:
    """Rényi divergence at a whole order is that of the continuous Gaussian; the other way is no larger."""
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant([order])
    accountant.compose(renyi.step(rate, stddev / shift), 1)
    counted = float(accountant._rdp[0]) * (order - 1)
    added, removed = log_moment(order, rate, stddev**2, shift)
    assert added == pytest.approx(counted, rel=1e-9, abs=1e-10)
    assert removed <= added + 1e-10


def test_a_fractional_order_is_not_exact() -> None:
    """Power: a discrete Gaussian on few steps of the grid differs from the continuous one there."""
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant([1.5])
    accountant.compose(renyi.step(1.0, 0.25), 1)
    support = np.arange(-60.0, 61.0)
    base = -(support**2) / (2 * 0.25**2)
    log_q = base - np.logaddexp.reduce(base)
    log_p = log_q + (2 * support - 1) / (2 * 0.25**2)
    direct = float(np.logaddexp.reduce(1.5 * log_p - 0.5 * log_q)) / 0.5
    assert abs(direct - float(accountant._rdp[0])) > 1e-3


@pytest.mark.parametrize(
    ("rate", "steps", "target"), [(1.0, 1, 1.0), (1.0, 16, 0.5), (1.0, 16, 8.0), (0.1, 500, 1.0)]
)
def test_the_number_of_record_is_between_pld_and_a_third_more(
    rate: float, steps: int, target: float
) -> None:
    """PLD of the continuous Gaussian <= RDP at whole orders <= 1.35 times PLD."""
    noise = calibrate(target, 1e-5, rate, steps, honest_nodes=4)
    event = Event(rate, noise, steps, honest_nodes=4)
    tight = accounting.epsilon([Event(rate, noise, steps)], 1e-5)
    assert tight <= accounting.epsilon([event], 1e-5) <= 1.35 * tight
    accounts = accounting.cross_check([event], 1e-5)
    assert accounts.of_record == "RDP"
    assert accounts.epsilon == accounting.epsilon([event], 1e-5)
    assert accounts.pld == pytest.approx(tight)


@pytest.mark.parametrize(("rate", "steps", "target"), [(1.0, 16, 1.0), (0.2, 50, 3.0)])
def test_the_noise_is_the_smallest_that_keeps_epsilon(rate: float, steps: int, target: float) -> None:
    """The calibrated noise keeps the target; 0.003 less does not."""
    noise = calibrate(target, 1e-5, rate, steps, honest_nodes=3)
    assert accounting.epsilon([Event(rate, noise, steps, 3)], 1e-5) <= target
    assert accounting.epsilon([Event(rate, noise - 0.003, steps, 3)], 1e-5) > target


def test_wrong_figures_of_another_library_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the two libraries differ at whole orders, no epsilon is reported."""
    monkeypatch.setattr(accounting, "whole_orders", lambda grouped, delta: 1.0)
    accounting._cross_checked.cache_clear()
    with pytest.raises(PrivacyError, match="disagree"):
        accounting.cross_check([Event(1.0, 3.0, 2, honest_nodes=5)], 1e-5)


def test_a_ledger_with_both_kinds_counts_both() -> None:
    """Shared and unshared noise compose to more than either, and to no less than the tight figure."""
    shared, own = Event(1.0, 8.0, 4, honest_nodes=5), Event(0.1, 1.5, 20)
    both = accounting.epsilon([shared, own], 1e-5)
    assert both > max(accounting.epsilon([each], 1e-5) for each in (shared, own))
    assert both >= accounting.epsilon([Event(1.0, 8.0, 4), own], 1e-5)


def test_a_node_without_others_has_the_root_of_its_share() -> None:
    """If everybody else colludes, σ/√m counts; nothing changes for noise that is not shared."""
    shared, own = Event(1.0, 8.0, 4, honest_nodes=4), Event(0.1, 1.5, 20)
    assert if_all_collude([shared, own]) == (Event(1.0, 4.0, 4, honest_nodes=1), own)
    assert accounting.epsilon_if_all_collude([shared], 1e-5) == accounting.epsilon(
        [Event(1.0, 4.0, 4, 1)], 1e-5
    )
    assert accounting.epsilon_if_all_collude([own], 1e-5) == accounting.epsilon([own], 1e-5)
    assert least_honest([own]) is None


@pytest.mark.parametrize("size", [2, 5])
def test_a_group_is_bounded_from_above(size: int) -> None:
    """For a group the bound is at least the tight mixture, and of one record it is epsilon itself."""
    shared = Event(0.1, 12.0, 20, honest_nodes=4)
    loose = accounting.group_epsilon([shared], 1e-5, size)
    assert loose >= accounting.group_epsilon([Event(0.1, 12.0, 20)], 1e-5, size)
    assert accounting.group_epsilon([shared], 1e-5, 1) == pytest.approx(
        accounting.epsilon([shared], 1e-5), rel=1e-6
    )


def test_an_attackers_success_is_bounded_from_above() -> None:
    """The bound on a true positive rate is at least that of the continuous Gaussian."""
    events = [Event(1.0, 6.0, 4, honest_nodes=4)]
    tight = accounting.true_positive_bound([Event(1.0, 6.0, 4)], 0.01)
    assert 0.01 < tight <= accounting.true_positive_bound(events, 0.01) < 1


@pytest.mark.parametrize("stddev", [0.4, 0.5, 0.7])
@pytest.mark.parametrize("nodes", [2, 5])
def test_a_sum_of_shares_is_nearly_one_discrete_gaussian(stddev: float, nodes: int) -> None:
    """By direct convolution every probability of the sum is within e^±τ of one discrete Gaussian's."""
    support = np.arange(-40.0, 41.0)
    share = np.exp(-(support**2) / (2 * stddev**2))
    share /= share.sum()
    total = share
    for _ in range(nodes - 1):
        total = np.convolve(total, share)
    reach = (len(total) - 1) // 2
    one = np.exp(-(np.arange(-reach, reach + 1.0) ** 2) / (2 * nodes * stddev**2))
    one /= one.sum()
    near = slice(reach - 4, reach + 5)
    worst = float(np.abs(np.log(total[near]) - np.log(one[near])).max())
    assert 0 < worst <= math.exp(log_closeness(stddev**2, nodes))


def test_the_closeness_adds_nothing_to_epsilon() -> None:
    """At 16 steps of the grid and any number of nodes, values and steps, τ·d·T is below 10^-1000."""
    added = log_closeness(16**2, 2**20) + math.log(2 * 2**32 * accounting.MOST_STEPS)
    assert added < -1000 * math.log(10)


@pytest.mark.parametrize("clip_norm", [0.3, 1.0, 11.76])
@pytest.mark.parametrize("noise", [0.3, 3.7, 400.0])
def test_the_shares_add_up_to_the_noise(clip_norm: float, noise: float) -> None:
    """M shares have at least the variance that is charged, and at most one step of the grid² more each."""
    exact = (Fraction(noise) * Fraction(clip_norm) / Fraction(grid_of(clip_norm, 20))) ** 2
    together = 5 * SHARES.variance(clip_norm, noise)
    assert exact <= together < exact + 5


@pytest.mark.parametrize(
    "values",
    [
        {"threshold": 1, "max_colluding": 0},
        {"threshold": 3, "max_colluding": 2},
        {"threshold": 3, "max_colluding": -1},
        {"threshold": 3.0, "max_colluding": 0},
        {"threshold": 2**21, "max_colluding": 0},
        {"threshold": 3, "max_colluding": 1, "grid_bits": 8},
        {"threshold": 3, "max_colluding": 1, "protocol": "plain"},
        {"threshold": 3, "max_colluding": True},
    ],
)
def test_shares_that_guarantee_nothing_are_refused(values: dict[str, object]) -> None:
    """Fewer than two honest nodes, other types, other grids and unknown protocols are refused."""
    with pytest.raises(OutOfRange):
        NoiseShares(**{"grid_bits": 20, "protocol": "ideal", **values})  # type: ignore[arg-type]


def test_a_share_below_sixteen_steps_is_refused() -> None:
    """The proof that shares add up to a discrete Gaussian needs 16 steps of the grid."""
    shares = NoiseShares(2**20, 0, 16, "ideal")
    with pytest.raises(OutOfRange, match="16 or more"):
        shares.variance(1.0, 0.1)
