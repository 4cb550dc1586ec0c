"""How sure a metric is: percentile intervals from examples drawn anew."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedslm.errors import DataError
from fedslm.rng import stream

Statistics = Mapping[str, NDArray[np.float64]]
MetricsOf = Callable[[Statistics], dict[str, float]]
CONFIDENCE = 0.95
_MOST_COUNTS = 4_000_000


@dataclass(frozen=True)
class Estimate:
    """A metric on all examples, with its interval.

    Attributes:
        value: On the examples as they are.
        low: 2.5 % quantile over the resamples.
        high: 97.5 % quantile over the resamples.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """A metric of two models on the same examples.

    Attributes:
        base: Of the base model.
        tuned: Of the trained one.
        difference: tuned − base, from paired resamples: both see the same draw of examples.
    """

    base: Estimate
    tuned: Estimate
    difference: Estimate


@dataclass(frozen=True)
class Draws:
    """How examples are drawn anew.

    Attributes:
        resamples: How often, each time as many as there are; >= 1000 for a steady interval.
        seed: Seed of the draws.
    """

    resamples: int
    seed: int


def compare(
    pair: tuple[Statistics, Statistics], metrics_of: MetricsOf, draws: Draws
) -> dict[str, Comparison]:
    """Metrics of two models with bootstrap intervals, and the paired interval of their difference.

    Args:
        pair: Statistics of each example under the base and under the trained model: name to an array
            (examples, …), of the same examples in the same order.
        metrics_of: Turns added-up statistics into metrics.
        draws: How examples are drawn anew, with replacement.

    Returns:
        Metric to comparison. A metric that is undefined on a resample leaves that resample out.

    Raises:
        DataError: There is no example, or the two differ in number.

    References:
        Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.
    """
    counts = [_count(each) for each in pair]
    if counts[0] == 0 or counts[0] != counts[1]:
        raise DataError(f"{counts[0]} and {counts[1]} examples cannot be compared; give at least one")
    whole = [metrics_of({k: v.sum(axis=0) for k, v in each.items()}) for each in pair]
    names = [name for name in whole[1] if name in whole[0]]
    drawn: list[list[list[float]]] = [[], []]
    for weights in _weights(counts[0], draws):
        for rows, statistics in zip(drawn, pair, strict=True):
            for sums in _weighted_sums(statistics, weights):
                found = metrics_of(sums)
                rows.append([found.get(name, math.nan) for name in names])
    first, second = (np.array(rows) for rows in drawn)
    return {
        name: Comparison(
            _estimate(whole[0][name], first[:, at]),
            _estimate(whole[1][name], second[:, at]),
            _estimate(whole[1][name] - whole[0][name], second[:, at] - first[:, at]),
        )
        for at, name in enumerate(names)
    }


def _count(statistics: Statistics) -> int:
    """Number of examples."""
    return min((len(values) for values in statistics.values()), default=0)


def _weights(count: int, draws: Draws) -> Iterator[NDArray[np.float64]]:
    """How often each example is drawn, shape (some resamples, examples), in pieces that fit memory."""
    generator = stream(draws.seed, "bootstrap")
    rows = max(1, _MOST_COUNTS // count)
    for start in range(0, draws.resamples, rows):
        size = min(rows, draws.resamples - start)
        chosen = generator.integers(count, size=(size, count))
        yield np.stack([np.bincount(row, minlength=count) for row in chosen]).astype(np.float64)


def _weighted_sums(
    statistics: Statistics, weights: NDArray[np.float64]
) -> Iterator[dict[str, NDArray[np.float64]]]:
    """The added-up statistics of each resample."""
    sums = {name: np.tensordot(weights, values, axes=1) for name, values in statistics.items()}
    for row in range(len(weights)):
        yield {name: values[row] for name, values in sums.items()}


def _estimate(value: float, drawn: NDArray[np.float64]) -> Estimate:
    """A value with the percentile interval of its resamples."""
    defined = drawn[np.isfinite(drawn)]
    if len(defined) == 0:
        return Estimate(value, math.nan, math.nan)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(defined, (tail, 1 - tail))
    return Estimate(value, float(low), float(high))
