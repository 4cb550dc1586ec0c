"""Tests of the accountant, against two of Opacus' that share no code with it."""

from __future__ import annotations

import itertools
import math
import warnings
from functools import lru_cache
from typing import Any

import pytest

from fedslm.errors import PrivacyError
from fedslm.privacy.accounting import calibrate, epsilon
from fedslm.records import Event

DELTA = 1e-5
MIX = (Event(0.01, 1.0, 50), Event(0.05, 2.0, 20), Event(0.02, 1.5, 30))

# (event, delta, epsilon): dp-accounting 0.6.0 PLD at intervals of 1e-4 and 1e-3, to three digits.
TABLE = [
    pytest.param(Event(256 / 10_000, 1.0, 117), 1e-5, 1.924, id="N=10k B=256 3 epochs"),
    pytest.param(Event(32 / 500, 1.0, 100), 1e-3, 2.894, id="N=500 B=32"),
    pytest.param(Event(1000 / 67_000, 0.8, 1340), 1e-5, 5.422, id="N=67k B=1000 20 epochs"),
    pytest.param(Event(1.0, 10.0, 50), 1e-5, 2.943, id="full batch"),
    pytest.param(Event(0.01, 20.0, 100), 1e-6, 0.021, id="tiny epsilon"),
    pytest.param(Event(0.01, 1.0, 1000), 1e-12, 3.910, id="tiny delta"),
]


def opacus(name: str, events: tuple[Event, ...], delta: float) -> float:
    """The same question to Opacus' "prv" or "rdp" accountant."""
    from opacus.accountants import create_accountant

    accountant = create_accountant(name)
    accountant.history = [(e.noise_multiplier, e.sample_rate, e.steps) for e in events]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(accountant.get_epsilon(delta))


@lru_cache
def noise_for(target: float) -> float:
    """Calibrated noise for N=2000, B=64, T=150."""
    return calibrate(target, DELTA, 64 / 2000, 150)


def test_golden() -> None:
    """N=10,000, B=256, 3 epochs, sigma 1: 1.92 by PLD; Opacus says 1.93 (PRV) and 2.34 (RDP)."""
    event = Event(256 / 10_000, 1.0, 117)
    assert round(epsilon([event], DELTA), 2) == 1.92
    assert round(opacus("prv", (event,), DELTA), 2) == 1.93
    assert round(opacus("rdp", (event,), DELTA), 2) == 2.34


@pytest.mark.parametrize(("event", "delta", "expected"), TABLE)
def test_three_accountants_agree(event: Event, delta: float, expected: float) -> None:
    """PLD is as tabulated, PRV is near it and RDP, which is looser, is never below it."""
    spent = epsilon([event], delta)
    assert spent == pytest.approx(expected, abs=0.001)
    assert abs(opacus("prv", (event,), delta) - spent) <= 0.02 + 0.005 * spent
    assert opacus("rdp", (event,), delta) >= spent


def test_different_events_compose() -> None:
    """Unequal rounds add up as in the other accountants: to more than each, to less than the sum."""
    together, alone = epsilon(MIX, DELTA), [epsilon([event], DELTA) for event in MIX]
    assert max(alone) < together < sum(alone)
    assert abs(opacus("prv", MIX, DELTA) - together) <= 0.02 + 0.005 * together
    assert opacus("rdp", MIX, DELTA) >= together


def test_order_and_grouping_do_not_matter() -> None:
    """However events are ordered or split into rounds, the number is the very same."""
    expected = epsilon(MIX, DELTA)
    assert {epsilon(order, DELTA) for order in itertools.permutations(MIX)} == {expected}
    split = [Event(e.sample_rate, e.noise_multiplier, e.steps // 10) for e in MIX for _ in range(10)]
    assert epsilon(split, DELTA) == expected
    assert epsilon(iter(split[::-1]), DELTA) == expected


def test_epsilon_is_the_gaussian_mechanisms_where_that_is_known() -> None:
    """One full-batch step is the Gaussian mechanism (Balle and Wang 2018, theorem 8)."""
    noise = 2.0

    def phi(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    spent = epsilon([Event(1.0, noise, 1)], DELTA)
    delta = phi(0.5 / noise - spent * noise) - math.exp(spent) * phi(-0.5 / noise - spent * noise)
    assert delta <= DELTA  # an upper bound on epsilon
    assert delta == pytest.approx(DELTA, rel=0.02)  # and no loose one


@pytest.mark.parametrize(
    "dearer",
    [
        [Event(0.02, 1.5, 31)],
        [Event(0.03, 1.5, 30)],
        [Event(0.02, 1.4, 30)],
        [Event(0.02, 1.5, 30), Event(0.001, 5.0, 1)],
    ],
    ids=["steps", "rate", "noise", "another event"],
)
def test_more_costs_more(dearer: list[Event]) -> None:
    """More steps, a higher rate, less noise or one more event cost more."""
    assert epsilon(dearer, DELTA) > epsilon([Event(0.02, 1.5, 30)], DELTA)


def test_a_smaller_delta_costs_more() -> None:
    """Epsilon falls as delta grows."""
    spent = [epsilon([Event(0.02, 1.5, 30)], delta) for delta in (1e-9, 1e-7, 1e-5, 1e-3)]
    assert spent == sorted(spent, reverse=True)
    assert len(set(spent)) == 4


def test_nothing_costs_nothing() -> None:
    """Without events epsilon is 0."""
    assert epsilon([], DELTA) == 0.0


@pytest.mark.parametrize(
    "values",
    [
        (0.01, 0.0, 1),
        (0.01, -1.0, 1),
        (0.01, math.nan, 1),
        (0.01, math.inf, 1),
        (0.0, 1.0, 1),
        (-0.01, 1.0, 1),
        (1.01, 1.0, 1),
        (math.nan, 1.0, 1),
        (0.01, 1.0, 0),
        (0.01, 1.0, -5),
        (0.01, 1.0, 2.5),
        (0.01, 1.0, math.nan),
        ("0.1", 1.0, 1),
        (0.1, None, 1),
        (0.1, 1.0, "1"),
        (True, 1.0, 1),
    ],
    ids=repr,
)
def test_an_event_that_means_nothing_cannot_be_made(values: tuple[Any, Any, Any]) -> None:
    """No accountant sees an event out of its range or of other types: it cannot be made."""
    with pytest.raises(PrivacyError, match="sample_rate"):
        Event(*values)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, 1.5, math.nan])
def test_a_delta_out_of_range_is_refused(delta: float) -> None:
    """Delta is in (0, 1), also where nothing was spent."""
    for events in ([], [MIX[0]]):
        with pytest.raises(PrivacyError, match="delta"):
            epsilon(events, delta)


@pytest.mark.parametrize(("target", "noise"), [(1.0, 1.744), (3.0, 0.946), (8.0, 0.639)])
def test_calibration_golden(target: float, noise: float) -> None:
    """N=2000, B=64, T=150, delta 1e-5: the noise that dp-accounting's own calibration gives."""
    assert noise_for(target) == pytest.approx(noise, abs=0.005)


@pytest.mark.parametrize("target", [1.0, 3.0, 8.0])
def test_calibration_never_exceeds_its_target(target: float) -> None:
    """The target is met, and with 0.002 less noise it would not be."""
    noise = noise_for(target)
    assert epsilon([Event(64 / 2000, noise, 150)], DELTA) <= target
    assert epsilon([Event(64 / 2000, noise - 0.002, 150)], DELTA) > target


@pytest.mark.parametrize(
    ("target", "rate", "steps"), [(0.1, 0.01, 10), (4.0, 0.1, 5), (2.0, 1.0, 3)], ids=str
)
def test_calibration_meets_odd_targets(target: float, rate: float, steps: int) -> None:
    """Small and large budgets and full batches are met too."""
    assert epsilon([Event(rate, calibrate(target, DELTA, rate, steps), steps)], DELTA) <= target


def test_a_target_out_of_reach_is_refused() -> None:
    """A budget that no noise meets is an error that says what to change, not an endless search."""
    with pytest.raises(PrivacyError, match="out of reach"):
        calibrate(0.001, DELTA, 1.0, 2000)


def test_a_target_that_is_no_number_is_refused() -> None:
    """NaN compares false with everything: calibrating to it must not come out as met."""
    with pytest.raises(PrivacyError):
        calibrate(math.nan, DELTA, 0.01, 10)
