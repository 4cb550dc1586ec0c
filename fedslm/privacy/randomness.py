"""Randomness for privacy: a ChaCha20 keystream under a fresh operating-system key.

No seed affects it: neither the run's, nor that of ``random``, NumPy or torch. Reproducible randomness
comes from :mod:`fedslm.rng` instead.

Why a cipher: noise is only as secret as its generator's state. torch's CPU generator is a Mersenne
Twister: its state follows from its outputs, and it keeps 32 bits of its seed, few enough to try them
all. ChaCha20 has a key of 256 bits, and runs in constant time without special instructions.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NoReturn

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

from fedslm.errors import PrivacyError

_KEY_BYTES = 32
_NONCE = bytes(16)  # a key is used for only one stream, so its nonce need not vary
_WORD_BYTES = 8
_BLOCK_WORDS = 16_384  # fits into the cache of a core
_BLOCKS_PER_KEY = 2**18  # 32 GiB; ChaCha20's counter ends after 256 GiB


class SecureStream:
    """A stream of uniform random numbers that nobody outside this process can predict or repeat.

    Formal guarantees:
        * Every stream is the keystream of ChaCha20 (RFC 8439) under 256-bit keys of its own, from the
          operating system: predicting it means breaking ChaCha20 or the operating system.
        * No two objects share numbers: a stream cannot be copied or pickled, and refuses to continue in
          another process (a fork would repeat it).
        * No seed of the run, of ``random``, NumPy or torch changes it.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self._zeros = bytes(_BLOCK_WORDS * _WORD_BYTES)
        self._renew()

    def uniform(self, count: int) -> NDArray[np.float64]:
        """Draws ``count`` numbers from (0, 1), each one of 2^52 equally likely midpoints.

        Raises:
            PrivacyError: The stream was used in another process.

        >>> bool(((0 < SecureStream().uniform(100)) & (SecureStream().uniform(100) < 1)).all())
        True
        """
        numbers = np.empty(count)
        for start, words in self._blocks(count):
            part = numbers[start : start + len(words)]
            # (k + 1/2)·2^-52 is exact in float64, and neither 0, whose log is infinite, nor 1.
            np.add(words >> np.uint64(12), 0.5, out=part)
            part *= 2.0**-52
        return numbers

    def words(self, count: int) -> NDArray[np.uint64]:
        """Draws ``count`` words of 64 random bits.

        Raises:
            PrivacyError: The stream was used in another process.

        >>> SecureStream().words(3).dtype
        dtype('uint64')
        """
        numbers = np.empty(count, dtype=np.uint64)
        for start, words in self._blocks(count):
            numbers[start : start + len(words)] = words
        return numbers

    def _blocks(self, count: int) -> Iterator[tuple[int, NDArray[np.uint64]]]:
        """Yields the next ``count`` words in blocks, each with the number of words before it."""
        if os.getpid() != self._process:
            raise PrivacyError("a stream of secure randomness was carried into another process")
        for start in range(0, count, _BLOCK_WORDS):
            if self._blocks_left == 0:
                self._renew()
            self._blocks_left -= 1
            size = min(_BLOCK_WORDS, count - start)
            yield start, np.frombuffer(self._encryptor.update(self._zeros[: size * _WORD_BYTES]), "<u8")

    def _renew(self) -> None:
        """Takes a fresh key, long before the counter of the old one is exhausted."""
        key = os.urandom(_KEY_BYTES)
        self._encryptor = Cipher(algorithms.ChaCha20(key, _NONCE), mode=None).encryptor()
        self._blocks_left = _BLOCKS_PER_KEY

    def bernoulli(self, count: int, rate: float) -> NDArray[np.bool_]:
        """Draws ``count`` independent booleans, each True with probability ``rate`` (to 2^-52).

        >>> SecureStream().bernoulli(3, 1.0).tolist()
        [True, True, True]
        """
        return self.uniform(count) < rate

    def subset(self, count: int, size: int) -> NDArray[np.int64]:
        """Draws ``min(size, count)`` of the indices below ``count``; every such set is equally likely.

        >>> sorted(SecureStream().subset(3, 5).tolist())
        [0, 1, 2]
        """
        if count <= size:
            return np.arange(count)
        return np.argsort(self.uniform(count), kind="stable")[:size]

    def __copy__(self) -> NoReturn:
        raise PrivacyError("secure randomness cannot be copied: it would be used twice")

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise PrivacyError("secure randomness cannot be copied: it would be used twice")

    def __reduce__(self) -> NoReturn:
        raise PrivacyError("secure randomness cannot be pickled: it would be used twice")
