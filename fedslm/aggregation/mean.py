"""The linear primitive: one streaming weighted mean of the tensors trained this round.

Memory is constant in the number of clients. FedIT and FFA-LoRA are this mean over different tensors.
"""

from __future__ import annotations

import math

import numpy as np

from fedslm.errors import FederationError
from fedslm.records import AdapterState, ClientUpdate, FloatArray


class WeightedMean:
    """Adds updates one at a time, in a fixed order for a reproducible result.

    Args:
        start: The trained tensors that the clients started from.

    References:
        McMahan et al. 2017, FedAvg (arXiv 1602.05629).
    """

    def __init__(self, start: AdapterState) -> None:
        self._start = start
        self._sums: dict[str, FloatArray] = {key: np.zeros_like(start[key]) for key in start}
        self._total_weight = 0.0
        self._square_norms = 0.0
        self.count = 0

    def add(self, update: ClientUpdate) -> None:
        """Adds one checked update.

        Raises:
            FederationError: The weight is not positive and finite.
        """
        if not 0 < update.weight < math.inf:
            raise FederationError(f"client {update.client}: weight={update.weight} must be > 0")
        for key, total in self._sums.items():
            tensor = update.adapter[key]
            if update.weight == 1.0:
                total += tensor
            else:
                total += np.float32(update.weight) * tensor
            self._square_norms += _square(tensor - self._start[key])
        self._total_weight += update.weight
        self.count += 1

    def result(self) -> AdapterState:
        """The weighted mean.

        Raises:
            FederationError: Nothing was added.
        """
        if self.count == 0:
            raise FederationError("there is no update to average")
        divisor = np.float32(self._total_weight)
        return AdapterState({key: total / divisor for key, total in self._sums.items()})

    def signal_to_noise(self) -> float | None:
        """See :func:`signal_to_noise`; None with fewer than two clients."""
        if self.count < 2:
            return None
        mean = self.result()
        square_of_mean = sum(_square(mean[key] - self._start[key]) for key in mean)
        return signal_to_noise(self.count, self._square_norms / self.count, square_of_mean)


def signal_to_noise(num_clients: int, mean_square: float, square_of_mean: float) -> float:
    """How far the mean update stands out of its noise, estimated from released updates alone.

    If every update is a common signal plus independent noise, then E‖uₖ‖² = S + V and
    E‖ū‖² = S + V/n. What differs between clients' data counts as noise too, so under privacy this is
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


def _square(tensor: FloatArray) -> float:
    """Squared L2 norm."""
    flat = tensor.ravel()
    return float(np.dot(flat, flat))
