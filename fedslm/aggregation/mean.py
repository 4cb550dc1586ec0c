"""The linear primitive: one streaming weighted mean of the updates of a round.

Memory is one adapter, whatever the number of clients. All linear methods are this mean over different
tensors; secure aggregation and client-level privacy need nothing else.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

from fedslm.adapter_keys import part_of
from fedslm.aggregation.ranks import RANK_AXES, rank_of
from fedslm.errors import FederationError
from fedslm.records import AdapterState, ClientUpdate, FloatArray

_BLOCK = 1 << 19  # values, 2 MB: a block is still in the processor's cache when it is added


class WeightedMean:
    """Mean of differences, added one at a time, in a fixed order so that the result is reproducible.

    A client of a lower rank holds the leading rows and columns. Each row and column is averaged over
    the clients that hold it, so that clients without it do not dilute it.

    Args:
        shapes: The trained tensors at the server's rank.
        cohort_ranks: The rank of each client of the cohort, if the mean is over the whole cohort,
            whoever answers (privacy: who is missing may reveal something); if absent, it is over those
            who answered. With the cohort the mean is Σ uₖ / n, n public: a uₖ that moves by C moves it
            by C / n, whoever answers. Over those who answered, one more answer would change the others'
            shares too.

    References:
        McMahan et al. 2017, FedAvg (arXiv 1602.05629). Dilution: arXiv 2602.13486.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], cohort_ranks: Iterable[int] | None = None
    ) -> None:
        size = sum(math.prod(shape) for shape in shapes.values())
        self._sum = AdapterState.of_flat(np.zeros(size, np.float32), shapes)
        self._shapes = self._sum.shapes
        self._is_fixed = cohort_ranks is not None
        self._weights: Counter[int] = Counter(cohort_ranks or ())
        self._square_norms = 0.0
        self._taken: AdapterState | None = None
        self.count = 0

    def add(self, update: ClientUpdate, limit: float = math.inf) -> float:
        """Adds one checked update, scaled down to ``limit`` if its norm is larger (the norm bound).

        Each part is measured and added in one pass, while it is in the processor's cache. The parts of
        an update that were added before its norm exceeded ``limit`` are no longer than ``limit``, so
        subtracting the excess loses no precision, however large the whole is.

        Args:
            update: The update; its tensors may be of a lower rank.
            limit: The largest L2 norm that the update may have in the mean.

        Returns:
            The update's L2 norm before scaling.

        Raises:
            FederationError: The weight is not positive and finite, or is not 1 with the cohort as the
                denominator; or the mean was already taken.
        """
        weight = update.weight
        if not 0 < weight < math.inf or (self._is_fixed and weight != 1):
            raise FederationError(f"client {update.client}: weight={weight} is not allowed")
        if self._taken is not None:
            raise FederationError(f"client {update.client}: the mean was taken already")
        pairs = self._pairs(update.delta)
        square, longest, added = 0.0, limit * limit, 0
        for total, part in pairs:
            square += float(np.vdot(part, part))
            if square <= longest:
                _accumulate(total, part, weight)
                added += 1
        norm = math.sqrt(square)
        if not square <= longest:
            for number, (total, part) in enumerate(pairs):
                _accumulate(total, part, weight * (limit / norm - (number < added)))
        if not self._is_fixed:
            self._weights[rank_of(update.delta)] += weight  # type: ignore[assignment]
        self._square_norms += min(square, longest)
        self.count += 1
        return norm

    def result(self) -> AdapterState:
        """Returns the mean difference; it reuses the sums' memory, so no second adapter is needed.

        Raises:
            FederationError: Nothing was added.
        """
        if self.count == 0:
            raise FederationError("there is no update to average")
        if self._taken is None:
            self._taken = self._mean()
        return self._taken

    def signal_to_noise(self) -> float | None:
        """See :func:`signal_to_noise`; None with fewer than two clients."""
        if self.count < 2:
            return None
        answered = sum(self._weights.values()) / self.count if self._is_fixed else 1.0
        square = (answered * self.result().norm()) ** 2
        return signal_to_noise(self.count, self._square_norms / self.count, square)

    def _pairs(self, update: AdapterState) -> list[tuple[FloatArray, FloatArray]]:
        """Parts of the sum with the update's parts: blocks if both are one buffer, else tensors."""
        ours, theirs = self._sum.flat, update.flat
        if ours is None or theirs is None or update.shapes != self._shapes:
            return [(total, update[key]) for key, total in self._sum.tensors.items()]
        begins = range(0, ours.size, _BLOCK)
        return [(ours[begin : begin + _BLOCK], theirs[begin : begin + _BLOCK]) for begin in begins]

    def _mean(self) -> AdapterState:
        """Returns the mean: each entry over the total weight of the clients that hold it."""
        if len(self._weights) == 1 and self._sum.flat is not None:
            np.divide(self._sum.flat, np.float32(sum(self._weights.values())), out=self._sum.flat)
            return self._sum
        return AdapterState({key: self._of(key, total) for key, total in self._sum.tensors.items()})

    def _of(self, key: str, total: FloatArray) -> FloatArray:
        """Returns the mean of one tensor that clients hold at several ranks."""
        axes = RANK_AXES.get(part_of(key), ())
        if not axes:
            total /= np.float32(sum(self._weights.values()))
            return total
        position = np.indices([total.shape[axis] for axis in axes]).max(axis=0)
        weight = np.zeros(position.shape)
        for rank, of_rank in self._weights.items():
            weight += of_rank * (position < rank)
        shape = [total.shape[axis] if axis in axes else 1 for axis in range(total.ndim)]
        divisor = np.where(weight > 0, weight, 1).reshape(shape)  # no client holds it, so none moved it
        return (total / divisor).astype(np.float32)


def _accumulate(total: FloatArray, tensor: FloatArray, weight: float) -> None:
    """Adds a weighted tensor to a sum's leading rows and columns."""
    if tensor.shape != total.shape:
        total = total[tuple(slice(length) for length in tensor.shape)]
    if weight == 1:
        total += tensor
    else:
        total += np.float32(weight) * tensor


def signal_to_noise(num_clients: int, mean_square: float, square_of_mean: float) -> float:
    """Estimates the signal-to-noise ratio of the mean update, from released updates only.

    If every update is a common signal plus independent noise, then E‖uₖ‖² = S + V and
    E‖ū‖² = S + V/n. Differences between clients' data count as noise too, so under privacy this is
    a lower estimate of the signal-to-DP-noise ratio.

    Args:
        num_clients: n, at least 2.
        mean_square: Mean of ‖uₖ‖².
        square_of_mean: ‖ū‖².

    Returns:
        √S / √(V/n), 0 if no common signal is visible.

    >>> signal_to_noise(2, 4.0, 4.0)
    inf
    >>> signal_to_noise(4, 4.0, 1.0)
    0.0
    """
    noise = (mean_square - square_of_mean) * num_clients / (num_clients - 1)
    signal = max(0.0, mean_square - noise)
    if noise <= 0:
        return math.inf
    return math.sqrt(signal / (noise / num_clients))
