"""Tests of the shares: against another implementation, wrong shares, and what too few say."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedslm.errors import FederationError
from fedslm.secagg.shamir import PRIME, SHARE_BYTES, Interpolation, is_share, split

SECRETS = st.binary(min_size=32, max_size=32)


def numbers(shares: list[bytes]) -> list[int]:
    """Shares as whole numbers."""
    return [int.from_bytes(share, "big") for share in shares]


def evaluated(coefficients: list[int], point: int) -> bytes:
    """A polynomial's value, term by term; the constant coefficient is the first."""
    value = sum(c * point**k for k, c in enumerate(coefficients)) % PRIME
    return value.to_bytes(SHARE_BYTES, "big")


def by_fractions(points: list[int], values: list[int]) -> int:
    """The value at 0 by Lagrange's formula in exact fractions, then modulo PRIME: another way."""
    total = Fraction(0)
    for x, y in zip(points, values, strict=True):
        term = Fraction(y)
        for other in points:
            if other != x:
                term *= Fraction(-other, x - other)
        total += term
    return total.numerator * pow(total.denominator, -1, PRIME) % PRIME


def is_prime(number: int) -> bool:
    """Miller and Rabin's test with 40 bases."""
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in range(2, 42):
        value = pow(base, odd, number)
        if value in (1, number - 1):
            continue
        for _ in range(twos - 1):
            value = value * value % number
            if value == number - 1:
                break
        else:
            return False
    return True


def test_the_field_holds_every_secret() -> None:
    """PRIME is the least prime above 2^256."""
    assert is_prime(PRIME)
    assert not any(is_prime(number) for number in range(2**256 + 1, PRIME, 2))
    assert is_prime(2**127 - 1)
    assert not is_prime(2**127 + 1)


@settings(deadline=None, max_examples=50)
@given(SECRETS, st.data())
def test_another_implementation_agrees(secret: bytes, data: st.DataObject) -> None:
    """Our shares give the secret by exact fractions; shares of another polynomial give it by us."""
    points = data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=12, unique=True))
    threshold = data.draw(st.integers(1, len(points)))
    shares = split(secret, threshold, points)
    chosen = data.draw(st.permutations(range(len(points))))[:threshold]
    found = by_fractions([points[i] for i in chosen], [numbers(shares)[i] for i in chosen])
    assert found == int.from_bytes(secret, "big")
    others = data.draw(
        st.lists(st.integers(0, PRIME - 1), min_size=threshold - 1, max_size=threshold - 1)
    )
    made = [evaluated([int.from_bytes(secret, "big"), *others], point) for point in points]
    assert Interpolation(tuple(points), threshold).secret(made) == secret


def test_every_threshold_of_shares_is_enough() -> None:
    """Any 3 of 5 shares, and any 4, and all."""
    secret, points = bytes(range(32)), (1, 2, 3, 4, 5)
    shares = split(secret, 3, points)
    for count in (3, 4, 5):
        for chosen in itertools.combinations(range(5), count):
            found = Interpolation(tuple(points[i] for i in chosen), 3).secret(
                [shares[i] for i in chosen]
            )
            assert found == secret


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32, b"\x00" * 31 + b"\x01"])
def test_too_few_shares_fit_every_secret(secret: bytes) -> None:
    """With one share less, each candidate secret leaves exactly one last share: none is excluded."""
    points = (1, 2, 3, 4)
    shares = split(secret, 4, points)[:3]
    for candidate in (bytes(32), b"\xff" * 32, b"\x2a" * 32):
        values = [int.from_bytes(candidate, "big"), *numbers(shares)]
        last = sum(
            y * pow(by_product(x, (0, 1, 2, 3)), -1, PRIME) * by_product(4, (0, 1, 2, 3), without=x)
            for x, y in zip((0, 1, 2, 3), values, strict=True)
        )
        fitting = [*shares, (last % PRIME).to_bytes(SHARE_BYTES, "big")]
        assert Interpolation(points, 4).secret(fitting) == candidate


def by_product(x: int, points: tuple[int, ...], without: int | None = None) -> int:
    """The product of x − other over the other points."""
    result = 1
    for other in points:
        if other != (x if without is None else without):
            result *= x - other
    return result


def test_shares_are_fresh_and_have_one_length() -> None:
    """Two splits share no share; each has 33 bytes."""
    first, second = (split(bytes(32), 2, range(1, 101)) for _ in range(2))
    assert not set(first) & set(second)
    assert {len(share) for share in first} == {SHARE_BYTES}
    assert (
        split(b"\x07" * 32, 1, [1, 2]) == [b"\x00" + b"\x07" * 32] * 2
    )  # a threshold of 1 hides nothing


def test_a_uniform_share_has_uniform_bits() -> None:
    """Over 400 splits of zero each of 256 bits is set about half of the time: 7.5 sigma, of all bits."""
    shares = [int.from_bytes(split(bytes(32), 2, [1, 2])[0], "big") for _ in range(400)]
    counts = [sum(share >> bit & 1 for share in shares) for bit in range(256)]
    assert all(abs(count - 200) <= 75 for count in counts)


@pytest.mark.parametrize("count", [5, 6, 7, 9])
def test_wrong_shares_are_noticed_and_named(count: int) -> None:
    """With a threshold of 4, up to half of the spare shares are found wherever they are."""
    secret, points = b"\x05" * 32, tuple(range(1, count + 1))
    interpolation = Interpolation(points, 4)
    good = split(secret, 4, points)
    for wrong in itertools.chain.from_iterable(
        itertools.combinations(range(count), k) for k in range(1, (count - 4) // 2 + 1)
    ):
        shares = [bytes(33) if i in wrong else share for i, share in enumerate(good)]
        assert interpolation.secret(shares) is None
        assert interpolation.corrected(shares) == (secret, tuple(points[i] for i in wrong))
    assert interpolation.corrected(good) == (secret, ())


def test_more_wrong_shares_than_can_be_named() -> None:
    """They are noticed; with no spare share they are not, which a commitment must do."""
    points, secret = (1, 2, 3, 4, 5), b"\x05" * 32
    good = split(secret, 4, points)
    shares = [bytes(33), *good[1:]]
    assert Interpolation(points, 4).secret(shares) is None  # noticed
    assert Interpolation(points, 4).corrected(shares) is None  # by whom is not known
    unnoticed = Interpolation(points[:4], 4).secret(shares[:4])
    assert unnoticed != secret


def test_shares_that_are_not_of_the_field() -> None:
    """A wrong length or a number beyond the field is never reduced."""
    points = (1, 2, 3, 4)
    good = split(b"\x05" * 32, 2, points)
    for bad in (b"", bytes(32), bytes(34), PRIME.to_bytes(33, "big"), b"\xff" * 33):
        assert not is_share(bad)
        shares = [bad, *good[1:]]
        assert Interpolation(points, 2).secret(shares) is None
        assert Interpolation(points, 2).corrected(shares) == (b"\x05" * 32, (1,))
    assert is_share((PRIME - 1).to_bytes(33, "big"))
    assert Interpolation((1, 2), 1).secret([(PRIME - 1).to_bytes(33, "big")] * 2) is None  # too large
    assert Interpolation((1, 2), 1).secret(good[:1]) is None
    assert Interpolation((1, 2), 2).corrected([b"", b""]) is None


@pytest.mark.parametrize(
    ("secret", "threshold", "points"),
    [
        (bytes(31), 1, [1]),
        (bytes(33), 1, [1]),
        (bytes(32), 3, [1, 2]),  # t > n
        (bytes(32), 0, [1, 2]),
        (bytes(32), 1, [1, 1]),
        (bytes(32), 1, [0, 1]),
        (bytes(32), 1, [1, 1 << 32]),
    ],
)
def test_what_cannot_be_shared(secret: bytes, threshold: int, points: list[int]) -> None:
    """Secrets of another length, thresholds above the number of shares, points that are equal or 0."""
    with pytest.raises(FederationError):
        split(secret, threshold, points)
    if len(secret) == 32:
        with pytest.raises(FederationError):
            Interpolation(tuple(points), threshold)
