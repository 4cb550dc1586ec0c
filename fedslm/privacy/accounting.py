"""Computes epsilon from events. The number of record comes from dp-accounting's PLD accountant.

Formal guarantees:
    * Adjacency is add-or-remove of one unit; the larger of both directions counts.
    * Poisson sampling at the event's rate and Gaussian noise at its multiplier, adaptively composed
      over all steps with parameters that are fixed beforehand; :func:`adaptive_epsilon` is for
      parameters that are not. There is no amplification by client sampling.
    * The privacy loss is discretised pessimistically: the result is an upper bound.
    * If a Rényi bound is above 10,000, that bound is the result: also an upper bound, and computed
      without large memory.

References:
    Koskela et al. 2020 (arXiv 1906.03049); Doroshenko et al. 2022 (arXiv 2207.04380).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fedslm.errors import OutOfRange, PrivacyError
from fedslm.records import LARGEST_DELTA, Event

_DISCRETISATION = 1e-3
_TOLERANCE = 1e-3
_LEAST_MULTIPLIER = 0.05
_PRV_TOLERANCE = (0.02, 0.005)  # absolute, relative
_PRV_MESH = 0.01  # Opacus' default eps_error
_MOST_POINTS = 10_000_000  # of a PRV, at about 350 bytes each
_LARGEST_CHECKED, _LARGEST_TIGHT = 1_000, 10_000  # a larger epsilon guarantees nothing
_ROUGH_ORDERS = (2, 3, 4, 8, 16, 32, 64)
MOST_STEPS = 1_000_000
_NEARLY = 0.8
_MANY_STEPS = 10**9  # enough steps that no conversion is clamped to zero
_ORDERS = (*range(2, 65), 80, 96, 128, 192, 256, 512)

_EPSILON_GRID = tuple(step / 20 for step in range(241))  # 0 to 12
_ANY_DELTA = 1e-5  # only for grouping; delta has no effect there

Groups = tuple[tuple[float, float, int], ...]  # (sample_rate, noise_multiplier, steps), sorted


@dataclass(frozen=True)
class Accounts:
    """Epsilon of the same events by three accountants.

    The privacy losses of the steps add up: PLD and PRV convolve their distributions (PLD a pessimistic
    one). RDP adds the divergence of each order; the best order gives epsilon (Balle et al. 2020,
    arXiv 1905.09982).

    Attributes:
        pld: From dp-accounting's privacy loss distributions: the number of record.
        prv: From Opacus' privacy random variables: an estimate plus its error bound. Its domain comes
            from Opacus' Rényi accountant; the PLD shares no code with either.
        rdp: From Opacus' Rényi accountant: an upper bound, 10 to 25 % larger.
    """

    pld: float
    prv: float
    rdp: float


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
    return _pld(_grouped(events, delta), delta)


def cross_check(events: Iterable[Event], delta: float) -> Accounts:
    """Computes epsilon with three accountants and checks that they agree.

    Formal guarantees:
        * Returns only if RDP >= PLD (an upper bound is above a tight one) and
          |PRV - PLD| <= 0.02 + 0.5 %. An estimate below 0 counts as 0.
        * A computation that would need gigabytes of memory is refused before it starts.

    Args:
        events: The charged or planned events.
        delta: In (0, 0.1].

    Raises:
        PrivacyError: The accountants disagree, one of them fails, or RDP exceeds 1,000.

    References:
        Gopi et al. 2021, PRV (arXiv 2106.02848); Mironov et al. 2019, RDP (arXiv 1908.10530).
    """
    grouped = _grouped(events, delta)
    return _cross_checked(grouped, delta) if grouped else Accounts(0.0, 0.0, 0.0)


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
    with _computing(delta):
        accountant = RdpAccountant([_order(events[0], delta, budget)])
        for rate, noise, count in grouped:
            accountant.compose(_step(rate, noise), count)
        return float(accountant.get_epsilon(delta))


def group_epsilon(events: Iterable[Event], delta: float, group_size: int) -> float:
    """Epsilon for a person with ``group_size`` records in a run whose unit is the record.

    The number of the group's records in a Poisson sample is binomial, and each moves the sum by at most
    one clip norm: a mixture of Gaussians. This is tight; ``group_size * epsilon`` is not a bound.

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
    with _computing(delta):
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
    grouped = _grouped(events, _ANY_DELTA)
    if not grouped:
        return false_positive_rate
    with _computing(_ANY_DELTA):
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
    steps: Counter[tuple[float, float]] = Counter()
    for event in events:
        steps[float(event.sample_rate), float(event.noise_multiplier)] += event.steps
    if steps.total() > MOST_STEPS or any(noise < _LEAST_MULTIPLIER for _, noise in steps):
        raise PrivacyError(
            f"no accounting beyond {MOST_STEPS:,} steps or below "
            f"noise_multiplier={_LEAST_MULTIPLIER}, which promises nothing"
        )
    return tuple(sorted((rate, noise, count) for (rate, noise), count in steps.items()))


@lru_cache(maxsize=4096)
def _pld(grouped: Groups, delta: float) -> float:
    """Epsilon by privacy loss distributions; a Rényi bound if that bound is too large to be useful."""
    if not grouped:
        return 0.0
    with _computing(delta):
        bound = _rough(grouped, delta)
        if bound > _LARGEST_TIGHT:
            return bound
        return float(_composed(grouped).get_epsilon_for_delta(delta))


@contextmanager
def _computing(delta: float) -> Iterator[None]:
    """Turns any exception of an accountant into a PrivacyError: there is no epsilon then."""
    try:
        yield
    except PrivacyError:
        raise
    except Exception as error:
        raise PrivacyError(f"epsilon cannot be computed at delta={delta:g}: {error}") from error


def _rough(grouped: Groups, delta: float) -> float:
    """A quick upper bound on epsilon, from a few Rényi orders; infinity if none gives one."""
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(_ROUGH_ORDERS)
    for rate, noise, count in grouped:
        accountant.compose(_step(rate, noise), count)
    found = float(accountant.get_epsilon(delta))
    return math.inf if math.isnan(found) else found


def _composed(grouped: Groups) -> Any:
    """The privacy loss distribution of all events, composed as dp-accounting's PLDAccountant does."""
    from dp_accounting.pld.privacy_loss_distribution import identity

    composed = identity(_DISCRETISATION)
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
        value_discretization_interval=_DISCRETISATION,
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
    accountant = pld.PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, _DISCRETISATION)
    sensitivities = list(range(size + 1))
    for rate, noise, count in grouped:
        chances = [math.comb(size, k) * rate**k * (1 - rate) ** (size - k) for k in sensitivities]
        pairs = [(k, chance) for k, chance in zip(sensitivities, chances, strict=True) if chance > 0]
        used, probabilities = (list(column) for column in zip(*pairs, strict=True))
        accountant.compose(MixtureOfGaussiansDpEvent(noise, used, probabilities), count)
    return float(accountant.get_epsilon(delta))


@lru_cache(maxsize=256)
def _cross_checked(grouped: Groups, delta: float) -> Accounts:
    """Runs the three accountants and compares them."""
    import warnings

    from opacus.accountants import PRVAccountant, RDPAccountant

    rdp, prv = RDPAccountant(), PRVAccountant()
    rdp.history = prv.history = [(noise, rate, count) for rate, noise, count in grouped]
    with _computing(delta), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the best order at the edge of the range, and log(0)
        loose = max(0.0, float(rdp.get_epsilon(delta)))
        _check_size(loose, float(rdp.get_epsilon(delta / 4000)), grouped, delta)
        estimate = max(0.0, float(prv.get_epsilon(delta)))
    accounts = Accounts(_pld(grouped, delta), estimate, loose)
    check_agreement(accounts)
    return accounts


def _check_size(rdp: float, width: float, grouped: Groups, delta: float) -> None:
    """Refuses a cross-check that would take gigabytes.

    Args:
        rdp: Epsilon by RDP.
        width: Epsilon by RDP at the delta at which Opacus' PRV truncates its domain.
        grouped: The charged events.
        delta: The delta of the budget.
    """
    steps = sum(count for _, _, count in grouped)
    points = 2 * (width + 3) * math.sqrt(steps * math.log(12_000 / delta) / 2) / _PRV_MESH
    if not (rdp <= _LARGEST_CHECKED and points <= _MOST_POINTS):
        raise PrivacyError(
            f"epsilon is {rdp:,.1f} by RDP over {steps:,} steps and cannot be checked by three "
            f"accountants: it must be at most {_LARGEST_CHECKED:,}, and PRV would need {points:,.0f} "
            f"points, at most {_MOST_POINTS:,}; raise noise_multiplier or take fewer steps"
        )


def check_agreement(accounts: Accounts) -> None:
    """Refuses figures that cannot all be correct.

    Raises:
        PrivacyError: RDP is below PLD, or PRV differs from PLD by more than 0.02 + 0.5 %. If both are
            below PLD, the PLD's discretisation is too coarse.
    """
    absolute, relative = _PRV_TOLERANCE
    allowed = absolute + relative * accounts.pld
    is_bounded = accounts.rdp >= accounts.pld - _TOLERANCE
    if accounts.prv < accounts.rdp < accounts.pld < math.inf and not is_bounded:
        raise PrivacyError(
            f"epsilon cannot be told: PLD, which rounds each step's loss to {_DISCRETISATION:g}, says "
            f"{accounts.pld:.4f}, and RDP at most {accounts.rdp:.4f}; take fewer steps, or less noise"
        )
    if not (is_bounded and abs(accounts.prv - accounts.pld) <= allowed):
        raise PrivacyError(
            f"the accountants disagree: PLD {accounts.pld:.4f}, PRV {accounts.prv:.4f}, RDP "
            f"{accounts.rdp:.4f}; RDP must be at least PLD, and PRV within {allowed:.3f} of it"
        )


def _step(rate: float, noise: float) -> object:
    """One Poisson-sampled Gaussian step as a dp-accounting event."""
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent

    return PoissonSampledDpEvent(rate, GaussianDpEvent(noise))


@lru_cache(maxsize=256)
def _order(first: Event, delta: float, budget: float) -> float:
    """Smallest Rényi order at which a budget pays for nearly the most steps like the first event's.

    The best order would be slightly better for such steps, and far worse for steps with less noise.
    """
    from dp_accounting.rdp import RdpAccountant

    def affordable(order: float) -> float:
        one, two = (RdpAccountant([order]) for _ in range(2))
        one.compose(_step(first.sample_rate, first.noise_multiplier), _MANY_STEPS)
        two.compose(_step(first.sample_rate, first.noise_multiplier), 2 * _MANY_STEPS)
        total = float(two.get_epsilon(delta)) - float(one.get_epsilon(delta))  # steps·RDP + f(delta)
        constant = float(one.get_epsilon(delta)) - total
        return (budget - constant) / total if math.isfinite(total) and total > 0 else -math.inf

    steps = {order: affordable(order) for order in _ORDERS}
    enough = _NEARLY * max(steps.values())
    return float(min(order for order, count in steps.items() if count >= enough))
