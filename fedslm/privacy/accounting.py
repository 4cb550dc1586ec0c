"""Events to epsilon. The number of record is dp-accounting's PLD accountant.

Formal guarantees:
    * Add-or-remove-one adjacency of the unit; both directions, the larger counts.
    * Poisson sampling at the event's rate and Gaussian noise at its multiplier, adaptively composed
      over all steps with fixed parameters. No amplification by client sampling.
    * The discretised privacy loss is rounded pessimistically: the result is an upper bound.

References:
    Koskela et al. 2020 (arXiv 1906.03049); Doroshenko et al. 2022 (arXiv 2207.04380).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

from fedslm.errors import PrivacyError
from fedslm.records import Event

_DISCRETISATION = 1e-3
_TOLERANCE = 1e-3


def epsilon(events: Iterable[Event], delta: float) -> float:
    """Epsilon of all events together at ``delta``.

    Args:
        events: What was charged, in any order; none gives 0.
        delta: In (0, 1).

    Returns:
        An upper bound on epsilon.

    Raises:
        PrivacyError: Delta is out of its range (an event cannot be: it checks itself).

    >>> epsilon([], 1e-5)
    0.0
    >>> round(epsilon([Event(256 / 10_000, 1.0, 117)], 1e-5), 2)
    1.92
    """
    if not 0 < delta < 1:
        raise PrivacyError(f"delta={delta} must be in (0, 1)")
    steps: Counter[tuple[float, float]] = Counter()
    for event in events:
        steps[event.sample_rate, event.noise_multiplier] += event.steps
    grouped = sorted((rate, noise, count) for (rate, noise), count in steps.items())
    return _epsilon(tuple(grouped), delta) if grouped else 0.0


def calibrate(epsilon_target: float, delta: float, sample_rate: float, steps: int) -> float:
    """Noise multiplier at most 0.002 above the smallest for which the steps cost at most the target.

    Args:
        epsilon_target: Budget, > 0.
        delta: In (0, 1).
        sample_rate: In (0, 1].
        steps: Most steps that a client can take, not the expected number.

    Raises:
        PrivacyError: The target is not a positive number, or no noise multiplier up to 10,000 meets it.
    """
    if not 0 < epsilon_target < math.inf:
        raise PrivacyError(f"epsilon={epsilon_target} must be in (0, inf)")

    def spent(noise_multiplier: float) -> float:
        return epsilon([Event(sample_rate, noise_multiplier, steps)], delta)

    high = 1.0
    while spent(high) > epsilon_target:
        high *= 2
        if high > 10_000:
            raise PrivacyError(
                f"privacy.epsilon={epsilon_target} at delta={delta} is out of reach for {steps} "
                f"steps at sample_rate={sample_rate}; ask for fewer steps or a larger epsilon"
            )
    low = high / 2 if high > 1 else 0.1
    while high - low > _TOLERANCE:
        middle = (low + high) / 2
        low, high = (low, middle) if spent(middle) <= epsilon_target else (middle, high)
    return round(math.ceil(high / _TOLERANCE) * _TOLERANCE, 6)


@lru_cache(maxsize=4096)
def _epsilon(grouped: tuple[tuple[float, float, int], ...], delta: float) -> float:
    """PLD of grouped (sample_rate, noise_multiplier, steps)."""
    import dp_accounting
    from dp_accounting import pld

    accountant = pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, _DISCRETISATION)
    for sample_rate, noise_multiplier, count in grouped:
        step = dp_accounting.PoissonSampledDpEvent(
            sample_rate, dp_accounting.GaussianDpEvent(noise_multiplier)
        )
        accountant.compose(step, count)
    return float(accountant.get_epsilon(delta))
