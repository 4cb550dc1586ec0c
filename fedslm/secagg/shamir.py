"""Shamir's secret sharing of 256-bit secrets over a prime field (Shamir 1979).

Formal guarantees:
    * Fewer than ``threshold`` shares say nothing about the secret: the coefficients are uniform in the
      field, from the operating system.
    * Each share has 33 bytes, whatever its value.
    * With more than ``threshold`` shares, wrong ones are noticed, except with probability 2^-256; up to
      (shares − threshold) / 2 wrong ones are named and left out.

Python's whole numbers do not run in constant time: this hides secrets from peers and the server, not
from programs that measure this process.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from fedslm.errors import FederationError

PRIME = 2**256 + 297
"""The least prime above 2^256, so that any 256-bit secret is an element of the field."""
SECRET_BYTES, SHARE_BYTES = 32, 33


def split(secret: bytes, threshold: int, points: Sequence[int]) -> list[bytes]:
    """Splits a secret into one share for each point.

    Args:
        secret: 32 bytes.
        threshold: Number of shares that reconstruct it.
        points: Where the shares are: different positive numbers below 2^32, at least ``threshold``.

    Raises:
        FederationError: An argument is out of its range.

    >>> shares = split(bytes(31) + b"*", 2, [1, 2, 3])
    >>> Interpolation((1, 3), 2).secret([shares[0], shares[2]])[-1:]
    b'*'
    """
    if len(secret) != SECRET_BYTES:
        raise FederationError(f"a secret has {SECRET_BYTES} bytes, not {len(secret)}")
    _check(points, threshold)
    coefficients = [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    coefficients.append(int.from_bytes(secret, "big"))
    return [_value_at(coefficients, point).to_bytes(SHARE_BYTES, "big") for point in points]


def is_share(content: bytes) -> bool:
    """Whether bytes are an element of the field in its only encoding."""
    return len(content) == SHARE_BYTES and int.from_bytes(content, "big") < PRIME


@dataclass(frozen=True)
class Interpolation:
    """Reconstruction from the shares at some points; what depends only on these is computed once.

    Attributes:
        points: Where the shares are.
        threshold: Number of shares that reconstruct a secret.

    Raises:
        FederationError: There are fewer points than the threshold, or two are equal.
    """

    points: tuple[int, ...]
    threshold: int

    def __post_init__(self) -> None:
        _check(self.points, self.threshold)

    def secret(self, shares: Sequence[bytes]) -> bytes | None:
        """Reconstructs a secret; None if the shares contradict each other, or give no 256-bit secret.

        With exactly ``threshold`` shares a wrong one cannot be noticed here: compare the secret with a
        commitment to it.

        Args:
            shares: One for each point, in their order.
        """
        values = [int.from_bytes(share, "big") for share in shares]
        if len(values) != len(self.points) or not all(map(is_share, shares)):
            return None
        if sum(w * y for w, y in zip(self._check_weights, values, strict=True)) % PRIME != 0:
            return None
        return _as_secret(sum(w * y for w, y in zip(self._weights, values, strict=False)) % PRIME)

    def corrected(self, shares: Sequence[bytes]) -> tuple[bytes, tuple[int, ...]] | None:
        """Reconstructs a secret although some shares are wrong (Berlekamp and Welch 1986).

        Args:
            shares: One for each point, in their order.

        Returns:
            The secret and the points of the wrong shares: at most half of those beyond the threshold.
            None if more are wrong.
        """
        good = {
            x: int.from_bytes(y, "big") for x, y in zip(self.points, shares, strict=True) if is_share(y)
        }
        if len(good) < self.threshold:
            return None
        polynomial = _decoded(good, self.threshold)
        secret = None if polynomial is None else _as_secret(polynomial[-1])
        if polynomial is None or secret is None:
            return None
        wrong = tuple(x for x in self.points if x not in good or _value_at(polynomial, x) != good[x])
        return secret, wrong

    @cached_property
    def _weights(self) -> tuple[int, ...]:
        """Lagrange's weights at 0 of the first ``threshold`` points."""
        points = self.points[: self.threshold]
        return tuple(
            prod(other for other in points if other != point)
            * pow(prod(other - point for other in points if other != point), -1, PRIME)
            % PRIME
            for point in points
        )

    @cached_property
    def _check_weights(self) -> tuple[int, ...]:
        """A random word of the dual code: its product with values on one polynomial is 0.

        A polynomial of degree below t is orthogonal to v_i·g(x_i), v_i = 1/Π(x_i − x_j), for each g of
        degree below n − t; with a random g other values pass with probability 1/PRIME (Cascudo and
        David 2017, "SCRAPE", ePrint 2017/216, lemma 1).
        """
        spare = len(self.points) - self.threshold
        random = [secrets.randbelow(PRIME) for _ in range(spare)]
        return tuple(
            _value_at(random, point)
            * pow(prod(point - other for other in self.points if other != point), -1, PRIME)
            % PRIME
            for point in self.points
        )


def _check(points: Sequence[int], threshold: int) -> None:
    """Refuses points that are not different, or fewer than the threshold."""
    if not 1 <= threshold <= len(points):
        raise FederationError(
            f"threshold={threshold} must be from 1 to the number of shares, {len(points)}"
        )
    if len(set(points)) != len(points) or not all(0 < point < 1 << 32 for point in points):
        raise FederationError("the points of shares must be different, and from 1 to 2^32 - 1")


def _as_secret(value: int) -> bytes | None:
    """A field element as a secret; None if it is too large for one."""
    return value.to_bytes(SECRET_BYTES, "big") if value < 1 << 8 * SECRET_BYTES else None


def _value_at(coefficients: Sequence[int], point: int) -> int:
    """A polynomial's value by Horner's rule; the constant coefficient is the last."""
    value = 0
    for coefficient in coefficients:
        value = (value * point + coefficient) % PRIME
    return value


def _decoded(values: Mapping[int, int], threshold: int) -> list[int] | None:
    """The polynomial of degree below ``threshold`` through all but a few values; None if there is none.

    Berlekamp and Welch: with e errors, E(x)·y = Q(x) at each point, where E has degree e and leading
    coefficient 1 and Q has degree below threshold + e. Then the polynomial is Q / E.
    """
    errors = (len(values) - threshold) // 2
    num_q = threshold + errors
    rows = []
    for x, y in values.items():
        powers = [pow(x, power, PRIME) for power in range(num_q)]
        rows.append([*powers, *(-y * powers[k] for k in range(errors)), y * pow(x, errors, PRIME)])
    solution = _solved(rows)
    if solution is None:
        return None
    divisor = [1, *reversed(solution[num_q:])]
    return _quotient(list(reversed(solution[:num_q])), divisor)


def _solved(rows: list[list[int]]) -> list[int] | None:
    """A solution of linear equations modulo PRIME (Gauss and Jordan); free unknowns are 0."""
    unknowns = len(rows[0]) - 1
    pivots: list[int] = []
    for column in range(unknowns):
        done = len(pivots)
        found = next((i for i in range(done, len(rows)) if rows[i][column] % PRIME), None)
        if found is None:
            continue
        rows[done], rows[found] = rows[found], rows[done]
        scale = pow(rows[done][column], -1, PRIME)
        rows[done] = [value * scale % PRIME for value in rows[done]]
        for i, row in enumerate(rows):
            if i != done and (factor := row[column] % PRIME):
                rows[i] = [(a - factor * b) % PRIME for a, b in zip(row, rows[done], strict=True)]
        pivots.append(column)
    if any(row[-1] % PRIME for row in rows[len(pivots) :]):
        return None
    solution = [0] * unknowns
    for row, column in zip(rows, pivots, strict=False):
        solution[column] = row[-1]
    return solution


def _quotient(dividend: list[int], divisor: list[int]) -> list[int] | None:
    """Quotient of polynomials, highest coefficient first; None if the division leaves a rest."""
    rest, quotient = list(dividend), []
    for i in range(len(dividend) - len(divisor) + 1):
        factor = rest[i] % PRIME
        quotient.append(factor)
        for k, coefficient in enumerate(divisor):
            rest[i + k] = (rest[i + k] - factor * coefficient) % PRIME
    return None if any(rest) else quotient
