"""One round at the server: bounds each update, combines them by the method, moves the adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from fedslm.aggregation.factor_methods import AVERAGE_BOTH, FactorRound
from fedslm.aggregation.mean import WeightedMean
from fedslm.aggregation.methods import METHODS, kind_of, method_of, rank_of_client, sent_keys
from fedslm.aggregation.norm_bound import NormBound, median_norm
from fedslm.aggregation.robust import combine, still_hostile
from fedslm.aggregation.server_optimizer import ServerOptimizer
from fedslm.aggregation.update_file import Spool
from fedslm.config import AggregationConfig, LoraConfig
from fedslm.errors import FederationError
from fedslm.records import AdapterState, ClientUpdate

_NOTHING = AdapterState({})
_ADAPTIVE_RATE = 0.01


@dataclass(frozen=True)
class ServerState:
    """The state that aggregation carries from round to round.

    Attributes:
        moving: The tensors that rounds change.
        turn: The next turn, from 1: one more than the rounds that moved the adapter.
        memory: The server optimizer's moments.
        control: SCAFFOLD's server control variate; empty without it.
        norms: Maps each kind of turn to the median norm of its last updates.
    """

    moving: AdapterState
    turn: int = 1
    memory: AdapterState = _NOTHING
    control: AdapterState = _NOTHING
    norms: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Aggregation:
    """How the updates of a round are aggregated.

    Attributes:
        config: The resolved section.
        lora: The adapter at the server's rank.
        num_clients: The population.
        fixed_denominator: True if the mean is over the cohort, whoever answers (privacy).
        fresh: The initial tensors, to which FLoRA resets its factors.
        local_reach: A client's steps times its rate: the unit of SCAFFOLD's control variates.
    """

    config: AggregationConfig
    lora: LoraConfig
    num_clients: int
    fixed_denominator: bool
    fresh: AdapterState
    local_reach: float = 1.0

    @property
    def optimizer(self) -> ServerOptimizer:
        """The server's optimizer."""
        config = self.config
        usual = 1.0 if config.server_optimizer in ("fedavg", "fedavgm") else _ADAPTIVE_RATE
        return ServerOptimizer(
            config.server_optimizer,
            learning_rate=config.server_learning_rate or usual,
            momentum=config.server_momentum,
            second_momentum=config.server_second_momentum,
            adaptivity=config.server_adaptivity,
        )


class Round:
    """Takes a round's updates one at a time and returns the next state.

    The linear methods stream: one adapter in memory, whatever the cohort. The norm bound needs a
    median, and uses that of the last round of the same kind. A first round has none, so its updates are
    kept on disk, as are those of robust rules and of methods that need each client's factors.

    Args:
        aggregation: How the updates are aggregated.
        state: The state before the round.
        cohort: The clients of the round.
        directory: Where updates may be kept on disk.
    """

    def __init__(
        self, aggregation: Aggregation, state: ServerState, cohort: list[int], directory: Path
    ) -> None:
        self._how, self._state, self._cohort = aggregation, state, cohort
        config = aggregation.config
        self._method = method_of(config)
        self._kind = kind_of(self._method, state.turn)
        sent = sent_keys(self._method, state.moving, state.turn)
        self._shapes = state.moving.select(sent).shapes
        self._norms: list[float] = []
        self._bound = NormBound(config.norm_bound, state.norms.get(self._kind))
        linear = METHODS[self._method].family == "linear"
        self._mean = self._new_mean() if linear and config.rule == "mean" else None
        waits = self._mean is None or self._bound.reference is None
        self._spool = Spool(directory, self._shapes) if waits else None

    def close(self) -> None:
        """Removes the updates kept on disk."""
        if self._spool is not None:
            self._spool.close()

    @property
    def count(self) -> int:
        """Number of updates so far."""
        return len(self._norms)

    def add(self, update: ClientUpdate) -> None:
        """Adds one checked update."""
        if self._spool is not None:
            self._spool.add(update)
            self._norms.append(update.delta.norm())
        elif self._mean is not None:
            self._norms.append(self._mean.add(update, self._bound.limit))

    def finish(self) -> ServerState:
        """Returns the state after the round.

        Raises:
            FederationError: There are too few updates for the rule, or the result is not finite.
        """
        if METHODS[self._method].family == "factors":
            moving, memory = self._factors(), self._state.memory
            control = self._state.control
        else:
            difference = self._difference()
            moving, memory = self._how.optimizer.step(
                self._state.moving, difference, self._state.memory
            )
            control = self._next_control(difference)
        if not moving.is_finite():
            raise FederationError("the aggregate holds NaN or infinity")
        norms = {**self._state.norms, self._kind: median_norm(self._norms)}
        return ServerState(moving, self._state.turn + 1, memory, control, norms)

    def signal_to_noise(self) -> float | None:
        """Returns the mean update's signal-to-noise ratio; None if the rule is not a plain mean."""
        return None if self._mean is None else self._mean.signal_to_noise()

    def _new_mean(self) -> WeightedMean:
        """Returns an empty mean over the cohort, or over those who answer."""
        ranks = None
        if self._how.fixed_denominator:
            ranks = [rank_of_client(self._how.lora, client) for client in self._cohort]
        return WeightedMean(self._shapes, ranks)

    def _difference(self) -> AdapterState:
        """Returns the combined update of a linear method."""
        spool, mean = self._spool, self._mean
        if spool is None and mean is not None:
            return mean.result()
        if spool is None:
            raise FederationError("a robust rule needs its updates on disk")
        if mean is None:
            config, silent = self._how.config, len(self._cohort) - spool.count
            hostile = still_hostile(config.rule, config.num_byzantine, spool.count, silent)
            return combine(config.rule, spool, hostile, self._shrink(self._norms))
        limit = self._bound_by(self._norms).limit
        for index in range(spool.count):
            mean.add(spool.update(index), limit)
        return mean.result()

    def _factors(self) -> AdapterState:
        """Returns the next adapter of a factor method."""
        if self._spool is None:
            raise FederationError("this method needs its updates on disk")
        slack = self._how.config.norm_bound
        factors = FactorRound(
            self._state.moving, self._spool, self._how.lora.scaling, self._how.fresh, slack
        )
        shrink = self._shrink(factors.drift_norms())
        if self._method in AVERAGE_BOTH:  # with B = 0 a huge A changes no weights, but moves the mean
            shrink = list(map(min, shrink, self._shrink(self._norms)))
        return factors.aggregate(self._method, shrink)

    def _shrink(self, norms: list[float]) -> list[float]:
        """Returns each update's factor, by the median of these norms."""
        bound = self._bound_by(norms)
        return [bound.factor(norm) for norm in norms]

    def _bound_by(self, norms: list[float]) -> NormBound:
        """Returns the bound by this round's own median."""
        return replace(self._bound, reference=median_norm(norms))

    def _next_control(self, difference: AdapterState) -> AdapterState:
        """Returns SCAFFOLD's mean of the clients' control variates, over the whole population.

        A client's moves by -c - Δ / (steps · rate) (Karimireddy et al. 2020, option II), so the server
        needs only the updates: a bound on the updates, or a dropped update, applies here too.
        """
        share, reach = self.count / self._how.num_clients, self._how.local_reach
        before = self._state.control
        return AdapterState(
            {
                key: ((1 - share) * c - share / reach * difference[key]).astype(np.float32)
                for key, c in before.tensors.items()
            }
        )
