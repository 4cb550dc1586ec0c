"""Discrete Gaussian noise from secure randomness: whole numbers, sampled exactly.

No floating-point number decides a sample without room for its rounding error: what float64 cannot
decide is decided with as many digits as it takes.
"""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from fedslm.errors import PrivacyError
from fedslm.privacy.randomness import SecureStream

Integers = NDArray[np.int64]
Words = NDArray[np.uint64]
LARGEST_VARIANCE = 2**60
_WORD_BITS = 64
_FLOAT_ERROR = 2.0**-32
"""More than float64 can be wrong by here: a proposal is at most 2^12 scales t long, t < 2^31, so the
deviate (x - s²/t) / s is right to 2^-40 and, where it is below 64, half its square to 2^-33."""
_MOST_SCALES = 2**12  # a longer proposal has a probability below e^-4096, and is refused
_BLOCK = 1 << 16


class DiscreteGaussian:
    """A stream of discrete Gaussian noise for one release.

    Formal guarantees:
        * Values are independent and P(x) is proportional to exp(-x² / 2s²) on all whole numbers, for a
          whole number s²: exactly, up to an event of probability below e^-4000 that raises. The random
          bits are those of a separate :class:`~fedslm.privacy.randomness.SecureStream`.
        * The number of rejected proposals is independent of the values.

    A proposal is x = ±(u + t·v) with t = ⌊s⌋ + 1, u uniform below t and P(v) proportional to e^-v. It
    is accepted with probability exp(-(|x| - s²/t)² / 2s² - u / t); -0 is rejected, so that 0 does not
    count twice. The source has two rejections, by u / t and by the square: their product is this one.

    References:
        Canonne, Kamath and Steinke 2020 (arXiv 2004.00010), algorithms 2 and 3.
    """

    def __init__(self) -> None:
        self._stream = SecureStream()

    def draw(self, count: int, variance: int) -> Integers:
        """Draws noise.

        Args:
            count: Number of values.
            variance: s², a whole number in [1, 2^60].

        Returns:
            Shape (count,).

        Raises:
            PrivacyError: ``variance`` is out of range: a release without noise is never allowed.

        >>> DiscreteGaussian().draw(3, 100).shape
        (3,)
        """
        if type(variance) is not int or not 1 <= variance <= LARGEST_VARIANCE:
            raise PrivacyError(f"variance={variance} must be a whole number in [1, 2^60]")
        values = np.empty(count, dtype=np.int64)
        for start in range(0, count, _BLOCK):
            part = values[start : start + _BLOCK]
            filled = 0
            while filled < len(part):
                found = self._accepted(2 * (len(part) - filled) + 64, variance)[: len(part) - filled]
                part[filled : filled + len(found)] = found
                filled += len(found)
        return values

    def _accepted(self, count: int, variance: int) -> Integers:
        """Makes ``count`` proposals and returns those that are accepted."""
        scale = math.isqrt(variance) + 1
        low, high = self._below(scale, count), self._geometric(count)
        negative = (self._stream.words(count) & np.uint64(1)).astype(bool)
        size = low + scale * high
        deviate = (size - variance / scale) / math.sqrt(variance)
        taken = self._chances(deviate**2 / 2 + low / scale, (low, size), variance)
        kept = taken & ~(negative & (size == 0))
        values: Integers = np.where(negative, -size, size)[kept]
        return values

    def _below(self, bound: int, count: int) -> Integers:
        """Draws ``count`` whole numbers below ``bound``, each equally likely."""
        usable = (1 << _WORD_BITS) // bound * bound  # of the 2^64 words, so that all rests are equal
        words = self._stream.words(count)
        if usable < 1 << _WORD_BITS:
            while (above := words >= np.uint64(usable)).any():
                words[above] = self._stream.words(int(above.sum()))
        return (words % np.uint64(bound)).astype(np.int64)

    def _geometric(self, count: int) -> Integers:
        """Draws ``count`` whole numbers v with P(v) proportional to e^-v."""
        values, going = np.zeros(count, dtype=np.int64), np.arange(count)
        nothing = np.zeros(count, dtype=np.int64)
        for _ in range(_MOST_SCALES):
            begun = (nothing[going], nothing[going])
            going = going[self._chances(np.ones(len(going)), begun, 0)]
            if not len(going):
                return values
            values[going] += 1
        raise PrivacyError("a sample of the discrete Gaussian is beyond what can be computed")

    def _chances(
        self, exponents: NDArray[np.float64], exact: tuple[Integers, Integers], variance: int
    ) -> NDArray[np.bool_]:
        """Draws booleans, True with probability e^-γ each.

        Args:
            exponents: γ in float64, right to :data:`_FLOAT_ERROR` wherever e^-γ is not below that.
            exact: u and the size of x of each proposal, from which γ follows exactly.
            variance: s²; 0: γ is 1.
        """
        words = self._stream.words(len(exponents))
        chance, drawn = np.exp(-exponents), words.astype(np.float64) * 2.0**-_WORD_BITS
        taken = drawn < chance
        for index in np.flatnonzero(np.abs(drawn - chance) <= _FLOAT_ERROR):
            exponent = _exponent(int(exact[0][index]), int(exact[1][index]), variance)
            taken[index] = self._is_below(int(words[index]), exponent)
        return taken

    def _is_below(self, word: int, exponent: Fraction) -> bool:
        """Whether a uniform number in [0, 1), of which ``word`` is the first 64 bits, is below e^-γ.

        The digits grow until the interval of the number and that of e^-γ no longer overlap.
        """
        bits, digits = _WORD_BITS, 40
        while True:
            least, most = _interval(exponent, digits)
            if Fraction(word + 1, 1 << bits) <= least:
                return True
            if Fraction(word, 1 << bits) >= most:
                return False
            word = (word << _WORD_BITS) | int(self._stream.words(1)[0])
            bits, digits = bits + _WORD_BITS, digits + 20


def _exponent(low: int, size: int, variance: int) -> Fraction:
    """γ = (size - s²/t)² / 2s² + u / t as a fraction; 1 for a variance of 0."""
    if variance == 0:
        return Fraction(1)
    scale = math.isqrt(variance) + 1
    return Fraction((size * scale - variance) ** 2, 2 * variance * scale**2) + Fraction(low, scale)


def _interval(exponent: Fraction, digits: int) -> tuple[Fraction, Fraction]:
    """Two fractions, one below and one above e^-γ, about 10^-digits of it apart.

    ``Decimal`` rounds the quotient and the exponential correctly to ``digits + 10`` digits: a relative
    error of at most 10^-(digits + 9) · (γ + 1), and γ < 10^8.
    """
    with localcontext() as context:
        context.prec = digits + 10
        chance = (-Decimal(exponent.numerator) / Decimal(exponent.denominator)).exp()
    middle, slack = Fraction(chance), Fraction(1, 10**digits)
    return middle * (1 - slack), middle * (1 + slack)
