"""Tests of bootstrap intervals: against scipy, a closed form, and the coverage that they promise."""

from __future__ import annotations

import math
from dataclasses import astuple

import numpy as np
import pytest
import scipy.stats
from numpy.typing import NDArray

from fedslm.errors import DataError
from fedslm.inference import bootstrap
from fedslm.inference.bootstrap import Comparison, Draws, compare

Values = NDArray[np.float64]


def mean_of(sums: bootstrap.Statistics) -> dict[str, float]:
    """A mean from sums."""
    return {"mean": float(sums["value"]) / float(sums["records"])}


def statistics(values: Values) -> dict[str, Values]:
    """Values as statistics of examples."""
    return {"value": values, "records": np.ones(len(values))}


def f1_of(sums: bootstrap.Statistics) -> dict[str, float]:
    """Macro F1 from counts by class, as a metric that is no mean."""
    whole = sums["guessed"] + sums["actual"]
    return {"f1": float(np.mean(2 * sums["right"] / np.maximum(whole, 1)))}


def counts(guesses: Values, labels: Values, classes: int = 3) -> dict[str, Values]:
    """One-hot counts of guesses and labels."""
    guessed, actual = np.eye(classes)[guesses], np.eye(classes)[labels]
    return {"guessed": guessed, "actual": actual, "right": guessed * actual}


def of_one(values: Values, resamples: int = 2000, seed: int = 0) -> Comparison:
    """The mean of values, compared with itself."""
    pair = (statistics(values), statistics(values))
    return compare(pair, mean_of, Draws(resamples, seed))["mean"]


def test_a_mean_has_its_normal_interval() -> None:
    """On many values the interval is mean ± 1.96 standard errors."""
    values = np.random.default_rng(0).normal(3.0, 2.0, 1500)
    found = of_one(values, 4000).tuned
    error = values.std() / math.sqrt(len(values))
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


def test_a_ratio_of_sums_agrees_with_scipy() -> None:
    """Macro F1 on few examples: scipy's percentile bootstrap gives the same interval."""
    generator = np.random.default_rng(1)
    labels = generator.integers(0, 3, 60)
    guesses = np.where(generator.random(60) < 0.7, labels, generator.integers(0, 3, 60))

    def by_scipy(rows: Values) -> float:
        sums = {k: v.sum(axis=0) for k, v in counts(guesses[rows], labels[rows]).items()}
        return f1_of(sums)["f1"]

    expected = scipy.stats.bootstrap(
        (np.arange(60),), by_scipy, n_resamples=4000, method="percentile", vectorized=False, rng=5
    ).confidence_interval
    ours = counts(guesses, labels)
    found = compare((ours, ours), f1_of, Draws(4000, 0))["f1"].tuned
    assert found.low == pytest.approx(expected.low, abs=0.012)
    assert found.high == pytest.approx(expected.high, abs=0.012)


def test_a_paired_difference_agrees_with_scipy() -> None:
    """Both models see the same draw: the difference is much surer than either value."""
    generator = np.random.default_rng(2)
    base = generator.normal(0, 1, 200)
    tuned = base + generator.normal(0.1, 0.05, 200)
    found = compare((statistics(base), statistics(tuned)), mean_of, Draws(4000, 0))["mean"]
    expected = scipy.stats.bootstrap(
        (tuned - base,), np.mean, n_resamples=4000, method="percentile", rng=6
    ).confidence_interval
    assert found.difference.value == pytest.approx(float((tuned - base).mean()))
    assert found.difference.low == pytest.approx(expected.low, abs=0.001)
    assert found.difference.high == pytest.approx(expected.high, abs=0.001)
    assert found.tuned.high - found.tuned.low > 5 * (found.difference.high - found.difference.low)


def test_equal_models_differ_by_nothing() -> None:
    """A model beside itself: zero, surely."""
    found = of_one(np.random.default_rng(3).normal(0, 1, 50)).difference
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)


def test_a_seed_repeats_and_memory_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same seed gives the same bits; cut into pieces, the same up to rounding; another does not."""
    values = np.random.default_rng(4).normal(0, 1, 40)
    whole = of_one(values, 1000)
    assert of_one(values, 1000) == whole
    monkeypatch.setattr(bootstrap, "_MOST_COUNTS", 300)
    pieces = of_one(values, 1000)
    for name in ("base", "tuned", "difference"):  # a BLAS may add up another shape in another order
        found, expected = astuple(getattr(pieces, name)), astuple(getattr(whole, name))
        assert found == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert abs(of_one(values, 1000, seed=1).base.low - whole.base.low) > 1e-6


def test_an_undefined_metric_leaves_its_resample_out() -> None:
    """Where no drawn example has a word, there is no rate of words; the others still count."""

    def rate_of(sums: bootstrap.Statistics) -> dict[str, float]:
        words = float(sums["words"])
        return {"rate": float(sums["right"]) / words} if words else {}

    rare = {"words": np.array([1.0, 1, 0, 0, 0]), "right": np.array([1.0, 0, 0, 0, 0])}
    found = compare((rare, rare), rate_of, Draws(1000, 0))["rate"].tuned
    assert (found.value, found.low, found.high) == (0.5, 0.0, 1.0)


def test_a_single_example_has_no_width() -> None:
    """One example is drawn every time."""
    found = of_one(np.array([0.25])).tuned
    assert (found.value, found.low, found.high) == (0.25, 0.25, 0.25)


@pytest.mark.parametrize(("base", "tuned"), [(0, 0), (3, 4)])
def test_what_cannot_be_compared_is_refused(base: int, tuned: int) -> None:
    """No examples, or two numbers of them, give no figure."""
    pair = (statistics(np.zeros(base)), statistics(np.zeros(tuned)))
    with pytest.raises(DataError, match=f"{base} and {tuned} examples"):
        compare(pair, mean_of, Draws(1000, 0))


@pytest.mark.slow
def test_intervals_cover_what_they_promise() -> None:
    """Of 600 studies with a known rate, 95 % (within sampling error) hold it in their interval."""
    generator = np.random.default_rng(7)
    hits = 0
    for study in range(600):
        found = of_one((generator.random(200) < 0.3).astype(float), 1000, study).tuned
        hits += found.low <= 0.3 <= found.high
    assert 0.92 <= hits / 600 <= 0.975
