"""Computes epsilon from events. The number of record comes from dp-accounting's PLD accountant.

Formal guarantees:
    * Adjacency is add-or-remove of one unit; the larger of both directions counts.
    * Poisson sampling at the event's rate and Gaussian noise at its multiplier, adaptively composed
      over all steps with parameters that are fixed beforehand; :func:`adaptive_epsilon` is for
      parameters that are not. There is no amplification by client sampling.
    * The privacy loss is discretised pessimistically: the result is an upper bound.
    * If a Rényi bound is above 10,000, that bound is the result: also an upper bound, and computed
      without large memory.
    * If nodes share the noise of any event, the number of record is the Rényi bound over whole orders.
      There the moments of the discrete Gaussian are those of the continuous one, since a shift by a
      whole vector maps the lattice to itself: E[exp(j·L)] = exp((j² - j)·|μ|² / 2S²). So Mironov's
      formula at a whole order is exact for the sampled discrete Gaussian.

References:
    Koskela et al. 2020 (arXiv 1906.03049); Doroshenko et al. 2022 (arXiv 2207.04380); Mironov et al.
    2019, the sampled Gaussian (arXiv 1908.10530); Canonne et al. 2020 (arXiv 2004.00010).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from fedslm.errors import OutOfRange, PrivacyError
from fedslm.extras import is_installed, missing
from fedslm.privacy import renyi
from fedslm.privacy.agreement import DISCRETISATION, Accounts, check_agreement, of_opacus
from fedslm.privacy.renyi import Groups, computing, whole_orders
from fedslm.privacy.shares import if_all_collude
from fedslm.records import LARGEST_DELTA, Event

_LEAST_MULTIPLIER = 0.05
_LARGEST_TIGHT = 10_000  # a larger epsilon guarantees nothing
_ROUGH_ORDERS = (2, 3, 4, 8, 16, 32, 64)
MOST_STEPS = 1_000_000
_NUMERIC = 1e-6

_EPSILON_GRID = tuple(step / 20 for step in range(241))  # 0 to 12
_ANY_DELTA = 1e-5  # only for grouping; delta has no effect there


def epsilon(events: Iterable[Event], delta: float) -> float:
    """Epsilon of all events together at ``delta``.

    Args:
        events: The charged events, in any order; an empty list gives 0.
        delta: In (0, 0.1].

    Returns:
        An upper bound on epsilon.

    Raises:
        PrivacyError: Delta is out of range, or the events are too many or too weakly noised to
            compute: more than a million steps, or noise below 0.05 clip norms.

    >>> epsilon([], 1e-5)
    0.0
    >>> round(epsilon([Event(256 / 10_000, 1.0, 117)], 1e-5), 2)
    1.92
    """
    events = tuple(events)
    grouped = _grouped(events, delta)
    return whole_orders(grouped, delta) if is_shared(events) else _pld(grouped, delta)


def is_shared(events: Iterable[Event]) -> bool:
    """Whether nodes share the noise of any of the events."""
    return any(event.honest_nodes is not None for event in events)


def epsilon_if_all_collude(events: Iterable[Event], delta: float) -> float:
    """Epsilon if every other node colludes: of noise that nodes share, only this node's share counts.

    Equal to :func:`epsilon` if no noise is shared. A share may be too weak for any guarantee: the
    result may be large, or infinite.

    >>> epsilon_if_all_collude([Event(1.0, 1e-3, 1, honest_nodes=100)], 1e-5) > 1e6
    True
    """
    events = if_all_collude(events)
    if not is_shared(events):
        return epsilon(events, delta)
    check_delta(delta)
    return whole_orders(_groups(events), delta)


def cross_check(events: Iterable[Event], delta: float, *, needs_prv: bool = True) -> Accounts:
    """Computes epsilon with three accountants and checks that they agree.

    For noise that nodes share, the accountants are compared on a continuous Gaussian, RDP at whole
    orders only; there two libraries must agree to 1e-6.

    Formal guarantees:
        * Returns only if RDP >= PLD (an upper bound is above a tight one) and
          |PRV - PLD| <= 0.02 + 0.5 %. An estimate below 0 counts as 0.
        * Without ``needs_prv``, and only if Opacus is not installed, returns if RDP >= PLD and
          RDP <= 1,000, and ``prv`` is None. An Opacus that is installed and fails is an error.
        * A computation that would need gigabytes of memory is refused before it starts.

    Args:
        events: The charged or planned events.
        delta: In (0, 0.1].
        needs_prv: False only for reports, never for what allows training.

    Raises:
        MissingPackage: Opacus is not installed, and ``needs_prv``.
        PrivacyError: The accountants disagree, one of them fails, or RDP exceeds 1,000.

    References:
        Gopi et al. 2021, PRV (arXiv 2106.02848); Mironov et al. 2019, RDP (arXiv 1908.10530).
    """
    events, has_prv = tuple(events), is_installed("opacus")
    grouped = _grouped(events, delta)
    if needs_prv and not has_prv:
        raise missing("opacus", "the check by three accountants")
    if not grouped:
        return Accounts(0.0, 0.0 if has_prv else None, 0.0)
    return _cross_checked(grouped, delta, is_shared(events))


def adaptive_epsilon(events: Sequence[Event], delta: float, budget: float) -> float:
    """Epsilon of events whose parameters may have been chosen adaptively, after earlier releases.

    A PLD is valid for parameters fixed beforehand. A Rényi filter is valid for any adaptive choice if
    its order is fixed beforehand: here only the first event and the budget determine it.

    Args:
        events: The charged events, in the order in which they were charged.
        delta: In (0, 0.1].
        budget: Epsilon that must not be exceeded, > 0.

    Returns:
        An upper bound on epsilon; the filter lets the events pass if it is at most ``budget``.

    References:
        Feldman and Zrnic 2021, individual privacy accounting via a Rényi filter (arXiv 2008.11193).
    """
    from dp_accounting.rdp import RdpAccountant

    grouped = _grouped(events, delta)
    if not grouped:
        return 0.0
    with computing(delta):
        accountant = RdpAccountant([renyi.order_of(events[0], delta, budget)])
        for rate, noise, count in grouped:
            accountant.compose(renyi.step(rate, noise), count)
        return float(accountant.get_epsilon(delta))


def group_epsilon(events: Iterable[Event], delta: float, group_size: int) -> float:
    """Epsilon for a person with ``group_size`` records in a run whose unit is the record.

    The number of the group's records in a Poisson sample is binomial, and each moves the sum by at most
    one clip norm: a mixture of Gaussians. This is tight; ``group_size * epsilon`` is not a bound. For
    noise that nodes share it is less tight: whenever one of the group is sampled, all count as sampled.
    Given that, the sample is a mixture over how many are. exp((α - 1)·D_α) is jointly convex, so both
    ways it is at most that of the largest shift, ``group_size`` clip norms.

    Args:
        events: The events charged at record level.
        delta: In (0, 0.1].
        group_size: Largest number of records of the person, >= 1.

    Raises:
        PrivacyError: A value is out of range.

    References:
        Charles et al. 2024 (arXiv 2407.07737).
    """
    if group_size < 1:
        raise OutOfRange(f"group_size={group_size} must be >= 1")
    events = tuple(events)
    if is_shared(events):
        return epsilon([_all_or_none(event, group_size) for event in events], delta)
    with computing(delta):
        return _group(_grouped(events, delta), delta, group_size)


def network_epsilon(clients: Sequence[Iterable[Event]], delta: float, *, overlapping: bool) -> float:
    """Epsilon of one unit in a network of clients.

    Args:
        clients: The events that each client charged.
        delta: In (0, 0.1].
        overlapping: False if no unit has records at two clients: then each unit is touched by only one
            client, and the largest epsilon counts. True composes all clients.

    >>> network_epsilon([[Event(1.0, 5.0, 1)], []], 1e-5, overlapping=False) < 1
    True
    """
    if overlapping:
        return epsilon([event for events in clients for event in events], delta)
    return max((epsilon(events, delta) for events in clients), default=0.0)


def true_positive_bound(events: Iterable[Event], false_positive_rate: float) -> float:
    """Upper bound on any membership inference attack's true positive rate at a false positive rate.

    The smallest of e^ε·FPR + δ(ε) over the whole privacy curve, so tighter than one (ε, δ) gives.

    Args:
        events: The charged events.
        false_positive_rate: In (0, 1).

    >>> true_positive_bound([], 0.01)
    0.01
    >>> round(true_positive_bound([Event(0.032, 0.946, 150)], 0.01), 2)
    0.04

    References:
        Kairouz et al. 2015 (arXiv 1311.0776), theorem 2.1.
    """
    if not 0 < false_positive_rate < 1:
        raise OutOfRange(f"false_positive_rate={false_positive_rate} must be in (0, 1)")
    events = tuple(events)
    grouped = _grouped(events, _ANY_DELTA)
    if not grouped:
        return false_positive_rate
    with computing(_ANY_DELTA):
        if is_shared(events):
            accountant = renyi.accountant_of(grouped, renyi.ORDERS)
            deltas = [accountant.get_delta(spent) for spent in _EPSILON_GRID]
        else:
            deltas = _composed(grouped).get_delta_for_epsilon(_EPSILON_GRID)
    curve = zip(_EPSILON_GRID, deltas, strict=True)
    return min(1.0, *(math.exp(spent) * false_positive_rate + float(delta) for spent, delta in curve))


def check_delta(delta: float) -> None:
    """Refuses a delta outside its range: a larger one would guarantee nothing.

    Raises:
        OutOfRange: It is not in (0, 0.1].
    """
    if not 0 < delta < 1:
        raise OutOfRange(f"delta={delta} must be in (0, {LARGEST_DELTA:g}]")
    if delta > LARGEST_DELTA:
        raise OutOfRange(
            f"delta={delta} is too large: it must be at most {LARGEST_DELTA:g}, and below 1/units to "
            f"protect anybody; use about 1/(10·units of the smallest client)"
        )


def _grouped(events: Iterable[Event], delta: float) -> Groups:
    """Groups steps that have the same parameters; their order does not matter."""
    check_delta(delta)
    grouped = _groups(events)
    too_many = sum(count for _, _, count in grouped) > MOST_STEPS
    if too_many or any(noise < _LEAST_MULTIPLIER for _, noise, _ in grouped):
        raise PrivacyError(
            f"no accounting beyond {MOST_STEPS:,} steps or below "
            f"noise_multiplier={_LEAST_MULTIPLIER}, which promises nothing"
        )
    return grouped


def _groups(events: Iterable[Event]) -> Groups:
    """Groups any steps that have the same parameters."""
    steps: Counter[tuple[float, float]] = Counter()
    for event in events:
        steps[float(event.sample_rate), float(event.noise_multiplier)] += event.steps
    return tuple(sorted((rate, noise, count) for (rate, noise), count in steps.items()))


def _all_or_none(event: Event, size: int) -> Event:
    """One step's cost for a group, all of which counts as sampled whenever one of it is."""
    rate = -math.expm1(size * math.log1p(-event.sample_rate)) if event.sample_rate < 1 else 1.0
    return replace(event, sample_rate=rate, noise_multiplier=event.noise_multiplier / size)


@lru_cache(maxsize=4096)
def _pld(grouped: Groups, delta: float) -> float:
    """Epsilon by privacy loss distributions; a Rényi bound if that bound is too large to be useful."""
    if not grouped:
        return 0.0
    with computing(delta):
        bound = renyi.bound(grouped, delta, _ROUGH_ORDERS)  # quick
        if bound > _LARGEST_TIGHT:
            return bound
        return float(_composed(grouped).get_epsilon_for_delta(delta))


def _composed(grouped: Groups) -> Any:
    """The privacy loss distribution of all events, composed as dp-accounting's PLDAccountant does."""
    from dp_accounting.pld.privacy_loss_distribution import identity

    composed = identity(DISCRETISATION)
    for rate, noise, count in grouped:
        composed = composed.compose(_of_one_step(rate, noise).self_compose(count))
    return composed


@lru_cache(maxsize=16)
def _of_one_step(rate: float, noise: float) -> Any:
    """The privacy loss distribution of one step, cached: a run needs the same one in each round."""
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    return from_gaussian_mechanism(
        noise,
        value_discretization_interval=DISCRETISATION,
        sampling_prob=rate,
        neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
    )


@lru_cache(maxsize=64)
def _group(grouped: Groups, delta: float, size: int) -> float:
    """Epsilon of a group by privacy loss distributions of Gaussian mixtures."""
    from dp_accounting import NeighboringRelation, pld
    from dp_accounting.dp_event import MixtureOfGaussiansDpEvent

    if not grouped:
        return 0.0
    accountant = pld.PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, DISCRETISATION)
    sensitivities = list(range(size + 1))
    for rate, noise, count in grouped:
        chances = [math.comb(size, k) * rate**k * (1 - rate) ** (size - k) for k in sensitivities]
        pairs = [(k, chance) for k, chance in zip(sensitivities, chances, strict=True) if chance > 0]
        used, probabilities = (list(column) for column in zip(*pairs, strict=True))
        accountant.compose(MixtureOfGaussiansDpEvent(noise, used, probabilities), count)
    return float(accountant.get_epsilon(delta))


@lru_cache(maxsize=256)
def _cross_checked(grouped: Groups, delta: float, shared: bool) -> Accounts:
    """Runs all accountants that are installed and compares them."""
    orders = renyi.ORDERS if shared else None
    with computing(delta):
        if is_installed("opacus"):
            history = [(noise, rate, count) for rate, noise, count in grouped]
            estimate, loose = of_opacus(history, delta, orders)
            accounts = Accounts(_pld(grouped, delta), estimate, loose)
        else:
            loose = max(0.0, renyi.bound(grouped, delta, orders))
            accounts = Accounts(_pld(grouped, delta), None, loose)
    check_agreement(accounts)
    if not shared:
        return accounts
    whole = whole_orders(grouped, delta)
    if not math.isclose(whole, accounts.rdp, rel_tol=_NUMERIC, abs_tol=_NUMERIC):
        raise PrivacyError(
            f"the accountants disagree: RDP at whole orders is {whole:.6f}, and {accounts.rdp:.6f} by "
            f"another library"
        )
    return replace(accounts, rdp=whole, of_record="RDP")
