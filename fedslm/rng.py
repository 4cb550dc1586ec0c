"""The only place where seeds are derived.

Everything that may be reproducible (initial adapter, partitions, non-private batches) comes from
:func:`stream`. All randomness that protects somebody (noise, Poisson sampling under privacy) comes from
:class:`fedslm.privacy.randomness.SecureStream` and never from the run's seed: knowing the seed must not
reveal the noise.
"""

from __future__ import annotations

import hashlib

import numpy as np


def seed_of(seed: int, purpose: str, *indices: int | str) -> int:
    """Derives a 64-bit seed from the run's seed, a purpose and indices.

    Args:
        seed: The run's seed, >= 0.
        purpose: Purpose of the stream; two purposes never share a stream.
        *indices: For example, round and client.

    Returns:
        An integer in [0, 2**63).

    >>> seed_of(0, "batches", 1, 2) == seed_of(0, "batches", 1, 2)
    True
    >>> seed_of(0, "batches", 1, 2) == seed_of(0, "batches", 12)
    False
    """
    text = "\x1f".join(str(part) for part in (seed, purpose, *indices))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def stream(seed: int, purpose: str, *indices: int | str) -> np.random.Generator:
    """Returns the reproducible generator for one purpose.

    >>> float(stream(7, "x").random()) == float(stream(7, "x").random())
    True
    """
    return np.random.default_rng(seed_of(seed, purpose, *indices))


def reproducible_bytes(count: int, seed: int, purpose: str, *indices: int | str) -> bytes:
    """Returns bytes that do not depend on library versions or the processor (SHAKE-256).

    For values that are generated on several machines and compared by hash. NumPy guarantees the same
    stream only within one of its versions.

    Args:
        count: Number of bytes.
        seed: As for :func:`seed_of`.
        purpose: As for :func:`seed_of`.
        *indices: As for :func:`seed_of`.

    >>> reproducible_bytes(4, 0, "x").hex()
    'c2869752'
    """
    text = "\x1f".join(str(part) for part in (seed, purpose, *indices))
    return hashlib.shake_256(text.encode()).digest(count)
