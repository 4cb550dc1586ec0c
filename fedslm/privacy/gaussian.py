"""Gaussian noise from operating-system entropy."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fedslm.errors import PrivacyError
from fedslm.rng import operating_system_seed

_SEED_BITS = 256


class GaussianNoise:
    """A stream of Gaussian noise that no seed of the run, of torch or of NumPy touches.

    Formal guarantees:
        * Every stream starts from 256 fresh bits of operating-system entropy, all of which matter.
        * Values are drawn in float64 and independent of all other streams.

    The generator (PCG64DXSM) is not a cryptographic one: whoever learns its state can predict it.
    """

    def __init__(self) -> None:
        self._generator = np.random.Generator(np.random.PCG64DXSM(operating_system_seed(_SEED_BITS)))

    def draw(self, shape: tuple[int, ...], stddev: float) -> NDArray[np.float32]:
        """Draws noise.

        Args:
            shape: Shape of the noise.
            stddev: Standard deviation, > 0: no noise is never a release.

        Raises:
            PrivacyError: ``stddev`` is not a positive number.

        >>> GaussianNoise().draw((2, 3), 1.0).shape
        (2, 3)
        """
        if not 0 < stddev < math.inf:
            raise PrivacyError(f"stddev={stddev} must be in (0, inf)")
        return (stddev * self._generator.standard_normal(shape)).astype(np.float32)
