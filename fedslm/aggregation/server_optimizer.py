"""Server optimizers: functions of the combined update only, so they work with any privacy unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

import numpy as np

from fedslm.config import ServerOptimizerName
from fedslm.errors import FederationError
from fedslm.records import AdapterState, FloatArray


@dataclass(frozen=True)
class ServerOptimizer:
    """A server optimizer, without its state.

    With g the combined update, for each coordinate, without bias correction:
        * fedavg: θ ← θ + η·g. fedavgm: m ← β₁·m + g; θ ← θ + η·m.
        * The others: m ← β₁·m + (1 - β₁)·g; θ ← θ + η·m / (√v + τ), where first
          fedadam: v ← β₂·v + (1 - β₂)·g²; fedadagrad: v ← v + g²;
          fedyogi: v ← v - (1 - β₂)·g²·sign(v - g²), which falls by no more than (1 - β₂)·g².

    Attributes:
        name: The optimizer.
        learning_rate: The server's rate.
        momentum: β₁, decay of the first moment.
        second_momentum: β₂, decay of the second moment.
        adaptivity: τ, added to the root of the second moment, which starts at τ². A first step moves no
            coordinate by more than the rate if 1 - β₁ <= √(1 - β₂), as by default.

    References:
        McMahan et al. 2017 (FedAvg, arXiv 1602.05629); Hsu et al. 2019 (FedAvgM, arXiv 1909.06335);
        Reddi et al. 2021 (FedAdam, FedYogi, FedAdagrad, arXiv 2003.00295, algorithm 2).
    """

    name: ServerOptimizerName
    learning_rate: float
    momentum: float
    second_momentum: float
    adaptivity: float

    def step(
        self, start: AdapterState, difference: AdapterState, memory: AdapterState
    ) -> tuple[AdapterState, AdapterState]:
        """Moves the tensors that were trained this round.

        Args:
            start: The server's tensors.
            difference: The combined update, only of the tensors trained this round.
            memory: Moments, under ``m/KEY`` and ``v/KEY``; those of other tensors stay unchanged, so a
                factor that is not trained this round is not moved by its remaining momentum.

        Returns:
            The moved tensors and the new memory.

        Raises:
            FederationError: A tensor is unknown or has another shape.
        """
        for key, shape in difference.shapes.items():
            if key not in start.tensors or start[key].shape != shape:
                raise FederationError(f"the update's {key} of shape {shape} does not fit")
        moved: dict[str, FloatArray] = {}
        moments: dict[str, FloatArray] = {}
        for key in difference:
            step, kept = self._direction(key, difference[key], memory)
            moved[key] = start[key] + np.float32(self.learning_rate) * step
            moments |= {f"{name}/{key}": value for name, value in kept.items()}
        return start.merged(AdapterState(moved)), memory.merged(AdapterState(moments))

    def _direction(
        self, key: str, g: FloatArray, memory: AdapterState
    ) -> tuple[FloatArray, dict[str, FloatArray]]:
        """Returns one tensor's step at rate 1, and its new moments."""
        beta1, beta2 = np.float32(self.momentum), np.float32(self.second_momentum)
        tau, rest2 = np.float32(self.adaptivity), np.float32(1) - beta2
        m: FloatArray = memory.tensors.get(f"m/{key}", np.zeros_like(g))
        v: FloatArray = memory.tensors.get(f"v/{key}", np.full_like(g, tau**2))
        square: FloatArray = np.square(g)
        match self.name:
            case "fedavg":
                return g, {}
            case "fedavgm":
                m = beta1 * m + g
                return m, {"m": m}
            case "fedadam":
                v = beta2 * v + rest2 * square
            case "fedyogi":
                away: FloatArray = np.sign(v - square)
                v = v - rest2 * square * away
            case "fedadagrad":
                v = v + square
            case _:
                assert_never(self.name)
        m = beta1 * m + (np.float32(1) - beta1) * g
        root: FloatArray = np.sqrt(v)
        step: FloatArray = m / (root + tau)
        return step, {"m": m, "v": v}
