"""A sum of clipped gradients as whole numbers modulo 2^32, and back.

A node's vector is a whole number of steps of a public grid at every coordinate, noise included. Nodes
and server add such vectors modulo 2^32: no rounding, whatever the order, and a mask that is uniform
modulo 2^32 hides a vector completely. A sum beyond ±2^31 wraps around. That is post-processing: it can
cost the round, never privacy.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedslm.errors import FederationError

Words = NDArray[np.uint32]
FINE_BITS = 30
"""Grid of a node that adds all of its noise: γ = 2^-30 of the clip norm's power of two."""
COARSE_BITS, LEAST_COARSE_BITS = 20, 16
"""Grids of a sum modulo 2^32: from 2^-20 to 2^-16."""
_HALF = 2**31
_ROOM = 0.75  # of 2^31: what is beyond may have wrapped around


def grid_of(clip_norm: float, bits: int = FINE_BITS) -> float:
    """Returns γ, a power of two, so that multiplying by it is exact.

    Args:
        clip_norm: C, > 0.
        bits: γ is 2^-bits of the largest power of two that is at most C.

    >>> grid_of(1.5) == 2.0**-30, grid_of(1.5, 20) == 2.0**-20
    (True, True)
    """
    return math.ldexp(1.0, math.frexp(clip_norm)[1] - 1 - bits)


def coarse_bits(clients: int, units: int) -> int:
    """Chooses the grid of a sum: the finest at which no sum of clipped gradients wraps around.

    Clipped gradients that all agreed on one coordinate would add up to ``clients * units`` clip norms
    there, each of less than 2^(bits + 1) steps; half of the range is left for noise and larger samples.
    Below 16 bits rounding would cost more than a sum that wraps around, which is noticed.

    Args:
        clients: Clients of a round.
        units: Public number of units in a client's step.

    >>> coarse_bits(10, 50), coarse_bits(10, 1_000), coarse_bits(1_000, 1_000)
    (20, 16, 16)
    """
    bits = math.floor(math.log2(_HALF / 2 / (clients * units))) - 1
    return min(COARSE_BITS, max(LEAST_COARSE_BITS, bits))


def words_sha256(words: Words) -> str:
    """Hash of a vector modulo 2^32; equal on every machine, and never that of an adapter's tensors.

    >>> words_sha256(np.array([1, 2], np.uint32))[:8]
    'ccacf6f8'
    """
    little = np.ascontiguousarray(words, dtype="<u4").tobytes()
    return hashlib.sha256(f"words({words.size})".encode() + little).hexdigest()


def encoded(steps: NDArray[Any], noise: NDArray[np.int64]) -> Words:
    """Adds noise to a sum of clipped gradients and reduces it modulo 2^32.

    Args:
        steps: The exact sum in steps of the grid: whole numbers below 2^53.
        noise: Whole numbers of the same shape, below 2^62.

    >>> encoded(np.array([1.0, -2.0]), np.array([0, 1])).tolist()
    [1, 4294967295]
    """
    return (steps.astype(np.int64) + noise).astype(np.uint64).astype(np.uint32)


def decoded(total: Words) -> NDArray[np.int64]:
    """Reads a sum modulo 2^32 as whole numbers in [-2^31, 2^31).

    Raises:
        FederationError: A number is within a quarter of the end of the range: the sum may have wrapped
            around, and another one would be read.

    >>> decoded(np.array([1, 2**32 - 1], np.uint32)).tolist()
    [1, -1]
    """
    values = total.view(np.int32).astype(np.int64)
    beyond = int((np.abs(values) > _ROOM * _HALF).sum())
    if beyond:
        raise FederationError(
            f"the sum of the round may have wrapped around: {beyond} of {values.size} numbers are "
            f"beyond {_ROOM:g} of 2^31 steps of the grid; use fewer clients or a smaller batch_size"
        )
    return values
