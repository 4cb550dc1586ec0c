"""Times of an exchange: how long its messages live, and how long a node may work on one.

A message lives longer than its exchange, so that no complete reply expires.
"""

from __future__ import annotations

import math

GRACE_SECONDS = 10.0  # how long a call after the deadline is retried
SWEEP_SECONDS = 60.0  # how long replies that were complete by the deadline are still taken
DAY_SECONDS = 86_400.0
_TRANSFER_SECONDS = 60.0  # for a request and a reply to reach each other's side
_SESSION_SECONDS = 180.0  # flwr.supercore.constant.OBJECT_PUSH_SESSION_TTL_SECONDS


def lifetime_of(seconds: float) -> float:
    """Time to live of an exchange's messages: no complete reply expires before it is fetched.

    Args:
        seconds: How long the exchange may take.

    >>> lifetime_of(100.0)
    350.0
    """
    return seconds + _SESSION_SECONDS + GRACE_SECONDS + SWEEP_SECONDS


def exchange_seconds(lifetime: float) -> float:
    """Longest duration of an exchange, from its messages' time to live; a shorter one is kept as is.

    >>> exchange_seconds(lifetime_of(100.0)), exchange_seconds(30.0)
    (100.0, 30.0)
    """
    seconds = lifetime - lifetime_of(0.0)
    return seconds if seconds > 0 else lifetime


def deadline_with(period: float) -> float:
    """Shortest exchange in which a node that answers after ``period`` seconds is not late.

    A whole number, so that a time to live made of it gives it back exactly.

    >>> deadline_with(300.0), exchange_seconds(lifetime_of(deadline_with(0.1)))
    (360.0, 61.0)
    """
    return math.ceil(period) + _TRANSFER_SECONDS


def work_seconds(lifetime: float) -> float:
    """Time limit for work on a message: as long as its exchange may take, but at most a day.

    Args:
        lifetime: Its time to live; the server may send any number.

    >>> work_seconds(60.0), work_seconds(-1.0), work_seconds(float("nan")), work_seconds(1e300)
    (60.0, 0.0, 86400.0, 86400.0)
    """
    if not math.isfinite(lifetime):
        return DAY_SECONDS
    return min(exchange_seconds(max(0.0, lifetime)), DAY_SECONDS)
