"""Rényi bounds on epsilon by dp-accounting: at all orders, at whole orders, and for a filter.

References:
    Mironov et al. 2019, the sampled Gaussian (arXiv 1908.10530); Feldman and Zrnic 2021 (arXiv
    2008.11193).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from fedslm.errors import PrivacyError
from fedslm.records import Event

Groups = tuple[tuple[float, float, int], ...]
"""(sample_rate, noise_multiplier, steps) of different steps, sorted."""
ORDERS = (*range(2, 65), 80, 96, 128, 192, 256, 512)
_NEARLY = 0.8
_MANY_STEPS = 10**9  # enough steps that no conversion is clamped to zero


@contextmanager
def computing(delta: float) -> Iterator[None]:
    """Turns any exception of an accountant into a PrivacyError: there is no epsilon then."""
    try:
        yield
    except PrivacyError:
        raise
    except Exception as error:
        raise PrivacyError(f"epsilon cannot be computed at delta={delta:g}: {error}") from error


def bound(grouped: Groups, delta: float, orders: Sequence[float] | None = None) -> float:
    """An upper bound on epsilon by dp-accounting's Rényi accountant; infinity if no order gives one."""
    found = float(accountant_of(grouped, orders).get_epsilon(delta))
    return math.inf if math.isnan(found) else found


def accountant_of(grouped: Groups, orders: Sequence[float] | None) -> Any:
    """dp-accounting's Rényi accountant after all events."""
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(orders)
    for rate, noise, count in grouped:
        accountant.compose(step(rate, noise), count)
    return accountant


@lru_cache(maxsize=4096)
def whole_orders(grouped: Groups, delta: float) -> float:
    """Epsilon by the Rényi bound over whole orders, where it is exact for the discrete Gaussian too."""
    with computing(delta):
        return max(0.0, bound(grouped, delta, ORDERS)) if grouped else 0.0


def step(rate: float, noise: float) -> object:
    """One Poisson-sampled Gaussian step as a dp-accounting event."""
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent

    return PoissonSampledDpEvent(rate, GaussianDpEvent(noise))


@lru_cache(maxsize=256)
def order_of(first: Event, delta: float, budget: float) -> float:
    """Smallest Rényi order at which a budget pays for nearly the most steps like the first event's.

    The best order would be slightly better for such steps, and far worse for steps with less noise.
    """
    from dp_accounting.rdp import RdpAccountant

    def affordable(order: float) -> float:
        one, two = (RdpAccountant([order]) for _ in range(2))
        one.compose(step(first.sample_rate, first.noise_multiplier), _MANY_STEPS)
        two.compose(step(first.sample_rate, first.noise_multiplier), 2 * _MANY_STEPS)
        total = float(two.get_epsilon(delta)) - float(one.get_epsilon(delta))  # steps·RDP + f(delta)
        constant = float(one.get_epsilon(delta)) - total
        return (budget - constant) / total if math.isfinite(total) and total > 0 else -math.inf

    steps = {order: affordable(order) for order in ORDERS}
    enough = _NEARLY * max(steps.values())
    return float(min(order for order, count in steps.items() if count >= enough))
