"""A ledger's own time: it never runs backwards by itself, and no charge looks older than it is.

A node's clock can be wrong: set back, at 1970 after a flat battery, or years ahead after a bad time
server's answer. Limits per day, or on the time between two rounds, need charge times that are never too
early.

Formal guarantees (if the clock is right now, and whenever it was corrected):
    * A charge counts as made when it was made, or later: a limit refuses too much, never too little.
    * If the clock is behind the latest time so far, a line is written with that latest time. With a
      clock that is before 2025 or after 2099 nothing is written.
    * A line of an older version whose time is before that of a line above it counts as of the later
      one; one before 2025 counts as of the first line below that has a time, or as of now.
    * After a forward jump of the clock, charges count as of a future time, and limits refuse until
      then. A correction (:class:`fedslm.privacy.lines.Correction`) records that the clock is right now:
      no line above it can have been written later, so all lines that are ahead count as of the
      correction.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from fedslm.errors import LedgerError
from fedslm.privacy.lines import ADAPTER, LATEST_TIME, Entry

DAY_SECONDS = 86_400
EARLIEST_TIME = 1_735_689_600  # 2025-01-01: fedslm did not exist before
AHEAD_SECONDS = 300  # a smaller jump is an ordinary clock correction


def counted_times(entries: Iterable[Entry], now: float) -> list[float]:
    """When each line counts as written, in the ledger's order."""
    times: list[float] = []
    latest = 0.0
    for entry in entries:
        if entry.correction is not None:
            latest = float(entry.time)
            times = [min(each, latest) for each in times]
        latest = max(latest, float(entry.time))
        times.append(latest)
    for number in reversed(range(len(times))):
        if times[number] < EARLIEST_TIME:
            times[number] = times[number + 1] if number + 1 < len(times) else now
    return times


def next_time(entries: Sequence[Entry]) -> int:
    """The time to write into the next line.

    Raises:
        LedgerError: The clock shows an impossible time.
    """
    now = right_now()
    return max(now, *map(int, counted_times(entries, now)[-1:])) if entries else now


def right_now() -> int:
    """The clock's current time.

    Raises:
        LedgerError: It is before 2025 or after 2099.
    """
    now = int(time.time())
    if not EARLIEST_TIME <= now < LATEST_TIME:
        raise LedgerError(
            f"this machine's clock says {_day(now)}, and must be from 2025 to 2099: set it by NTP; "
            f"nothing is charged until then"
        )
    return now


def seconds_ahead(entries: Sequence[Entry]) -> int:
    """Number of seconds by which a ledger is ahead of this machine's clock; 0 if it is not."""
    now = time.time()
    return max(0, int(counted_times(entries, now)[-1] - now)) if entries else 0


def rounds(entries: Sequence[Entry], now: float) -> list[float]:
    """When each round counts as charged, or as released without privacy."""
    times = counted_times(entries, now)
    return [
        counted
        for counted, entry in zip(times, entries, strict=True)
        if ADAPTER in (_purpose(entry.charge), _purpose(entry.unprotected))
    ]


def _purpose(what: object) -> str | None:
    """The purpose of a charge or a release; None for other lines."""
    return getattr(what, "purpose", None)


def _day(seconds: int) -> str:
    """A time as a readable date."""
    try:
        return datetime.fromtimestamp(seconds, UTC).date().isoformat()
    except (ValueError, OverflowError, OSError):
        return f"{seconds} s since 1970"
