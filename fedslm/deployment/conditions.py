"""Conditions for a node to take part: its hours, and the result of its operator's own command.

A phone trains while it is charged, idle and on an unmetered network; the operator's command checks
these conditions on that device. Outside its conditions a node is not connected at all.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from fedslm.deployment.settings import Conditions

logger = logging.getLogger(__name__)
_ANSWER_SECONDS = 30.0
_MOST_OF_A_REASON = 200


class Attendance:
    """Whether a node takes part now; checked every ``check_seconds``, and logged when it changes.

    Formal guarantees:
        * True only if every condition held at the last check, at most ``check_seconds`` ago.
        * A command that is missing, fails, or does not answer in time counts as not met.

    Args:
        conditions: The conditions; None: the node always takes part.
        directory: Working directory of the command.
    """

    def __init__(self, conditions: Conditions | None, directory: Path) -> None:
        self._conditions, self._directory = conditions or Conditions(), directory
        self._next_look = 0.0
        self._reason: str | None = None
        self._takes_part: bool | None = None

    @property
    def check_seconds(self) -> float:
        """How often the conditions are checked."""
        return self._conditions.check_seconds

    def takes_part(self) -> bool:
        """Whether the node takes part now."""
        now = time.monotonic()
        if self._takes_part is None or now >= self._next_look:
            self._next_look = now + self._conditions.check_seconds
            reason = reason_against(self._conditions, self._directory, datetime.now())
            if (reason is None, reason) != (self._takes_part, self._reason):
                logger.info("takes part" if reason is None else f"does not take part: {reason}")
            self._takes_part, self._reason = reason is None, reason
        return self._takes_part


def reason_against(conditions: Conditions, directory: Path, now: datetime) -> str | None:
    """Why a node does not take part, in one line; None if it does.

    Args:
        conditions: The conditions.
        directory: Working directory of the command.
        now: Local time.
    """
    if conditions.hours and not is_within(conditions.hours, now):
        return f"it is {now:%H:%M}, and its hours are {conditions.hours}"
    return _refusal(conditions.command, directory) if conditions.command else None


def is_within(hours: str, now: datetime) -> bool:
    """Whether a time is within hours; the first minute is included and the last is not.

    >>> [is_within("22:00-06:00", datetime(2026, 1, 1, hour)) for hour in (21, 22, 0, 5, 6)]
    [False, True, True, True, False]
    """
    first, last = hours.split("-")
    clock = f"{now:%H:%M}"
    if first < last:
        return first <= clock < last
    return clock >= first or clock < last


def _refusal(command: Sequence[str], directory: Path) -> str | None:
    """Why a command is not met; None if it exits with 0."""
    name = command[0]
    try:
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(  # noqa: S603  (the operator's own program)
                command,
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(_ANSWER_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return f"{name} did not answer within {_ANSWER_SECONDS:g} s"
            if code == 0:
                return None
            output.seek(0)
            said = output.read(64 * 1024).decode(errors="replace").strip().splitlines()
    except (OSError, ValueError) as error:
        return f"{name} cannot be run: {error}"
    return (said[-1] if said else f"{name} ended with {code}")[:_MOST_OF_A_REASON]
