"""Precision, recall and F1 from counts."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.float64]


def ratio(part: Any, whole: Any) -> Counts:
    """Returns ``part / whole``, and 0 where ``whole`` is 0.

    >>> ratio(np.array([1.0, 0.0]), np.array([2.0, 0.0])).tolist()
    [0.5, 0.0]
    """
    part, whole = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    found: Counts = np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)
    return found


def f1(right: Any, guessed: Any, actual: Any) -> Counts:
    """Returns the harmonic mean of precision and recall, from counts of hits, guesses and truths.

    >>> float(f1(1.0, 2.0, 2.0))
    0.5
    """
    return ratio(2 * np.asarray(right), np.asarray(guessed) + np.asarray(actual))


def mean_of_present(values: Counts, actual: Counts) -> float:
    """Returns the mean over the classes that occur; 0 if none does."""
    present = actual > 0
    return float(values[present].mean()) if present.any() else 0.0
