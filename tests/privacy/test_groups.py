"""Tests of what a run costs people with many records, and whoever may change its plan on the way."""

from __future__ import annotations

import math

import pytest
from support.pace import patient

from fedslm.errors import PrivacyError
from fedslm.privacy.accounting import adaptive_epsilon, epsilon, group_epsilon
from fedslm.privacy.calibration import affordable_steps
from fedslm.records import Event

DELTA = 1e-5
RUN = Event(64 / 2000, 1.0, 150)  # N=2000, B=64: epsilon 2.65 for one record
ORDERS = [1.5, 1.75, *range(2, 65), 80, 96, 128, 192, 256, 512]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (2, 5.77),
        (4, 12.89),
        pytest.param(8, 30.2, marks=pytest.mark.slow),
        pytest.param(16, 76.2, marks=pytest.mark.slow),
    ],
)
def test_several_records_cost_more_than_their_number(size: int, expected: float) -> None:
    """2, 4, 8, 16 records cost 5.8, 12.9, 30, 76 where one costs 2.65: "k times epsilon" is no bound."""
    one, group = epsilon([RUN], DELTA), group_epsilon([RUN], DELTA, size)
    assert one == pytest.approx(2.652, abs=0.002)
    assert group == pytest.approx(expected, rel=0.002)
    assert group > size * one


def test_a_group_of_one_is_a_record() -> None:
    """The mixture of one record is the sampled Gaussian mechanism itself, also over unequal rounds."""
    events = [Event(0.05, 2.0, 20), Event(0.02, 1.5, 30)]
    assert group_epsilon(events, DELTA, 1) == pytest.approx(epsilon(events, DELTA), abs=1e-4)


@pytest.mark.parametrize(("size", "steps"), [(1, 1), (2, 1), (3, 9)])
def test_in_full_batches_a_group_is_a_larger_sensitivity(size: int, steps: int) -> None:
    """At rate 1 a group of k is the Gaussian mechanism of sensitivity k (Balle and Wang 2018)."""
    noise = 6.0

    def phi(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    def delta(spent: float) -> float:
        scale = noise / (size * math.sqrt(steps))
        return phi(0.5 / scale - spent * scale) - math.exp(spent) * phi(-0.5 / scale - spent * scale)

    found = group_epsilon([Event(1.0, noise, steps)], DELTA, size)
    assert delta(found) <= DELTA * 1.0001
    assert delta(found - 0.02) > DELTA


def test_a_group_in_nothing_pays_nothing() -> None:
    """Without events nobody pays."""
    assert group_epsilon([], DELTA, 8) == 0.0


@pytest.mark.parametrize("size", [0, -1])
def test_a_group_of_nobody_is_refused(size: int) -> None:
    """A group has at least one record."""
    with pytest.raises(PrivacyError, match="group_size"):
        group_epsilon([RUN], DELTA, size)


def renyi(events: list[Event], order: float) -> float:
    """Epsilon of Opacus' Rényi accountant at one order."""
    from opacus.accountants.analysis import rdp

    curve = sum(
        rdp.compute_rdp(
            q=event.sample_rate,
            noise_multiplier=event.noise_multiplier,
            steps=event.steps,
            orders=[order],
        )[0]
        for event in events
    )
    return float(curve - (math.log(DELTA) + math.log(order)) / (order - 1) + math.log1p(-1 / order))


@pytest.mark.parametrize(("budget", "noise"), [(1.0, 2.0), (3.0, 1.0), (8.0, 1.0)])
def test_at_the_budget_the_filter_is_nearly_the_renyi_accountants(budget: float, noise: float) -> None:
    """A plan that spends its whole budget costs what Opacus' best Rényi order says, or a little more."""
    steps = affordable_steps(budget, DELTA, Event(0.032, noise, 1))
    spent = [Event(0.032, noise, steps)]
    best = min(renyi(spent, order) for order in ORDERS)
    filtered = adaptive_epsilon(spent, DELTA, budget)
    print(f"budget {budget}: {steps} steps; Renyi {best:.3f}, filter {filtered:.3f}")
    assert best * 0.999 <= filtered <= best * 1.1
    assert budget * 0.99 < epsilon(spent, DELTA) <= budget < best < budget * 1.35


@pytest.mark.parametrize(
    "events",
    [
        [Event(0.05, 2.0, 20)],
        [Event(0.05, 2.0, 20), Event(0.02, 1.0, 30)],
        [Event(0.02, 1.0, 30), Event(0.05, 2.0, 20)],
        [Event(1.0, 20.0, 1), Event(0.05, 0.8, 50)],
        [Event(0.01, 1.5, 1), Event(1.0, 3.0, 4), Event(0.1, 1.0, 10)],
    ],
    ids=len,
)
@pytest.mark.parametrize("budget", [0.5, 4.0])
def test_the_filter_is_an_upper_bound(events: list[Event], budget: float) -> None:
    """What holds for any adaptive choice is never below what holds for a fixed one."""
    assert adaptive_epsilon(events, DELTA, budget) >= epsilon(events, DELTA)


def test_the_order_is_fixed_by_the_first_event_and_the_budget() -> None:
    """Whatever comes later, one and the same Rényi order counts it: later choices cannot pick theirs."""
    first, budget = Event(0.05, 2.0, 20), 4.0
    tails = [[], [Event(0.02, 1.0, 30)], [Event(1.0, 9.0, 3)], [Event(0.001, 20.0, 5), first]]
    matching = [
        {
            order
            for order in ORDERS
            if renyi([first, *tail], order)
            == pytest.approx(adaptive_epsilon([first, *tail], DELTA, budget), rel=1e-6)
        }
        for tail in tails
    ]
    assert len(set.intersection(*matching)) == 1
    others = {adaptive_epsilon([first], DELTA, budget) for budget in (0.5, 4.0, 20.0)}
    assert len(others) == 3


def test_after_the_first_event_the_order_of_events_does_not_matter() -> None:
    """The filter's figure depends on the first event and on the sum of the others."""
    first, second, third = Event(0.05, 2.0, 20), Event(0.02, 1.0, 30), Event(1.0, 9.0, 3)
    one = adaptive_epsilon([first, second, third], DELTA, 4.0)
    assert adaptive_epsilon([first, third, second], DELTA, 4.0) == one
    halves = [Event(0.02, 1.0, 15)] * 2
    assert adaptive_epsilon([first, *halves, third], DELTA, 4.0) == pytest.approx(one, rel=1e-9)
    assert adaptive_epsilon([first, second], DELTA, 4.0) < one


@pytest.mark.timeout(patient(30))
def test_a_cheap_first_event_is_filtered_in_time() -> None:
    """A first event that a budget pays for millions of times does not stop the node for minutes."""
    assert adaptive_epsilon([Event(0.001, 5.0, 1), RUN], DELTA, 4.0) >= epsilon([RUN], DELTA)


def test_the_filter_counts_nothing_as_nothing() -> None:
    """Without events the filter is at 0."""
    assert adaptive_epsilon([], DELTA, 4.0) == 0.0
