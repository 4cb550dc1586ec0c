"""Rules that withstand hostile clients: all clients' updates count equally, whatever their weight.

The rules compare updates by coordinate or by distance, so coordinates must mean the same for all
clients: this holds for the methods that freeze one factor (ffa, rolora, fed-sb).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import assert_never

import numpy as np
from numpy.typing import NDArray

from fedslm.aggregation.product import Matrix
from fedslm.aggregation.update_file import Spool
from fedslm.config import RuleName
from fedslm.errors import FederationError
from fedslm.records import AdapterState

_STEPS, _TINY = 2000, 1e-12


def required_clients(rule: RuleName, num_byzantine: int) -> int:
    """Returns the number of clients that a rule needs in a round to withstand this many hostile ones.

    >>> [required_clients(rule, 2) for rule in ("median", "krum", "bulyan")]
    [5, 7, 11]
    """
    match rule:
        case "mean":
            return 1
        case "median" | "trimmed-mean" | "geometric-median":
            return 2 * num_byzantine + 1
        case "krum" | "multi-krum":
            return 2 * num_byzantine + 3
        case "bulyan":
            return 4 * num_byzantine + 3
        case _:
            assert_never(rule)


def still_hostile(rule: RuleName, num_byzantine: int, count: int, silent: int) -> int:
    """Returns how many of the clients that answered may be hostile.

    This is ``num_byzantine``, as long as enough clients answer. If too few do, silence counts as a
    fault, as in Byzantine agreement: otherwise hostile clients could stop a run by not answering.

    Args:
        rule: The rule.
        num_byzantine: f, of the whole cohort.
        count: Clients that answered with a usable update.
        silent: Clients that did not.

    >>> still_hostile("median", 2, 5, 0), still_hostile("median", 2, 4, 1)
    (2, 1)
    """
    return (
        num_byzantine
        if count >= required_clients(rule, num_byzantine)
        else max(0, num_byzantine - silent)
    )


def combine(rule: RuleName, spool: Spool, num_byzantine: int, shrink: Sequence[float]) -> AdapterState:
    """Combines the updates by a robust rule.

    Of n updates uₖ at most f are hostile; :func:`required_clients` is the n that each rule assumes.
        * median, n > 2f: of each coordinate; it is within the range of the honest values.
        * trimmed-mean, n > 2f: of each coordinate, the mean without the f lowest and the f highest; all
          kept values are within that range.
        * geometric-median, n > 2f: argmin over z of Σ ‖uₖ - z‖; a minority moves it a bounded distance.
        * krum, n > 2f + 2: the uₖ with the least Σ ‖uₖ - uⱼ‖² over its n - f - 2 nearest uⱼ.
        * multi-krum, n > 2f + 2: the mean of the n - f updates with the least such scores.
        * bulyan, n > 4f + 2: θ = n - 2f selected by Krum; of each coordinate the mean of the θ - 2f
          nearest to their median, since a distance does not bound a single coordinate.

    Args:
        rule: Any rule except the mean.
        spool: The updates, of one rank.
        num_byzantine: f, the largest number of clients that may be hostile.
        shrink: Each update's factor in (0, 1] (the norm bound), which is applied first.

    Returns:
        The combined difference.

    Raises:
        FederationError: There are too few updates for the rule.

    References:
        Median, trimmed mean: Yin et al. 2018 (arXiv 1803.01498). Krum, Multi-Krum: Blanchard et al.
        2017 (arXiv 1703.02757). Bulyan: El Mhamdi et al. 2018 (arXiv 1802.07927). Geometric median:
        Pillutla et al. 2022 (arXiv 1912.13445).
    """
    needed = required_clients(rule, num_byzantine)
    if spool.count < needed:
        raise FederationError(
            f"{spool.count} updates came; aggregation.rule={rule!r} needs {needed} with "
            f"aggregation.num_byzantine={num_byzantine}"
        )
    scale = np.asarray(shrink, np.float64)[:, None]
    f = num_byzantine
    match rule:
        case "mean":
            raise FederationError("the mean is not a robust rule")
        case "median":
            return _by_column(spool, scale, lambda values: np.median(values, axis=0))
        case "trimmed-mean":
            return _by_column(spool, scale, lambda values: _trimmed(values, f))
        case "krum":
            chosen = krum_order(spool.square_distances(scale), f)[:1]
        case "multi-krum":
            chosen = krum_order(spool.square_distances(scale), f)[: spool.count - f]
        case "bulyan":
            selected = bulyan_selection(spool.square_distances(scale), f)
            return _by_column(spool, scale, lambda values: _around_median(values[selected], f))
        case "geometric-median":
            weights = _weiszfeld(spool.gram(scale))
            return _by_column(spool, scale, lambda values: weights @ values)
        case _:
            assert_never(rule)
    return _by_column(spool, scale, lambda values: values[chosen].mean(axis=0))


def krum_order(square_distances: Matrix, num_byzantine: int) -> NDArray[np.intp]:
    """Orders clients from the lowest Krum score: the sum over the n - f - 2 nearest others.

    Ties (of two that are each other's nearest, for instance) go to the client whose next neighbours are
    nearer, so that the order of clients does not decide; equal clients are ordered by index.
    """
    count = len(square_distances)
    others = np.sort(square_distances + np.diag([np.inf] * count), axis=1)
    nearest = max(1, count - num_byzantine - 2)
    return np.lexsort((*others.T[::-1], others[:, :nearest].sum(axis=1)))


def bulyan_selection(square_distances: Matrix, num_byzantine: int) -> list[int]:
    """Selects n - 2f clients: Krum picks one at a time from those that remain.

    The number of neighbours in Krum shrinks with the set, and is never below one.
    """
    left = list(range(len(square_distances)))
    chosen: list[int] = []
    while len(chosen) < len(square_distances) - 2 * num_byzantine:
        inner = square_distances[np.ix_(left, left)]
        best = int(krum_order(inner, num_byzantine)[0]) if len(left) > 1 else 0
        chosen.append(left.pop(best))
    return sorted(chosen)


def _by_column(spool: Spool, scale: Matrix, rule: Callable[[Matrix], Matrix]) -> AdapterState:
    """Applies a rule to all updates, a block of coordinates at a time."""
    parts = [rule(values) for _, values in spool.columns(scale=scale)]
    return spool.unflatten(np.concatenate(parts))


def _trimmed(values: Matrix, num_byzantine: int) -> Matrix:
    """Returns the mean without the f lowest and the f highest values of each coordinate."""
    kept: Matrix = np.sort(values, axis=0)[num_byzantine : len(values) - num_byzantine]
    mean: Matrix = kept.mean(axis=0)
    return mean


def _around_median(values: Matrix, num_byzantine: int) -> Matrix:
    """Returns the mean of the θ - 2f values of each coordinate that are nearest to its median."""
    kept = max(1, len(values) - 2 * num_byzantine)
    values = np.sort(values, axis=0)  # ties go to the lower value, whoever sent it
    order = np.argsort(np.abs(values - np.median(values, axis=0)), axis=0, kind="stable")[:kept]
    mean: Matrix = np.take_along_axis(values, order, axis=0).mean(axis=0)
    return mean


def _weiszfeld(gram: Matrix) -> Matrix:
    """Returns the geometric median's weights: it is a mean of updates, so inner products suffice."""
    count = len(gram)
    weights = np.full(count, 1 / count)
    longest = float(np.diag(gram).max())
    if longest == 0:
        return weights
    for _ in range(_STEPS):
        # z = Σ wⱼuⱼ: ‖uₖ - z‖² = Gₖₖ - 2(Gw)ₖ + wᵀGw; a step sets wₖ in proportion to 1 / ‖uₖ - z‖.
        square = np.diag(gram) - 2 * gram @ weights + weights @ gram @ weights
        inverse = 1 / np.sqrt(np.maximum(square, _TINY * longest))
        moved = inverse / inverse.sum()
        if float(np.abs(moved - weights).max()) < _TINY:
            break
        weights = moved
    return weights
