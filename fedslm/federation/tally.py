"""Counts the answers of a round, and records the reason for each missing one."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedslm.errors import printable
from fedslm.protocol.messages import Reply
from fedslm.records import RoundRecord

logger = logging.getLogger(__name__)
_LONGEST_REASON, _LONGEST_NAME = 300, 64
_REFUSALS = frozenset({"refused", "rolled-back", "needs-frozen", "needs-time"})


@dataclass
class Tally:
    """Counts one round's answers.

    Attributes:
        cohort: Number of clients asked.
        names: Display names by index; a client without one is called "client N".
        bytes_down: Bytes of tensors sent to them.
        bytes_up: Bytes of tensors received from them.
    """

    cohort: int
    names: Mapping[int, str] = field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: int = 0

    def __post_init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._reasons: list[str] = []
        self._left_out: list[int] = []
        self._unknown: list[int] = []
        self._scores, self._units = 0.0, 0.0

    @property
    def done(self) -> int:
        """Number of clients that answered, failed or are late."""
        return self._counts.total()

    def count(self, client: int, answer: Reply | str) -> None:
        """Counts one answer."""
        outcome = _outcome(answer)
        self._counts[outcome] += 1
        if isinstance(answer, Reply):
            self.bytes_up += answer.num_bytes
            reason = answer.reason
            if answer.metric is not None:
                self._scores += answer.metric[0]
                self._units += answer.metric[1]
        else:
            reason = answer
        if outcome not in ("ok", "refused"):  # it may have paid, and its statement did not come
            self._unknown.append(client)
        if reason:
            self._reasons.append(self._line(client, reason))
            self._left_out.append(client)

    def add_remarks(self, remarks: Iterable[tuple[int, str]]) -> None:
        """Adds what went wrong with clients that answered; called after the last was counted."""
        self._reasons += [self._line(client, reason) for client, reason in remarks]

    def _line(self, client: int, reason: str) -> str:
        """A client's reason with its name, which is logged."""
        name = printable(self.names.get(client, f"client {client}"), _LONGEST_NAME)
        line = f"{name}: {printable(reason, _LONGEST_REASON)}"
        logger.warning("%s", line)
        return line

    def add_reason(self, reason: str) -> None:
        """Adds why a round with answers moves nothing; called after the last client was counted."""
        self._reasons.append(f"the round: {printable(reason, _LONGEST_REASON)}")
        logger.warning("the round moves nothing: %s", reason)

    def lost(self, number: int, epsilon: float, cohort: Iterable[int]) -> RoundRecord:
        """Makes the record of a round of a cohort that the server began before it stopped."""
        self._unknown += cohort
        self.add_reason("the server stopped during it; clients that had trained have paid for it")
        return self.record(
            number,
            kept=True,
            epsilon=epsilon,
            metrics={},
            signal_to_noise=None,
            seconds=0.0,
            evaluation_seconds=0.0,
        )

    def record(self, number: int, **values: Any) -> RoundRecord:
        """Makes the round's record; called once per round, after all answers."""
        return RoundRecord(
            round=number,
            cohort=self.cohort,
            completed=self._counts["ok"],
            failed=self._counts["failed"],
            late=self._counts["late"],
            refused=self._counts["refused"],
            bytes_down=self.bytes_down,
            bytes_up=self.bytes_up,
            reasons=tuple(self._reasons),
            left_out=tuple(self._left_out),
            unknown=tuple(self._unknown),
            private_metric=self._scores / self._units if self._units >= 1 else None,
            **values,
        )


def _outcome(answer: Reply | str) -> str:
    """What an answer counts as: "ok", "refused", "late" or "failed"."""
    if isinstance(answer, str):
        return "late" if answer == "late" else "failed"
    return "refused" if answer.status in _REFUSALS else answer.status
