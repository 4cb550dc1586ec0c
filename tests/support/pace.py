"""How long a test may wait: seconds of a usual, quiet machine, times how slow this one is now."""

from __future__ import annotations

import hashlib
import time

QUIET_SECONDS = 0.02  # what the workload took on the two quiet cores of simulations/LOG.md
_BLOCK = bytes(1 << 20)
_TRIES = 3


def slowness() -> float:
    """How many times longer a small workload takes than on a quiet machine; never below 1."""
    longest = 0.0
    for _ in range(_TRIES):
        began = time.perf_counter()
        for _ in range(10):
            hashlib.blake2b(_BLOCK).digest()
        longest = max(longest, time.perf_counter() - began)
    return max(1.0, longest / QUIET_SECONDS)


def patient(seconds: float) -> float:
    """A limit for what takes at most so many seconds on a quiet machine.

    Measured anew at each call, since load comes and goes; a test that waits much longer than its limit
    was set for should ask again.
    """
    return seconds * slowness()
