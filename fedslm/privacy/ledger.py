"""What was spent on one client's data: an append-only file that never forgets.

A spend is *reserved* (written and synced) before the computation that it pays for, and *committed*
when the release leaves. A crash in between leaves it charged: the ledger may over-count, never
under-count. Sending the same bytes again is free.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fedslm.errors import BudgetExceeded, LedgerError, PrivacyError
from fedslm.privacy import accounting
from fedslm.records import Event, PrivacySpent

_GENESIS = "0" * 64
_LOCK_SECONDS = 30.0


@dataclass(frozen=True)
class Entry:
    """One line of the ledger.

    Attributes:
        kind: "reserve" or "commit".
        index: Position in the file, from 0.
        run: Identifier of the run.
        round: Round of the run, from 1.
        previous: SHA-256 of the line before.
        event: The charge (reserve only).
        delta: The delta of the budget (reserve only).
        reserve: Index of the reserved entry (commit only).
        release_sha256: Hash of the released adapter (commit only).
        request_sha256: Hash of what was asked for (reserve only): equal requests may be re-sent.
    """

    kind: str
    index: int
    run: str
    round: int
    previous: str
    event: Event | None = None
    delta: float | None = None
    reserve: int | None = None
    release_sha256: str | None = None
    request_sha256: str | None = None


class Ledger:
    """The ledger of one client's data.

    Formal guarantees:
        * ``reserve`` returns only after the charge is on disk (fsync), and only if all charges
          together stay within the budget: a filter, not an odometer.
        * Every reserved event counts, committed or not.
        * A file with an edited, reordered or missing line in it is refused. A torn last line is left
          out: no release can have followed it. Whole lines missing at the end cannot be seen from the
          file alone.

    Args:
        path: The file; its directory is created.

    Raises:
        LedgerError: The file cannot be read or is inconsistent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(f"{path}.lock", timeout=_LOCK_SECONDS)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LedgerError(f"the ledger {path} cannot be created: {error}") from error

    def entries(self) -> list[Entry]:
        """Reads and checks the whole file."""
        return list(_read(self.path))

    def events(self) -> tuple[Event, ...]:
        """Everything that was ever charged."""
        return tuple(entry.event for entry in self.entries() if entry.event is not None)

    def spent(self, delta: float) -> PrivacySpent:
        """Epsilon at ``delta`` over everything that was ever charged."""
        events = self.events()
        steps = sum(event.steps for event in events)
        return PrivacySpent(accounting.epsilon(events, delta), delta, steps)

    def reserve(
        self,
        event: Event,
        *,
        run: str,
        round: int,
        request_sha256: str,
        budget: tuple[float, float],
    ) -> int:
        """Charges an event before it is computed.

        Args:
            event: What will be released.
            run: Identifier of the run.
            round: Round of the run.
            request_sha256: Hash of what was asked for.
            budget: (epsilon, delta) over everything in this ledger.

        Returns:
            The index to commit.

        Raises:
            BudgetExceeded: The event would exceed the budget; nothing was charged.
            LedgerError: The charge could not be written; nothing may be released.
        """
        epsilon, delta = budget
        with self._locked():
            entries = self.entries()
            charged = [entry.event for entry in entries if entry.event is not None]
            after = accounting.epsilon([*charged, event], delta)
            if not after <= epsilon:
                raise BudgetExceeded(
                    f"budget exhausted: this round would bring epsilon to {after:.3f} at "
                    f"delta={delta:g}, over the budget of {epsilon:g}"
                )
            reserved = Entry(
                kind="reserve",
                index=len(entries),
                run=run,
                round=round,
                previous="",
                event=event,
                delta=delta,
                request_sha256=request_sha256,
            )
            self._append(reserved)
            return reserved.index

    def commit(self, reserved: int, release_sha256: str) -> None:
        """Records which bytes a reserved charge paid for, before they leave.

        Raises:
            LedgerError: The index is not an open reservation, or the file cannot be written.
        """
        with self._locked():
            entries = self.entries()
            committed = {entry.reserve for entry in entries}
            known = 0 <= reserved < len(entries) and entries[reserved].kind == "reserve"
            if not known or reserved in committed:
                raise LedgerError(f"the ledger {self.path} has no open reservation {reserved}")
            paid = entries[reserved]
            self._append(
                Entry(
                    kind="commit",
                    index=len(entries),
                    run=paid.run,
                    round=paid.round,
                    previous="",
                    reserve=reserved,
                    release_sha256=release_sha256,
                )
            )

    def released(self, request_sha256: str) -> str | None:
        """Hash of the release that an equal request was already charged for, or None."""
        entries = self.entries()
        paid = {entry.index for entry in entries if entry.request_sha256 == request_sha256}
        for entry in reversed(entries):
            if entry.reserve in paid:
                return entry.release_sha256
        return None

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keeps other processes out between check and append."""
        try:
            with self._lock:
                yield
        except Timeout as error:
            raise LedgerError(f"the ledger {self.path} is locked by another process") from error

    def _append(self, entry: Entry) -> None:
        """Drops a torn last line, writes one line, and syncs file and directory."""
        try:
            with self.path.open("a+b") as file:
                file.seek(0)
                content = file.read()
                whole = content[: content.rfind(b"\n") + 1]
                file.truncate(len(whole))
                lines = whole.splitlines()
                previous = hashlib.sha256(lines[-1]).hexdigest() if lines else _GENESIS
                values = {**asdict(entry), "previous": previous}
                content_of_line = {key: value for key, value in values.items() if value is not None}
                sealed = {**content_of_line, "sha256": _seal(content_of_line)}
                file.write(json.dumps(sealed).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            directory = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as error:
            raise LedgerError(f"the ledger {self.path} cannot be written: {error}") from error


def _read(path: Path) -> Iterator[Entry]:
    """Yields the entries of a file, checking the chain; a torn last line is left out."""
    try:
        content = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise LedgerError(f"the ledger {path} cannot be read: {error}") from error
    previous = _GENESIS
    for index, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines()):
        entry = _parse(path, index, line)
        if entry.index != index or entry.previous != previous:
            raise LedgerError(f"the ledger {path} was changed at line {index + 1}")
        previous = hashlib.sha256(line).hexdigest()
        yield entry


def _seal(values: dict[str, Any]) -> str:
    """Hash of a line's values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _parse(path: Path, index: int, line: bytes) -> Entry:
    """Reads one line, failing closed."""
    try:
        values: dict[str, Any] = json.loads(line)
        seal = values.pop("sha256", None)
        if seal != _seal(values):
            raise ValueError("the line does not match its hash")
        event = values.pop("event", None)
        entry = Entry(**values, event=Event(**event) if event is not None else None)
    except (ValueError, TypeError, AttributeError, PrivacyError) as error:
        raise LedgerError(f"the ledger {path} cannot be read at line {index + 1}: {error}") from error
    if (entry.kind, entry.event is None) not in {("reserve", False), ("commit", True)}:
        raise LedgerError(f"the ledger {path} has an unknown entry at line {index + 1}")
    return entry
