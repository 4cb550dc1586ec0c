"""Says during a private run, while budget is left, that its updates show no common signal.

Only released updates are used: the signal-to-noise ratio that each round records.
"""

from __future__ import annotations

import logging
import math

from fedslm.config import Config
from fedslm.federation.checkpoint import Checkpoint
from fedslm.federation.observers import Observer
from fedslm.records import RoundRecord

logger = logging.getLogger(__name__)
_LEAST_ROUNDS = 4
_DEVIATIONS = 2.0


def visible_from(parameters: int, rounds: int) -> float:
    """Returns the ratio that the mean of some rounds must exceed to differ from noise.

    Without any signal, the squared ratio of a round (:func:`fedslm.aggregation.mean.signal_to_noise`,
    before it is cut at 0) has mean 0 and a variance of about 2 / d, for d values.

    Args:
        parameters: Values d that a round changes.
        rounds: Number of rounds.

    >>> round(visible_from(20_000, 4), 3)
    0.1
    """
    return math.sqrt(_DEVIATIONS * math.sqrt(2 / (parameters * rounds)))


class SignalWatch(Observer):
    """Warns once, after four rounds at least, if the mean squared ratio is not above that of noise.

    Differences between clients' data count as noise in the ratio, so a run may still learn a little.
    """

    def __init__(self) -> None:
        self._squares: list[float] = []
        self._parameters, self._rounds, self._is_private, self._said = 0, 0, False, False

    def on_start(self, config: Config, done: Checkpoint) -> None:
        """Reads what the warning depends on."""
        self._parameters = done.server.moving.num_parameters
        self._rounds, self._is_private = config.federation.rounds, config.privacy.unit != "none"

    def on_round(self, record: RoundRecord) -> None:
        """Adds a round, and warns if it is time."""
        if record.signal_to_noise is not None:
            self._squares.append(record.signal_to_noise**2)
        seen, left = len(self._squares), self._rounds - record.round
        if self._said or not self._is_private or seen < _LEAST_ROUNDS or left == 0:
            return
        bound = visible_from(self._parameters, seen)
        if (ratio := math.sqrt(sum(self._squares) / seen)) < bound:
            self._said = True
            logger.warning(
                "after %d rounds the updates show no common signal: their signal-to-noise ratio is "
                "%.2f, and noise reaches %.2f; stop with Ctrl-C to keep the budget of %d rounds, and "
                "see what would help with `fedslm config check`",
                seen, ratio, bound, left,
            )  # fmt: skip
