"""Answers questions before a run: noise for an epsilon, epsilon for a noise, rounds for a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedslm.errors import OutOfRange, PrivacyError, plural
from fedslm.privacy import accounting
from fedslm.privacy.agreement import Accounts
from fedslm.privacy.calibration import affordable_steps, calibrate
from fedslm.privacy.plan import ONE_STEP
from fedslm.records import Event

_CURVE_POINTS = 10
PLANNED_UNITS = ("record", "user", "client")
"""A whole client can be planned for, and not run: that needs secure aggregation."""
_DROWNED = 2.0  # below this, the noise dominates: the bound assumes that all gradients agree


@dataclass(frozen=True)
class BudgetQuery:
    """The known values; of steps, epsilon and noise_multiplier two are enough.

    Attributes:
        sample_rate: Probability in (0, 1] with which a unit joins a step; 1 for a client, since cohorts
            are public and give no amplification.
        delta: In (0, 0.1].
        steps: Noisy steps of the whole run, >= 1; for a client, the most rounds that it joins.
        epsilon: Budget, > 0.
        noise_multiplier: Noise standard deviation / clip norm, > 0.
        steps_per_round: >= 1.
        unit: Whose participation is protected.
        parameters: Trained parameters, for the signal; 0: unknown.
        batch_size: Divisor of the noisy sum (units), for the signal; 0: unknown.
        clients: Clients whose updates are averaged, >= 1.
        honest_nodes: Clients that share the noise, >= 2, if only their sum is seen; None: each adds all
            of it.
    """

    sample_rate: float
    delta: float
    steps: int | None = None
    epsilon: float | None = None
    noise_multiplier: float | None = None
    steps_per_round: int = 1
    unit: str = "record"
    parameters: int = 0
    batch_size: int = 0
    clients: int = 1
    honest_nodes: int | None = None


@dataclass(frozen=True)
class Point:
    """Epsilon after some rounds.

    Attributes:
        round: Rounds taken.
        epsilons: Epsilon at each of the plan's deltas.
    """

    round: int
    epsilons: tuple[float, ...]


@dataclass(frozen=True)
class BudgetPlan:
    """A calibrated run.

    Attributes:
        unit: Whose participation is protected.
        epsilon: What the steps cost at ``delta``.
        delta: The requested delta.
        noise_multiplier: Noise standard deviation / clip norm.
        sample_rate: The requested sample rate.
        steps: Noisy steps.
        rounds: Number of rounds; the last one may be shorter.
        affordable_steps: Most steps that the budget pays for; None without a budget.
        accounts: Epsilon by three accountants, or two without Opacus.
        deltas: The deltas of the curve.
        curve: Epsilon over the rounds.
        signal_to_noise: Best case over the run; None if parameters or batch size are unknown.
        warnings: Likely problems, each with its remedy.
        honest_nodes: Clients whose honesty epsilon assumes; None: it assumes nothing of others.
        epsilon_if_all_collude: Epsilon without that assumption; None with ``honest_nodes`` absent.
    """

    unit: str
    epsilon: float
    delta: float
    noise_multiplier: float
    sample_rate: float
    steps: int
    rounds: int
    affordable_steps: int | None
    accounts: Accounts
    deltas: tuple[float, ...]
    curve: tuple[Point, ...]
    signal_to_noise: float | None
    warnings: tuple[str, ...]
    honest_nodes: int | None = None
    epsilon_if_all_collude: float | None = None


def plan_budget(query: BudgetQuery) -> BudgetPlan:
    """Computes the missing value and cross-checks the plan.

    Raises:
        OutOfRange: Too few values are given, or one is out of range.
        PrivacyError: The budget is infeasible, or the accountants disagree.

    >>> plan_budget(BudgetQuery(0.032, 1e-5, steps=150, epsilon=3.0)).noise_multiplier
    0.947
    """
    noise, steps = _noise_and_steps(query)
    event = Event(query.sample_rate, noise, steps, query.honest_nodes)
    accounts = accounting.cross_check([event], query.delta, needs_prv=False)
    rounds = math.ceil(steps / query.steps_per_round)
    deltas = (query.delta, query.delta / 10, query.delta / 100)
    affordable = None
    if query.epsilon is not None:
        affordable = affordable_steps(query.epsilon, query.delta, event)
    signal = None
    if query.parameters and query.batch_size:
        signal = signal_to_noise(
            noise=noise / math.sqrt(query.honest_nodes or 1),
            steps=steps,
            batch_size=query.batch_size,
            clients=query.clients,
            parameters=query.parameters,
        )
    return BudgetPlan(
        unit=query.unit,
        epsilon=accounts.epsilon,
        delta=query.delta,
        noise_multiplier=noise,
        sample_rate=query.sample_rate,
        steps=steps,
        rounds=rounds,
        affordable_steps=affordable,
        accounts=accounts,
        deltas=deltas,
        curve=_curve(query, event, rounds, deltas),
        signal_to_noise=signal,
        warnings=tuple(_warnings(query, signal, accounts.epsilon, steps)),
        honest_nodes=query.honest_nodes,
        epsilon_if_all_collude=None
        if query.honest_nodes is None
        else accounting.epsilon_if_all_collude([event], query.delta),
    )


def _noise_and_steps(query: BudgetQuery) -> tuple[float, int]:
    """The noise multiplier and the steps: given, or computed from the other values."""
    epsilon, noise, steps = query.epsilon, query.noise_multiplier, query.steps
    if query.unit not in PLANNED_UNITS:
        raise OutOfRange(f"unit={query.unit!r} must be record, user or client")
    for name, least in (("steps_per_round", 1), ("clients", 1), ("parameters", 0), ("batch_size", 0)):
        if not getattr(query, name) >= least:
            raise OutOfRange(f"{name}={getattr(query, name)} must be >= {least}")
    if query.honest_nodes is not None and (query.honest_nodes < 2 or query.steps_per_round != 1):
        raise OutOfRange(
            f"honest_nodes={query.honest_nodes} must be at least 2, with 1 step a round, not "
            f"{query.steps_per_round}: {ONE_STEP}"
        )
    if query.unit == "client" and (query.sample_rate, query.steps_per_round) != (1, 1):
        raise OutOfRange(
            f"sample_rate={query.sample_rate} and steps_per_round={query.steps_per_round} must "
            f"be 1 for unit='client': cohorts are drawn from a public seed, so sampling protects no "
            f"client; give the most rounds that one client joins instead"
        )
    if steps is None:
        if epsilon is None or noise is None:
            raise OutOfRange("give steps, or epsilon and noise_multiplier to find how many they allow")
        one = Event(query.sample_rate, noise, 1, query.honest_nodes)
        steps = affordable_steps(epsilon, query.delta, one)
        if steps < 1:
            raise PrivacyError(
                f"noise_multiplier={noise:g} does not allow one step at epsilon={epsilon:g}; raise it"
            )
    if noise is None:
        if epsilon is None:
            raise OutOfRange("give epsilon to find the noise, or noise_multiplier to find epsilon")
        noise = calibrate(
            epsilon, query.delta, query.sample_rate, steps, honest_nodes=query.honest_nodes
        )
    return noise, steps


def _curve(query: BudgetQuery, event: Event, rounds: int, deltas: Sequence[float]) -> tuple[Point, ...]:
    """Epsilon after about ten numbers of rounds, including the last round."""
    marks = sorted({max(1, round(rounds * part / _CURVE_POINTS)) for part in range(1, 11)})
    points = []
    for mark in marks:
        taken = min(event.steps, mark * query.steps_per_round)
        part = replace(event, steps=taken)
        points.append(Point(mark, tuple(accounting.epsilon([part], delta) for delta in deltas)))
    return tuple(points)


def signal_to_noise(
    *, noise: float, steps: int, batch_size: int, clients: int, parameters: int
) -> float:
    """Returns the signal-to-noise ratio of the sum of all steps if every gradient agreed.

    A step's mean gradient has norm <= C, its noise norm σ·C·√d / (L·√n); over T steps the signal grows
    with T, the noise with √T. Real gradients agree less; how much a ratio is worth is measured
    (:mod:`fedslm.recipes.table`).

    Args:
        noise: Noise multiplier σ, > 0.
        steps: Steps T of the whole run.
        batch_size: Units L that the noisy sum is divided by.
        clients: Clients n whose updates are averaged.
        parameters: Trained parameters d, >= 1.

    >>> signal_to_noise(noise=2.0, steps=16, batch_size=100, clients=4, parameters=10_000)
    4.0
    """
    return batch_size * math.sqrt(clients * steps) / (noise * math.sqrt(parameters))


def _warnings(query: BudgetQuery, signal: float | None, epsilon: float, steps: int) -> list[str]:
    """Likely problems, each with its remedy."""
    found = []
    if signal is not None and signal < _DROWNED:
        found.append(
            f"the noise drowns the signal: if all gradients agreed, the signal-to-noise ratio over "
            f"the run would be {signal:.2g} with {query.parameters:,} parameters and "
            f"{plural(query.clients, 'client')}; train fewer parameters (smaller rank, fewer "
            f"layers), raise sample rate and batch size together, or bring in more clients"
        )
    if query.batch_size and query.delta >= query.sample_rate / query.batch_size:
        units = query.batch_size / query.sample_rate
        found.append(f"delta={query.delta:g} is not below 1/units (about 1/{units:.0f})")
    if query.delta >= (joins := query.sample_rate * steps):
        found.append(
            f"delta={query.delta:g} is not below {joins:.2g}, the chance of a unit to join any of "
            f"the {plural(steps, 'step')}: so large a delta lets a unit that joins be seen; lower it"
        )
    if query.epsilon is not None and epsilon > query.epsilon:
        found.append(f"epsilon={epsilon:.3f} is more than the budget, epsilon={query.epsilon:g}")
    if epsilon > 20:
        found.append(f"epsilon={epsilon:.1f} promises little; 8 or less is common")
    return found
