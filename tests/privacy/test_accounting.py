"""Tests of the accountant, against two of Opacus' that share no code with it, and against formulas."""

from __future__ import annotations

import itertools
import math
import random
import resource
import statistics
import time
import warnings

import pytest
from support.pace import patient

from fedslm.errors import PrivacyError
from fedslm.privacy.accounting import (
    adaptive_epsilon,
    cross_check,
    epsilon,
    group_epsilon,
    network_epsilon,
    true_positive_bound,
)
from fedslm.privacy.agreement import Accounts, check_agreement
from fedslm.privacy.calibration import affordable_steps, largest
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


@pytest.mark.parametrize("events", [*((each.values[0],) for each in TABLE), MIX])
def test_it_is_the_figure_of_dp_accountings_own_accountant(events: tuple[Event, ...]) -> None:
    """Steps that are composed from one that is kept give the very bits that PLDAccountant gives."""
    from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent, pld

    accountant = pld.PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, 1e-3)
    for event in sorted(events, key=lambda each: (each.sample_rate, each.noise_multiplier)):
        step = PoissonSampledDpEvent(event.sample_rate, GaussianDpEvent(event.noise_multiplier))
        accountant.compose(step, event.steps)
    assert epsilon(events, DELTA) == accountant.get_epsilon(DELTA)
    curve = [accountant.get_delta(each / 20) for each in range(241)]
    bound = min(1.0, *(math.exp(n / 20) * 0.1 + delta for n, delta in enumerate(curve)))
    assert true_positive_bound(events, 0.1) == pytest.approx(bound, rel=1e-12)


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


def gaussian_delta(spent: float, noise: float, sensitivity: float = 1.0) -> float:
    """Delta of the Gaussian mechanism at an epsilon (Balle and Wang 2018, theorem 8)."""

    def phi(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    scale = noise / sensitivity
    return phi(0.5 / scale - spent * scale) - math.exp(spent) * phi(-0.5 / scale - spent * scale)


@pytest.mark.parametrize(("noise", "steps"), [(2.0, 1), (0.7, 1), (5.0, 16), (20.0, 100)])
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-8])
def test_epsilon_is_the_gaussian_mechanisms_where_that_is_known(
    noise: float, steps: int, delta: float
) -> None:
    """Full-batch steps are one Gaussian mechanism with noise sigma / sqrt(steps): never below it."""
    spent = epsilon([Event(1.0, noise, steps)], delta)
    effective = noise / math.sqrt(steps)
    assert gaussian_delta(spent, effective) <= delta * 1.0001  # an upper bound on epsilon
    assert gaussian_delta(spent - 0.02, effective) > delta  # and no loose one


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


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, 1.5, math.nan])
def test_a_delta_out_of_range_is_refused(delta: float) -> None:
    """Delta is in (0, 1), also where nothing was spent."""
    for events in ([], [MIX[0]]):
        with pytest.raises(PrivacyError, match="delta"):
            epsilon(events, delta)


@pytest.mark.parametrize("delta", [0.1001, 0.5, 0.9])
def test_a_delta_that_protects_nobody_is_too_large(delta: float) -> None:
    """Above 0.1 every question is refused with the bound, rather than answered or blamed on accountants."""
    for ask in (epsilon, cross_check):
        with pytest.raises(PrivacyError, match=r"delta=0\.\d+ is too large: it must be at most 0\.1"):
            ask([MIX[0]], delta)


@pytest.mark.parametrize("delta", [1e-5, 0.01, 0.1])
def test_accountants_agree_where_nothing_is_spent(delta: float) -> None:
    """Where epsilon is 0 at a delta, the estimates below 0 of the other two say the same."""
    accounts = cross_check([Event(0.001, 20.0, 1)], delta)
    assert accounts.rdp >= accounts.pld - 1e-3
    assert all(each >= 0 for each in (accounts.pld, accounts.prv, accounts.rdp))


def test_two_more_accountants_check_the_number() -> None:
    """PLD is ours, PRV and RDP are what Opacus says."""
    accounts = cross_check(MIX, DELTA)
    assert accounts.pld == epsilon(MIX, DELTA)
    assert accounts.prv == pytest.approx(opacus("prv", MIX, DELTA), rel=1e-9)
    assert accounts.rdp == pytest.approx(opacus("rdp", MIX, DELTA), rel=1e-9)
    assert cross_check(iter(MIX[::-1]), DELTA) == accounts


def test_nothing_is_agreed_to_cost_nothing() -> None:
    """Without events all three are 0."""
    assert cross_check([], DELTA) == Accounts(0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    "accounts",
    [
        Accounts(pld=2.0, prv=2.0, rdp=1.99),
        Accounts(pld=2.0, prv=2.04, rdp=2.5),
        Accounts(pld=2.0, prv=1.96, rdp=2.5),
        Accounts(pld=100.0, prv=100.6, rdp=120.0),
        Accounts(pld=math.nan, prv=2.0, rdp=2.5),
        Accounts(pld=2.0, prv=math.nan, rdp=2.5),
        Accounts(pld=2.0, prv=2.0, rdp=math.nan),
        Accounts(pld=math.inf, prv=2.0, rdp=2.5),
        Accounts(pld=2.0, prv=None, rdp=1.99),
        Accounts(pld=math.nan, prv=None, rdp=2.5),
        Accounts(pld=math.inf, prv=None, rdp=2.5),
    ],
    ids=str,
)
def test_accountants_that_disagree_are_refused(accounts: Accounts) -> None:
    """RDP below PLD, PRV further off than 0.02 + 0.5 %, or no number: there is no figure to report."""
    with pytest.raises(PrivacyError, match="disagree"):
        check_agreement(accounts)


@pytest.mark.parametrize("rdp", [1000.1, math.inf, math.nan])
def test_two_accountants_agree_on_nothing_that_guarantees_nothing(rdp: float) -> None:
    """Without PRV too, an epsilon above 1,000 is refused with the bound."""
    with pytest.raises(PrivacyError, match=r"cannot be checked by two accountants: .* at most 1,000"):
        check_agreement(Accounts(900.0, None, rdp))


def test_what_pld_cannot_resolve_is_said() -> None:
    """So little a step that PLD's rounding adds up to more than RDP's bound: the remedy, not a conflict."""
    with pytest.raises(PrivacyError, match=r"rounds each step's loss .*; take fewer steps"):
        check_agreement(Accounts(pld=0.3013, prv=0.0373, rdp=0.1060))


@pytest.mark.parametrize(
    "accounts",
    [
        Accounts(2.0, 2.0, 2.0),
        Accounts(2.0, 2.029, 2.5),
        Accounts(2.0, 1.971, 2.5),
        Accounts(100.0, 100.5, 120.0),
        Accounts(0.0, 0.0, 0.0),
        Accounts(2.0, None, 2.5),
        Accounts(0.0, None, 0.0),
    ],
    ids=str,
)
def test_accountants_that_agree_pass(accounts: Accounts) -> None:
    """Equal figures, and PRV within 0.02 + 0.5 %, are agreement."""
    check_agreement(accounts)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_every_question_refuses_a_delta_out_of_range(delta: float) -> None:
    """Whichever figure is asked for, delta is in (0, 1)."""
    for ask in (
        lambda: cross_check([MIX[0]], delta),
        lambda: adaptive_epsilon([MIX[0]], delta, 8.0),
        lambda: group_epsilon([MIX[0]], delta, 2),
        lambda: network_epsilon([[MIX[0]]], delta, overlapping=True),
        lambda: affordable_steps(8.0, delta, MIX[0]),
    ):
        with pytest.raises(PrivacyError, match="delta"):
            ask()


@pytest.mark.parametrize(
    ("cap", "expected"), [(64, 12.283), (80, 6.275), (96, 2.792), (128, 2.652)], ids=str
)
def test_cutting_batches_would_cost_more(cap: int, expected: float) -> None:
    """Cutting Poisson batches at B costs 12.28 where uncut ones cost 2.65: why no plan cuts a batch."""
    from dp_accounting import NeighboringRelation, TruncatedSubsampledGaussianDpEvent, pld

    accountant = pld.PLDAccountant(NeighboringRelation.REPLACE_SPECIAL, 1e-3)  # zero-out
    event = TruncatedSubsampledGaussianDpEvent(2000, 64 / 2000, cap, 1.0)
    cut = float(accountant.compose(event, 150).get_epsilon(DELTA))
    uncut = epsilon([Event(64 / 2000, 1.0, 150)], DELTA)
    assert cut == pytest.approx(expected, abs=0.002)
    assert uncut == pytest.approx(2.652, abs=0.002)
    assert cut > uncut - 0.001


def test_disjoint_clients_cost_the_largest_and_overlapping_ones_compose() -> None:
    """Who is in one client pays for that one; who may be in all pays for all of them together."""
    clients = [[MIX[0]], [MIX[1], MIX[2]], []]
    alone = [epsilon(events, DELTA) for events in clients]
    assert network_epsilon(clients, DELTA, overlapping=False) == max(alone)
    together = network_epsilon(clients, DELTA, overlapping=True)
    assert together == epsilon(MIX, DELTA)
    assert max(alone) < together < sum(alone)
    for overlapping in (False, True):
        assert network_epsilon([], DELTA, overlapping=overlapping) == 0.0
        assert network_epsilon([[], []], DELTA, overlapping=overlapping) == 0.0


@pytest.mark.parametrize(
    ("target", "event"),
    [(3.0, Event(0.032, 0.946, 1)), (1.0, Event(0.05, 3.0, 1)), (2.0, Event(1.0, 4.0, 1))],
    ids=str,
)
def test_affordable_steps_are_exact(target: float, event: Event) -> None:
    """That many steps fit the budget, and one more does not."""
    steps = affordable_steps(target, DELTA, event)

    def cost(count: int) -> float:
        return epsilon([Event(event.sample_rate, event.noise_multiplier, count)], DELTA)

    assert cost(steps) <= target < cost(steps + 1)


def test_a_step_that_is_too_dear_is_not_affordable() -> None:
    """If not even one step fits, none is affordable; a budget that is no number affords none."""
    assert affordable_steps(0.1, DELTA, Event(1.0, 1.0, 1)) == 0
    assert affordable_steps(math.nan, DELTA, Event(0.05, 3.0, 1)) == 0


@pytest.mark.parametrize("most", [0, 1, 2, 3, 511, 512, 513, 999, 1000])
def test_the_largest_number_that_fits_is_found(most: int) -> None:
    """The search is exact, and asks about nothing below 1."""
    asked: list[int] = []
    assert largest(lambda number: asked.append(number) or number <= most, 1_000_000) == most
    assert min(asked) >= 1


def test_the_search_stops_at_its_limit() -> None:
    """If everything fits, the limit is the answer, and nothing above it is asked about."""
    asked: list[int] = []
    assert largest(lambda number: not asked.append(number), 1000) == 1000
    assert max(asked) <= 1000


@pytest.mark.parametrize(
    "events",
    [[Event(0.1, 1.0, 10_000_001)], [MIX[0], Event(0.1, 1.0, 9_999_999)], [Event(0.1, 0.04, 1)]],
)
def test_what_no_accountant_could_finish_is_refused(events: list[Event]) -> None:
    """Beyond ten million steps, or with next to no noise, there is an error rather than no end."""
    for ask in (epsilon, cross_check):
        with pytest.raises(PrivacyError, match="no accounting beyond"):
            ask(events, DELTA)


@pytest.mark.parametrize(
    "event", [Event(0.032, 0.1, 150), Event(1.0, 0.05, 1000), Event(0.01, 1.0, 1_000_000)], ids=str
)
def test_a_cross_check_that_would_take_gigabytes_is_refused_before(event: Event) -> None:
    """With next to no noise, or too many steps, the bound says so before memory is asked for."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(
        PrivacyError, match=r"cannot be checked by three accountants: .* raise noise_mult"
    ):
        cross_check([event], DELTA)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 * 1024  # kB


@pytest.mark.parametrize(
    "event", [Event(1.0, 0.05, 999_999), Event(1.0, 0.1, 200), Event(0.032, 0.05, 1000)], ids=str
)
def test_beyond_any_use_epsilon_is_a_bound_of_another_kind(event: Event) -> None:
    """Above 10,000 the figure is never below the exact one, costs no memory and grows with the steps."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    spent = epsilon([event], DELTA)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 * 1024  # kB
    assert spent > 10_000
    if event.sample_rate == 1.0:
        mean = event.steps / (2 * event.noise_multiplier**2)
        assert spent >= mean  # of the loss, below which epsilon at a small delta cannot be
    assert epsilon([event, Event(0.5, 1.0, 1)], DELTA) > spent


@pytest.mark.parametrize("rate", [0.001, 0.01, 0.1])
@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (3.0, 4)])
def test_no_attack_points_out_more_members(rate: float, noise: float, steps: int) -> None:
    """On the Gaussian mechanism the bound is the best attack there is (Neyman and Pearson), plus 2 %."""
    gaussian = statistics.NormalDist()
    best = gaussian.cdf(gaussian.inv_cdf(rate) + math.sqrt(steps) / noise)
    assert best <= true_positive_bound([Event(1.0, noise, steps)], rate) < best * 1.02


def test_the_bound_on_attacks_is_tighter_than_one_epsilon_gives() -> None:
    """The whole curve says more than epsilon at one delta, and less noise allows more."""
    spent = epsilon(MIX, DELTA)
    bound = true_positive_bound(MIX, 0.01)
    assert 0.01 < bound < math.exp(spent) * 0.01 + DELTA
    assert true_positive_bound([*MIX, MIX[1]], 0.01) > bound
    assert true_positive_bound([], 0.01) == 0.01
    assert true_positive_bound([Event(1.0, 0.1, 1)], 0.5) == pytest.approx(1.0)


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, math.nan])
def test_a_rate_of_false_alarms_out_of_range_is_refused(rate: float) -> None:
    """A rate is in (0, 1), also where nothing was spent."""
    for events in ([], MIX):
        with pytest.raises(PrivacyError, match="false_positive_rate"):
            true_positive_bound(events, rate)


@pytest.mark.slow
def test_a_hundred_different_rounds_are_accounted_in_time() -> None:
    """100 rounds of different rates and noise take less than 15 s, in any order, and PRV agrees."""
    rounds = [Event(0.01 + 0.0002 * n, 1.2 + 0.01 * n, 1 + n % 7) for n in range(100)]
    start = time.monotonic()
    together = epsilon(rounds, DELTA)
    assert time.monotonic() - start < patient(15)
    print(f"100 rounds: epsilon {together:.4f} in {time.monotonic() - start:.1f} s")
    random.Random(0).shuffle(rounds)
    assert epsilon(rounds, DELTA) == together
    assert abs(opacus("prv", tuple(rounds), DELTA) - together) <= 0.02 + 0.005 * together
    assert opacus("rdp", tuple(rounds), DELTA) >= together


@pytest.mark.slow
def test_a_composition_is_the_same_in_whichever_order_the_library_takes_it() -> None:
    """Composed one by one, backwards and forwards, dp-accounting gives our figure: sorting is safe."""
    from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent, pld

    for order in (MIX, MIX[::-1]):
        accountant = pld.PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, 1e-3)
        for event in order:
            step = PoissonSampledDpEvent(event.sample_rate, GaussianDpEvent(event.noise_multiplier))
            accountant.compose(step, event.steps)
        assert accountant.get_epsilon(DELTA) == pytest.approx(epsilon(MIX, DELTA), abs=1e-6)


@pytest.mark.slow
def test_an_epsilon_of_hundreds_is_still_a_number() -> None:
    """Far beyond any use the figure is finite, and below what RDP says."""
    event = Event(0.1, 0.3, 1000)
    spent = epsilon([event], DELTA)
    assert spent == pytest.approx(506.2, abs=0.2)
    assert opacus("rdp", (event,), DELTA) == pytest.approx(536.7, abs=0.5)
