"""Observers of a run's progress: a progress bar, a tracker, a test."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedslm.config import Config
    from fedslm.federation.checkpoint import Checkpoint
    from fedslm.records import RoundRecord


class Observer:
    """Observes a run's progress. Subclass it and override what you need; each method does nothing here.

    An exception that a method raises ends the run, which can be resumed.

    >>> class Losses(Observer):
    ...     def on_round(self, record):
    ...         if record.metrics:  # not every round is evaluated
    ...             print(record.round, record.metrics["loss"])
    >>> Losses().on_start(None, None)
    """

    def on_start(self, config: Config, done: Checkpoint) -> None:
        """The run starts, or continues after ``done``."""

    def on_client(self, round: int, done: int, cohort: int) -> None:
        """One more client of the round has answered, failed or is late."""

    def on_round(self, record: RoundRecord) -> None:
        """A round is over and on disk."""

    def on_end(self, report: Mapping[str, Any] | None) -> None:
        """The run is over: called once, also after an error or Ctrl-C. An error here is logged.

        Args:
            report: The content of ``report.json``; None if the run was interrupted or failed.
        """
