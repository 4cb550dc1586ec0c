"""Gaussian noise from secure randomness, hardened against floating-point attacks."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fedslm.errors import PrivacyError
from fedslm.privacy.randomness import SecureStream

_SAMPLES = 4  # each value is half the sum of four Gaussians
_BLOCK = 8_192


class GaussianNoise:
    """A stream of Gaussian noise for one release.

    Formal guarantees:
        * Values are independent N(0, stddev²) up to float64 rounding, from a separate
          :class:`~fedslm.privacy.randomness.SecureStream`. Each of the four samples in a value is
          truncated at 8.57 standard deviations by the resolution of its uniform (probability below
          2^-52).
        * Each value is half the sum of four independent Box–Muller samples, as in Opacus' secure mode:
          an attacker who sees the low bits of a release has to find all four among about 2^(3·52)
          candidates.

    References:
        Box and Muller 1958; Mironov 2012 (the attack); Holohan and Braghin 2021 (arXiv 2107.10138).
    """

    def __init__(self) -> None:
        self._stream = SecureStream()

    def draw(self, shape: tuple[int, ...], stddev: float) -> NDArray[np.float64]:
        """Draws noise in float64: add it in float64 and round once.

        Args:
            shape: Shape of the noise.
            stddev: Standard deviation, > 0: a release without noise is never allowed.

        Raises:
            PrivacyError: ``stddev`` is not a positive number.

        >>> GaussianNoise().draw((2, 3), 1.0).shape
        (2, 3)
        """
        if not 0 < stddev < math.inf:
            raise PrivacyError(f"stddev={stddev} must be in (0, inf)")
        values = np.zeros(math.prod(shape))
        for start in range(0, len(values), _BLOCK):
            part = values[start : start + _BLOCK]
            for _ in range(_SAMPLES):
                part += self._standard_normal(len(part))
        values *= stddev / math.sqrt(_SAMPLES)
        return values.reshape(shape)

    def _standard_normal(self, count: int) -> NDArray[np.float64]:
        """Box–Muller; both values of a pair are used, for different coordinates."""
        # Two uniforms always give two normals: the redraws of a rejection method depend on the noise.
        half = (count + 1) // 2
        uniform = self._stream.uniform(2 * half)
        radius = np.sqrt(-2.0 * np.log(uniform[:half]))
        angle = 2.0 * np.pi * uniform[half:]
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
