"""One round at the server if it sees only the sum over clients: clients share the noise.

What follows needs the sum and the number of its parts, so any :class:`Sum` will do: that of a protocol
that hides each part, or :class:`IdealSum`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedslm.aggregation.methods import method_of, sent_keys
from fedslm.aggregation.server import Aggregation, ServerState
from fedslm.errors import FederationError
from fedslm.privacy.encoding import Words, decoded, grid_of
from fedslm.privacy.plan import ClientPlan, PrivatePlan
from fedslm.privacy.shares import NoiseShares
from fedslm.records import AdapterState


class Sum(Protocol):
    """The sum of the clients' parts modulo 2^32, however it is formed."""

    @property
    def count(self) -> int:
        """Number of parts so far."""

    def total(self, threshold: int) -> Words:
        """Returns the sum of at least ``threshold`` parts.

        Raises:
            FederationError: It cannot be formed.
        """


class IdealSum:
    """The sum modulo 2^32, formed from parts that the server can read: only in a simulation.

    It keeps no part. So what a simulation makes of the sum is what it would make of one that was formed
    by a protocol that hides the parts.

    Args:
        size: Number of values.
    """

    def __init__(self, size: int) -> None:
        self._total = np.zeros(size, dtype=np.uint32)
        self._count = 0

    @property
    def count(self) -> int:
        """Number of parts so far."""
        return self._count

    def add(self, words: Words) -> None:
        """Adds one client's part."""
        self._total += words
        self._count += 1

    def total(self, threshold: int) -> Words:
        """Returns the sum of at least ``threshold`` parts.

        Raises:
            FederationError: There are fewer: their noise would not be enough.
        """
        if self.count < threshold:
            raise FederationError(
                f"{self.count} replies are fewer than secure_aggregation.threshold={threshold}: their "
                f"sum is not formed"
            )
        return self._total


@dataclass(frozen=True)
class Summing:
    """How a step is made of a sum.

    Attributes:
        plan: Clip norm, noise, normaliser and shares.
        learning_rate: The clients' rate η: their one SGD step is taken by the server. Not used if
            whole clients are the unit: they send updates, not gradients.
    """

    plan: PrivatePlan
    learning_rate: float

    def scale(self, cohort: int) -> float:
        """What one step of the grid in the sum moves the adapter by, for the mean over a cohort."""
        plan = self.plan
        mean = grid_of(plan.clip_norm, self.shares.grid_bits) / (cohort * plan.normaliser)
        return mean if isinstance(plan, ClientPlan) else -self.learning_rate * mean

    @property
    def shares(self) -> NoiseShares:
        """How clients share the noise.

        Raises:
            FederationError: They do not.
        """
        if self.plan.shares is None:
            raise FederationError("the plan shares no noise, so there is no sum")
        return self.plan.shares


class SummedRound:
    """Takes a round's parts one at a time, and moves the adapter by their sum.

    With cohort n, normaliser L and grid γ the difference is -η·γ·Σ / (n·L): the mean over the cohort of
    the clients' own SGD steps, whoever answers. If whole clients are the unit it is γ·Σ / n, the mean
    of their clipped updates.

    Args:
        aggregation: The server's optimizer.
        summing: How a step is made of the sum.
        state: The state before the round.
        cohort: Number of clients in the round.
        total: The sum that a protocol forms; None: :meth:`add` forms it.
    """

    def __init__(
        self,
        aggregation: Aggregation,
        summing: Summing,
        state: ServerState,
        cohort: int,
        total: Sum | None = None,
    ) -> None:
        self._how, self._summing, self._state, self._cohort = aggregation, summing, state, cohort
        self._shapes = summed_shapes(aggregation, state)
        self._sum: Sum = IdealSum(num_values(self._shapes)) if total is None else total
        self._values: NDArray[np.int64] | None = None

    def close(self) -> None:
        """Does nothing: a sum keeps no files."""

    @property
    def count(self) -> int:
        """Number of parts so far."""
        return self._sum.count

    def add(self, words: Words) -> None:
        """Adds one client's checked part; the sum that a protocol forms has it already."""
        if isinstance(self._sum, IdealSum):
            self._sum.add(words)

    def finish(self) -> ServerState:
        """Returns the state after the round.

        Raises:
            FederationError: There are fewer parts than the threshold, the sum may have wrapped around,
                or the result is not finite.
        """
        shares, state = self._summing.shares, self._state
        self._values = decoded(self._sum.total(shares.threshold))
        flat = (self._values * self._summing.scale(self._cohort)).astype(np.float32)
        difference = AdapterState.of_flat(flat, self._shapes)
        moving, memory = self._how.optimizer.step(state.moving, difference, state.memory)
        if not moving.is_finite():
            raise FederationError("the aggregate holds NaN or infinity")
        return ServerState(moving, state.turn + 1, memory, state.control, state.norms)

    def signal_to_noise(self) -> float | None:
        """Returns the ratio of signal to noise in the sum, whose noise is public; None before it.

        E‖Σ‖² is the square of the signal plus d·n·s² of noise, over d values and n parts.
        """
        if self._values is None:
            return None
        plan = self._summing.plan
        noise = (
            self._values.size
            * self.count
            * self._summing.shares.variance(plan.clip_norm, plan.noise_multiplier)
        )
        square = float((self._values.astype(np.float64) ** 2).sum())
        return math.sqrt(max(0.0, square - noise) / noise)


def summed_shapes(aggregation: Aggregation, state: ServerState) -> Mapping[str, tuple[int, ...]]:
    """The tensors whose sum over clients a round forms."""
    sent = sent_keys(method_of(aggregation.config), state.moving, state.turn)
    return state.moving.select(sent).shapes


def num_values(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Number of values of these tensors."""
    return sum(map(math.prod, shapes.values()))
