"""Bootstrap confidence: percentile intervals of metrics from resampled examples."""

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
    """A metric on all examples, with its bootstrap interval.

    Attributes:
        value: Metric on the original examples.
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
        base: Estimate of the base model.
        tuned: Estimate of the trained model.
        difference: tuned − base, from paired resamples: both models use the same draw of examples.
    """

    base: Estimate
    tuned: Estimate
    difference: Estimate


@dataclass(frozen=True)
class Draws:
    """Settings of the bootstrap resampling.

    Attributes:
        resamples: Number of resamples, each of the original size; >= 1000 for a stable interval.
        seed: Seed of the resampling.
    """

    resamples: int
    seed: int


def compare(
    pair: tuple[Statistics, Statistics], metrics_of: MetricsOf, draws: Draws
) -> dict[str, Comparison]:
    """Returns metrics of two models with bootstrap intervals, and the paired interval of the gain.

    Args:
        pair: Per-example statistics of the base and of the trained model: name to an array
            (examples, …), for the same examples in the same order.
        metrics_of: Turns summed statistics into metrics.
        draws: Settings of the resampling, which is with replacement.

    Returns:
        Metric to comparison. A resample on which a metric is undefined is skipped for that metric.

    Raises:
        DataError: There are no examples, or the two models have different numbers of them.

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
    """Returns the number of examples."""
    return min((len(values) for values in statistics.values()), default=0)


def _weights(count: int, draws: Draws) -> Iterator[NDArray[np.float64]]:
    """Yields draw counts per example, shape (some resamples, examples), in chunks that fit memory."""
    generator = stream(draws.seed, "bootstrap")
    rows = max(1, _MOST_COUNTS // count)
    for start in range(0, draws.resamples, rows):
        size = min(rows, draws.resamples - start)
        chosen = generator.integers(count, size=(size, count))
        yield np.stack([np.bincount(row, minlength=count) for row in chosen]).astype(np.float64)


def _weighted_sums(
    statistics: Statistics, weights: NDArray[np.float64]
) -> Iterator[dict[str, NDArray[np.float64]]]:
    """Returns the summed statistics of each resample."""
    sums = {name: np.tensordot(weights, values, axes=1) for name, values in statistics.items()}
    for row in range(len(weights)):
        yield {name: values[row] for name, values in sums.items()}


def _estimate(value: float, drawn: NDArray[np.float64]) -> Estimate:
    """Returns a value with the percentile interval of its resamples."""
    defined = drawn[np.isfinite(drawn)]
    if len(defined) == 0:
        return Estimate(value, math.nan, math.nan)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(defined, (tail, 1 - tail))
    return Estimate(value, float(low), float(high))
