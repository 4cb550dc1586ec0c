"""Turns the requested privacy into a plan that keeps it: calibrates or checks the noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, assert_never

from fedslm.config import PrivacyConfig, SecureAggregationConfig, TrainingConfig
from fedslm.errors import OutOfRange, PrivacyError
from fedslm.privacy import accounting
from fedslm.privacy.encoding import coarse_bits
from fedslm.privacy.plan import ClientPlan, ExamplePlan, NoPrivacy, RunPlan, UserPlan
from fedslm.privacy.shares import NoiseShares
from fedslm.records import Event

_STEP, _LARGEST_MULTIPLIER = 1e-3, 10_000


def calibrated(
    privacy: PrivacyConfig, training: TrainingConfig, rounds: int, shares: NoiseShares | None = None
) -> RunPlan:
    """Turns the requested privacy into a plan, for the worst case: a client joins every round.

    Args:
        privacy: The requested privacy.
        training: Steps and batch size.
        rounds: Rounds of the run; ``privacy.spare_rounds`` are added to them.
        shares: How clients share the noise (:func:`shares_of`); None: each adds all of it.

    Returns:
        The plan that every client follows.

    Raises:
        PrivacyError: A value is missing or infeasible, or a given noise multiplier would exceed
            epsilon.

    References:
        The accountant is :mod:`fedslm.privacy.accounting`.
    """
    match privacy.unit:
        case "none":
            return NoPrivacy(training.batch_size, training.local_steps)
        case "record":
            return ExamplePlan(**_mechanism(privacy, training, rounds, shares))
        case "user":
            cap = privacy.max_records_per_unit
            if cap is None or privacy.unit_column is None:
                raise OutOfRange("privacy.unit='user' needs unit_column and max_records_per_unit")
            mechanism = _mechanism(privacy, training, rounds, shares)
            return UserPlan(**mechanism, unit_column=privacy.unit_column, max_records_per_unit=cap)
        case "client":
            by_client = privacy.model_copy(update={"sample_rate": 1.0})
            once = training.model_copy(update={"local_steps": 1})  # one release a round
            mechanism = _mechanism(by_client, once, rounds, shares)
            mechanism |= {"normaliser": 1, "steps_per_round": training.local_steps}
            return ClientPlan(**mechanism, batch_size=training.batch_size)
        case _:
            assert_never(privacy.unit)


def shares_of(
    privacy: PrivacyConfig, training: TrainingConfig, secure: SecureAggregationConfig, cohort: int
) -> NoiseShares | None:
    """How clients share the noise by a config; None if each adds all of it.

    Args:
        privacy: Who adds the noise.
        training: The public number of units in a step.
        secure: Threshold, colluding clients, protocol.
        cohort: Clients of a round.

    Raises:
        OutOfRange: The threshold is missing, or a value is out of range.
    """
    if not privacy.shares_noise:
        return None
    if secure.threshold is None:
        raise OutOfRange('privacy.noise="distributed" needs secure_aggregation.threshold')
    bits = coarse_bits(cohort, 1 if privacy.unit == "client" else training.batch_size)
    return NoiseShares(secure.threshold, secure.max_colluding, bits, secure.protocol)


def noise_of(
    privacy: PrivacyConfig, training: TrainingConfig, rounds: int, shares: NoiseShares | None = None
) -> float:
    """Returns noise / clip norm of one client in the plan of :func:`calibrated`; 0 without privacy.

    Raises:
        PrivacyError: As :func:`calibrated`.
    """
    plan = calibrated(privacy, training, rounds, shares)
    return 0.0 if isinstance(plan, NoPrivacy) else plan.own_noise_multiplier


def _mechanism(
    privacy: PrivacyConfig, training: TrainingConfig, rounds: int, shares: NoiseShares | None
) -> dict[str, Any]:
    """The fields that all DP-SGD plans share, calibrated over all steps that a client can take."""
    epsilon, delta = privacy.epsilon, privacy.delta
    clip_norm, sample_rate = privacy.clip_norm, privacy.sample_rate
    if epsilon is None or delta is None or clip_norm is None or sample_rate is None:
        raise OutOfRange("privacy needs epsilon, delta, clip_norm and sample_rate; none is assumed")
    rounds += privacy.spare_rounds
    steps = rounds * training.local_steps
    metric = privacy.metric_noise_multiplier
    # A unit moves (sum of scores, units) by at most (1, 1), √2 in L2. The noise is σ·√2, so σ is its
    # multiplier; all units are read, so no sampling amplifies it.
    others = [] if metric is None else [Event(1.0, metric, rounds)]
    noise, honest = privacy.noise_multiplier, None if shares is None else shares.honest_nodes
    if noise is None:
        noise = calibrate(epsilon, delta, sample_rate, steps, others, honest_nodes=honest)
    spent = accounting.epsilon([Event(sample_rate, noise, steps, honest), *others], delta)
    if spent > epsilon:
        raise PrivacyError(
            f"privacy.noise_multiplier={noise} costs epsilon={spent:.3f} over {steps} steps, more "
            f"than privacy.epsilon={epsilon}; raise either, or leave noise_multiplier out"
        )
    return {
        "epsilon": epsilon,
        "delta": delta,
        "clip_norm": clip_norm,
        "noise_multiplier": noise,
        "sample_rate": sample_rate,
        "normaliser": training.batch_size,
        "steps_per_round": training.local_steps,
        "rounds": rounds,
        "metric_noise_multiplier": metric,
        "passes": privacy.passes,
        "shares": shares,
    }


def calibrate(
    epsilon_target: float,
    delta: float,
    sample_rate: float,
    steps: int,
    others: Sequence[Event] = (),
    *,
    honest_nodes: int | None = None,
) -> float:
    """Finds a noise multiplier for which the steps cost at most the target.

    It is at most 0.002 above the smallest such multiplier, or 0.101 if the smallest is below 0.1.

    Args:
        epsilon_target: Budget, > 0.
        delta: In (0, 0.1].
        sample_rate: In (0, 1].
        steps: Largest number of steps that a client can take, not the expected number.
        others: Further events that the same budget must pay for.
        honest_nodes: See :class:`~fedslm.records.Event`: the noise is then that of all of these nodes.

    Raises:
        PrivacyError: The target is not a positive number, or no noise multiplier up to 10,000 meets it.
    """
    if not 0 < epsilon_target < math.inf:
        raise OutOfRange(f"epsilon={epsilon_target} must be in (0, inf)")

    def spent(noise_multiplier: float) -> float:
        event = Event(sample_rate, noise_multiplier, steps, honest_nodes)
        return accounting.epsilon([event, *others], delta)

    high = 1.0
    while spent(high) > epsilon_target:
        high *= 2
        if high > _LARGEST_MULTIPLIER:
            raise PrivacyError(
                f"privacy.epsilon={epsilon_target} at delta={delta} is out of reach for {steps} "
                f"steps at sample_rate={sample_rate}; ask for fewer steps or a larger epsilon"
            )
    # Epsilon never rises with the noise, so bisection is valid: for τ > σ, N(0, τ²) is
    # N(0, σ²) + N(0, τ² - σ²), and more noise is post-processing of less.
    low = high / 2 if high > 1 else 0.1
    while high - low > _STEP:
        middle = (low + high) / 2
        low, high = (low, middle) if spent(middle) <= epsilon_target else (middle, high)
    return round(math.ceil(high / _STEP) * _STEP, 6)


def affordable_steps(epsilon_target: float, delta: float, event: Event) -> int:
    """Largest number of steps like ``event`` that cost at most the target in total; 0 if none.

    >>> affordable_steps(3.0, 1e-5, Event(0.032, 0.946, 1))
    149
    """

    def fits(steps: int) -> bool:
        one = replace(event, steps=steps)
        return accounting.epsilon([one], delta) <= epsilon_target

    return largest(fits, accounting.MOST_STEPS)


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """Largest number up to ``limit`` that fits, if all smaller ones fit; 0 if none does."""
    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, high * 2
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
