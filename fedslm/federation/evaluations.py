"""Decides which rounds are evaluated on the public split; training never depends on it."""

from __future__ import annotations

from collections.abc import Sequence

from fedslm.config import FederationConfig
from fedslm.records import RoundRecord

LARGEST_SHARE = 0.25
FREE_SECONDS = 5.0


class Evaluations:
    """Decides which rounds are evaluated, by ``federation.evaluate_every``.

    With a number n, every nth round and the last are evaluated. With "auto", the first round that
    moved the adapter and the last are, and any other if all evaluations would then take at most a
    quarter of the time of the rounds so far, or at most five seconds together.

    Args:
        federation: The run's rounds.
        records: The rounds that are over.
    """

    def __init__(self, federation: FederationConfig, records: Sequence[RoundRecord]) -> None:
        self._every, self._last = federation.evaluate_every, federation.rounds
        self._seconds = self._spent = self._expected = 0.0
        for record in records:
            self.count(record)

    def is_due(self, number: int, seconds: float) -> bool:
        """Whether a round is evaluated, if it moved the adapter.

        Args:
            number: The round, from 1.
            seconds: Wall time of this round so far.
        """
        if number == self._last:
            return True
        if self._every != "auto":
            return number % self._every == 0
        spent = self._spent + self._expected
        allowed = LARGEST_SHARE * (self._seconds + seconds + self._expected)
        return not self._spent or spent <= max(allowed, FREE_SECONDS)

    def count(self, record: RoundRecord) -> None:
        """Adds a round that is over."""
        self._seconds += record.seconds
        self._spent += record.evaluation_seconds
        self._expected = record.evaluation_seconds or self._expected
