"""Tests of discrete Gaussian noise: its law, exactly, and that another law would be noticed."""

from __future__ import annotations

import copy
import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from fedslm.errors import PrivacyError
from fedslm.privacy import discrete
from fedslm.privacy.discrete import DiscreteGaussian

CHANCE = 1e-6  # how often a test of a true hypothesis may fail
COUNT = 60_000


def law(variance: int, reach: int) -> np.ndarray:
    """Probabilities of -reach to reach by direct summation; the rest is negligible."""
    weights = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * variance))
    return weights / weights.sum()


def fit(values: np.ndarray, variance: int) -> float:
    """P-value of a chi-square test against the exact law."""
    reach = math.isqrt(variance) * 12 + 3
    expected = law(variance, reach) * len(values)
    seen = np.bincount(values + reach, minlength=2 * reach + 1)
    rare = expected < 10
    pairs = [(seen[~rare], expected[~rare])]
    if rare.any():
        pairs.append((seen[rare].sum(keepdims=True), expected[rare].sum(keepdims=True)))
    own, law_own = (np.concatenate(each) for each in zip(*pairs, strict=True))
    return float(stats.chisquare(own, law_own * own.sum() / law_own.sum()).pvalue)


@pytest.mark.parametrize("variance", [1, 2, 9, 400])
def test_small_noise_has_the_exact_law(variance: int) -> None:
    """Every whole number comes as often as direct summation says."""
    assert fit(DiscreteGaussian().draw(COUNT, variance), variance) > CHANCE


@pytest.mark.parametrize("other", [4, 20])
def test_another_variance_is_noticed(other: int) -> None:
    """Power: two thirds, or three halves, of the standard deviation fail the same test."""
    assert fit(DiscreteGaussian().draw(COUNT, other), 9) < CHANCE


def test_a_rounded_normal_is_noticed() -> None:
    """Power: a rounded normal of the same variance has another law where the variance is small."""
    values = np.rint(np.random.default_rng(0).normal(0, 1, COUNT)).astype(np.int64)
    assert fit(values, 1) < CHANCE


@pytest.mark.parametrize("variance", [3 * 10**9, 2**60 - 1])
def test_large_noise_is_normal(variance: int) -> None:
    """At many grid steps the law is that of a normal; two thirds and three halves of it are not."""
    values = DiscreteGaussian().draw(COUNT, variance) / math.sqrt(variance)
    assert stats.kstest(values, "norm").pvalue > CHANCE
    for factor in (2 / 3, 3 / 2):
        assert stats.kstest(values * factor, "norm").pvalue < CHANCE


@pytest.mark.parametrize("variance", [1, 5, 10_000])
def test_moments_are_those_of_direct_summation(variance: int) -> None:
    """Mean, variance and fourth moment are within five standard errors of the exact sums."""
    values = DiscreteGaussian().draw(COUNT, variance).astype(np.float64)
    reach = math.isqrt(variance) * 14 + 3
    support, weights = np.arange(-reach, reach + 1.0), law(variance, reach)
    for power in (1, 2, 4):
        exact = float((weights * support**power).sum())
        spread = math.sqrt(float((weights * support ** (2 * power)).sum()) - exact**2)
        assert abs((values**power).mean() - exact) < 5.5 * spread / math.sqrt(COUNT)


def test_values_are_independent() -> None:
    """Neither signs nor sizes of neighbouring values are related."""
    values = DiscreteGaussian().draw(COUNT, 10**8).astype(np.float64)
    for part in (values, np.abs(values)):
        assert abs(np.corrcoef(part[:-1], part[1:])[0, 1]) < 5.5 / math.sqrt(COUNT)


class Scripted:
    """A stream with known words."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)

    def words(self, count: int) -> np.ndarray:
        """The next words."""
        return self._generator.integers(0, 2**64, count, dtype=np.uint64)


def scripted(seed: int) -> DiscreteGaussian:
    """A sampler with known words."""
    sampler = DiscreteGaussian()
    sampler._stream = Scripted(seed)  # type: ignore[assignment]
    return sampler


@pytest.mark.parametrize("variance", [1, 7, 10**6, 2**60])
def test_float64_decides_as_exact_arithmetic_does(
    variance: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If every decision is made with exact fractions, the same words give the same values."""
    quick = scripted(1).draw(40, variance)
    monkeypatch.setattr(discrete, "_FLOAT_ERROR", 2.0)
    np.testing.assert_array_equal(scripted(1).draw(40, variance), quick)


def test_a_wrong_exponent_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Power: exact decisions with an exponent that is off by two percent give other values."""
    quick = scripted(1).draw(400, 10**6)
    monkeypatch.setattr(discrete, "_FLOAT_ERROR", 2.0)
    exact = discrete._exponent
    monkeypatch.setattr(discrete, "_exponent", lambda *values: exact(*values) * Fraction(51, 50))
    assert (scripted(1).draw(400, 10**6) != quick).any()


@pytest.mark.parametrize("exponent", [Fraction(0), Fraction(1, 3), Fraction(1), Fraction(700, 3)])
def test_the_interval_holds_the_exponential(exponent: Fraction) -> None:
    """Bounds on e^-γ contain the sum of its series, which needs no library."""
    unit = 10**200
    series, term, number = 0, unit, 0
    while term:
        series, number = series + term, number + 1
        term = term * exponent.numerator // (exponent.denominator * number)
    least, most = discrete._interval(exponent, 40)
    assert least < Fraction(unit, series + number) <= Fraction(unit, series) < most
    assert most - least <= most / 10**39


@pytest.mark.parametrize("bound", [1, 2, 3, 2**31 + 1, 2**63])
def test_numbers_below_a_bound_are_uniform(bound: int) -> None:
    """Every share of the range comes equally often."""
    found = DiscreteGaussian()._below(bound, COUNT).astype(np.float64)
    assert found.min() >= 0
    assert found.max() < bound
    if bound <= 3:
        counts = np.bincount(found.astype(int), minlength=bound)
        assert bound == 1 or stats.chisquare(counts).pvalue > CHANCE
    else:
        assert stats.kstest(found / bound, "uniform").pvalue > CHANCE


@pytest.mark.parametrize("variance", [0, -1, 2**60 + 1, 4.0, True, None])
def test_no_release_without_noise(variance: object) -> None:
    """A variance that is not a whole number in its range is refused."""
    with pytest.raises(PrivacyError, match="variance"):
        DiscreteGaussian().draw(3, variance)  # type: ignore[arg-type]


def test_a_sampler_cannot_be_copied() -> None:
    """Noise that is used twice cancels out."""
    with pytest.raises(PrivacyError):
        copy.deepcopy(DiscreteGaussian())


def test_no_values() -> None:
    """Nothing is drawn for nothing."""
    assert DiscreteGaussian().draw(0, 9).shape == (0,)
