"""What was spent on one data set: an append-only, signed file.

A spend is *reserved* (written and synced) before the computation that it pays for, and *committed*
before the release is sent. A crash in between leaves it charged: the ledger may over-count, never
under-count. Sending the same bytes again is free.

The order is check, reserve, compute, commit, send. A filter refuses a charge before its release exists;
an odometer would only report afterwards what was spent.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from filelock import FileLock, Timeout

from fedslm.errors import LedgerError, PolicyRefused, RolledBack, RunError
from fedslm.privacy import clock
from fedslm.privacy.chain import (
    GENESIS,
    HEAD_SUFFIX,
    Chain,
    check_head,
    encode,
    line_hash,
    read_chain,
    read_head,
    whole_lines,
)
from fedslm.privacy.keys import public_hex
from fedslm.privacy.limits import Limits, check_budget, check_node_budgets, check_rounds, check_unit
from fedslm.privacy.lines import (
    ADAPTER,
    ADJACENCY,
    NO_UNIT,
    Charge,
    Correction,
    Entry,
    Opening,
    Unprotected,
)
from fedslm.privacy.merkle import consistency_proof
from fedslm.privacy.statement import Statement, signed
from fedslm.records import Event, PrivacySpent
from fedslm.storage import write_text

_LOCK_SECONDS = 30.0
_LONGEST_REASON = 300


class Ledger:
    """The ledger of one data set and one unit.

    Formal guarantees:
        * ``reserve`` returns only after the charges are on disk (fsync), and only if they stay within
          all limits: a filter, not an odometer.
        * Every reserved event counts, committed or not, over all runs and restarts.
        * There are never more rounds, nor two rounds closer in time, than the limits allow: every
          reserved round counts (its adapter's charge), committed or not, over all runs and restarts,
          and so does a round without privacy. Time is the ledger's own (:mod:`fedslm.privacy.clock`); a
          clock that was set back refuses until it has caught up. A request that is answered again is
          not a round.
        * No run charges more than ``per_run``, over all days, restarts and plans; and no 24 hours have
          more than ``per_day``, over all runs: whenever a charge is made, it and all charges of the
          24 hours before it stay within that limit. The server names the runs, so the limit per run
          restrains one request or one run; the limit per day and the lifetime limit restrain many.
        * After a release without privacy epsilon is infinite, and the lifetime budget is exceeded:
          nothing more is charged, unless the limits allow such releases.
        * Charges in another unit than the ledger's, or by another column, are refused: two ledgers for
          the same people would each see half of what was spent. A ledger of an older version, which
          names no column, adopts that of the first charge that names one, and keeps it.
        * Within one run neither the plan nor the data can change. Over several plans, which may have
          been chosen after seeing earlier releases, a Rényi filter also enforces the lifetime budget.
          A server that lets its second plan depend on the first one's releases can reach twice the
          delta: once for stopping under the first plan, once for continuing.
        * Changed data raises a LedgerError, which only the node's own log shows: a server that could
          read it would learn that a record was admitted or withdrawn.
        * A file with a changed, reordered or missing line is refused, and so is one that is shorter
          than its saved head. A torn last line is left out: no release can have followed it.

    Args:
        path: The file; its directory is created.
        key: Signs every line.
        unit: Whose participation the charges protect.
        dataset: The node's name for its data.

    Raises:
        LedgerError: The directory cannot be created.
    """

    def __init__(
        self, path: Path, key: Ed25519PrivateKey, *, unit: str = "record", dataset: str = "data"
    ) -> None:
        self.path, self.unit, self.dataset = path, unit, dataset
        self._key, self._public = key, key.public_key()
        self._head = path.with_name(path.name + HEAD_SUFFIX)
        self._lock = FileLock(f"{path}.lock", timeout=_LOCK_SECONDS)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LedgerError(f"the ledger {path} cannot be created: {error}") from error

    def read(self) -> Chain:
        """Reads and checks the whole file, and checks that no lines are missing at its end.

        Raises:
            LedgerError: The file is unreadable, changed or rolled back.
            PolicyRefused: The ledger counts in another unit.
        """
        chain = self._whole()
        if chain.unit not in (None, self.unit):
            raise PolicyRefused(
                f"this node's ledger counts in units of one {chain.unit}; a release that protects one "
                f"{self.unit} would not be counted with the others"
            )
        return chain

    def _whole(self) -> Chain:
        """The chain, whatever its unit."""
        head = read_head(self._head)  # first: another process may append in between
        chain = read_chain(self.path, self._public)
        if head is None and chain.entries:
            head = read_head(self._head)  # made in between
        if head is None and chain.entries:
            raise LedgerError(
                f"{self._head} is missing, and the ledger has {len(chain.entries)} entries"
            )
        if head is not None and head[0] >= 0:
            check_head(self.path, chain, *head)
        return chain

    def events(self, run: str | None = None) -> tuple[Event, ...]:
        """Every event that was ever charged, or that one run charged."""
        charges = self.read().charges
        return tuple(charge.event for charge in charges if run is None or charge.run == run)

    def spent(self, delta: float) -> PrivacySpent:
        """Epsilon at ``delta`` over everything that was ever released; it may be infinite."""
        chain = self.read()
        steps = sum(event.steps for event in chain.events)
        return PrivacySpent(chain.epsilon(delta), delta, steps)

    def reserve(self, charges: Sequence[Charge], limits: Limits) -> list[int]:
        """Charges all parts of a release before they are computed.

        Args:
            charges: All of one run and round.
            limits: The limits that must hold after the charges.

        Returns:
            The indices to commit.

        Raises:
            BudgetExceeded: A limit would be exceeded; nothing was charged.
            PolicyRefused: The run began with another plan, or the charges count in another unit or by
                another column; nothing was charged.
            LedgerError: The run began with other data, or the charges could not be written; nothing may
                be released.
        """
        with self._locked():
            chain = self.read()
            check_unit(chain, charges, self.unit)
            _check_limits(chain, charges, limits)
            _check_data(chain, charges)
            opening = self._opening(self.unit, charges[0].unit_column)
            entries = [] if chain.entries else [Entry(0, "", 0, opening=opening)]
            first = len(chain.entries) + len(entries)
            entries += [Entry(first + n, "", 0, charge=each) for n, each in enumerate(charges)]
            self._append(chain, entries)
            return [first + number for number in range(len(charges))]

    def check(self, charges: Sequence[Charge], limits: Limits) -> None:
        """Refuses what :meth:`reserve` would refuse, except for changed data; charges nothing.

        A node calls this before it reads a record: the time of a refusal reveals nothing about them.

        Args:
            charges: As in :meth:`reserve`; their data commitment does not matter.
            limits: The limits that must hold after the charges.

        Raises:
            BudgetExceeded: As :meth:`reserve`.
            PolicyRefused: As :meth:`reserve`.
        """
        chain = self.read()
        check_unit(chain, charges, self.unit)
        _check_limits(chain, charges, limits)

    def check_unprotected(self, run: str, round: int, purpose: str, limits: Limits) -> None:
        """Refuses a round without privacy that would exceed a limit, before a record is read for it.

        A round that is already in the ledger may be released again.

        Raises:
            BudgetExceeded: A limit on rounds would be exceeded.
        """
        chain = self._whole()
        known = {(each.run, each.round, each.purpose) for each in chain.unprotected}
        if purpose == ADAPTER and (run, round, purpose) not in known:
            check_rounds(chain, limits)

    def release_unprotected(self, released: Unprotected, limits: Limits) -> None:
        """Records a release without privacy before it is sent: from here on epsilon is infinite.

        The same bytes of the same round are recorded only once.

        Raises:
            BudgetExceeded: A limit on rounds would be exceeded; nothing may be released.
            LedgerError: It could not be written; nothing may be released.
        """
        with self._locked():
            chain = self._whole()
            if released in chain.unprotected:
                return
            if released.purpose == ADAPTER:
                check_rounds(chain, limits)
            opening = self._opening(NO_UNIT, None)
            entries = [] if chain.entries else [Entry(0, "", 0, opening=opening)]
            index = len(chain.entries) + len(entries)
            self._append(chain, [*entries, Entry(index, "", 0, unprotected=released)])

    def correct_clock(self, reason: str) -> int:
        """Accepts the operator's statement that the clock had jumped forwards and is right now.

        Formal guarantees:
            * No limit lets more pass than if the clock had never jumped: every line that is ahead
              counts as written now, which is no earlier than it was. What was charged stays charged.

        Args:
            reason: The operator's reason; kept for the audit.

        Returns:
            Number of seconds by which the ledger was ahead.

        Raises:
            LedgerError: It is not ahead, the reason is empty, or it cannot be written.
        """
        if not reason.strip():
            raise LedgerError("a correction of the clock needs a reason: the audit shows it")
        with self._locked():
            chain = self._whole()
            now, ahead = clock.right_now(), clock.seconds_ahead(chain.entries)
            if ahead <= clock.AHEAD_SECONDS:
                raise LedgerError(
                    f"the ledger {self.path} is {ahead} s ahead of this machine's clock; up to "
                    f"{clock.AHEAD_SECONDS} s there is nothing to correct"
                )
            correction = Correction(ahead, reason.strip()[:_LONGEST_REASON])
            entry = Entry(len(chain.entries), "", now, correction=correction)
            self._append(chain, [entry], now)
            return ahead

    def commit(self, reserved: int, release_sha256: str) -> None:
        """Records which bytes a reserved charge paid for, before they are sent.

        Raises:
            LedgerError: The index is not an open reservation, or the file cannot be written.
        """
        with self._locked():
            chain = self.read()
            entries = chain.entries
            committed = {entry.reserve for entry in entries}
            known = 0 <= reserved < len(entries) and entries[reserved].charge is not None
            if not known or reserved in committed:
                raise LedgerError(f"the ledger {self.path} has no open reservation {reserved}")
            index = len(entries)
            entry = Entry(index, "", 0, reserve=reserved, release_sha256=release_sha256)
            self._append(chain, [entry])

    def released(self, request_sha256: str) -> dict[str, str]:
        """Hashes of what an equal request was already charged for, by purpose; empty if none."""
        entries = self.read().entries
        paid = {
            entry.index: entry.charge.purpose
            for entry in entries
            if entry.charge is not None and entry.charge.request_sha256 == request_sha256
        }
        return {
            paid[entry.reserve]: str(entry.release_sha256)
            for entry in entries
            if entry.reserve is not None and entry.reserve in paid
        }

    def statement(self, run: str, round: int, release_sha256: str) -> Statement:
        """Makes a signed statement of what a run has charged so far.

        Raises:
            LedgerError: Nothing was ever charged or released.
        """
        return signed(self._key, self._whole(), run=run, round=round, release_sha256=release_sha256)

    def extension(self, seen: Sequence[tuple[int, str]]) -> list[list[str]]:
        """Proofs that this ledger extends each state of it that a server has seen.

        Args:
            seen: Number of lines and Merkle root (hexadecimal) of each state.

        Returns:
            One proof for each: hashes, hexadecimal.

        Raises:
            RolledBack: The ledger is shorter than what was seen, or its first lines differ.
        """
        chain = self._whole()
        for size, root in seen:
            if not 0 <= size <= len(chain.entries) or chain.root(size) != root:
                raise RolledBack(
                    f"this node's ledger has {len(chain.entries)} lines, and the server has seen other "
                    f"ones up to line {size}: it was deleted, or restored from an older copy. Restore "
                    f"the latest copy, or ask the server's operator for `fedslm provision readmit`"
                )
        leaves = chain.leaves
        return [[each.hex() for each in consistency_proof(leaves, size)] for size, _ in seen]

    def _opening(self, unit: str, column: str | None) -> Opening:
        """The first line of a new ledger."""
        public = public_hex(self._public)
        return Opening(secrets.token_hex(16), self.dataset, unit, ADJACENCY, public, column)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Locks out other processes between check and append."""
        try:
            self._lock.acquire()
        except Timeout as error:
            raise LedgerError(f"the ledger {self.path} is locked by another process") from error
        except OSError as error:
            raise LedgerError(f"the ledger {self.path} cannot be locked: {error}") from error
        try:
            yield
        finally:
            self._lock.release()

    def _append(self, chain: Chain, entries: list[Entry], now: int | None = None) -> None:
        """Drops a torn last line, appends lines, syncs them, and updates the head."""
        now = clock.next_time(chain.entries) if now is None else now
        try:
            if not self._head.exists():
                self._move_head(-1, GENESIS)  # first: a ledger without a head was truncated
            with self.path.open("a+b") as file:
                file.seek(0)
                lines = whole_lines(file.read())
                file.truncate(sum(len(line) + 1 for line in lines))
                previous = line_hash(lines[-1]) if lines else GENESIS
                for entry in entries:
                    values = {**vars(entry), "previous": previous, "time": now}
                    line = encode(self._key, Entry(**values))
                    previous = line_hash(line[:-1])
                    file.write(line)
                file.flush()
                os.fsync(file.fileno())
            directory = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
            self._move_head(entries[-1].index, previous)
        except (OSError, RunError) as error:
            raise LedgerError(f"the ledger {self.path} cannot be written: {error}") from error

    def _move_head(self, index: int, sha256: str) -> None:
        """Saves the index and hash of the last line that is on disk."""
        write_text(self._head, json.dumps({"index": index, "sha256": sha256}) + "\n")


def _check_limits(chain: Chain, charges: Sequence[Charge], limits: Limits) -> None:
    """Refuses charges that would exceed a limit."""
    if len({(charge.run, charge.round, charge.plan_sha256) for charge in charges}) != 1:
        raise LedgerError("charges that are reserved together must be of one run, round and plan")
    first = charges[0]
    of_run = [charge for charge in chain.charges if charge.run == first.run]
    if any(charge.plan_sha256 != first.plan_sha256 for charge in of_run):
        raise PolicyRefused("this run was begun with another plan; a plan does not change within a run")
    new = [charge.event for charge in charges]
    check_budget([*(charge.event for charge in of_run), *new], limits.run, "the run")
    check_node_budgets(chain, charges, limits)
    check_rounds(chain, limits)


def _check_data(chain: Chain, charges: Sequence[Charge]) -> None:
    """Refuses charges of a run that began with other records."""
    known = {each.dataset_commitment for each in chain.charges if each.run == charges[0].run}
    if known | {each.dataset_commitment for each in charges} != {charges[0].dataset_commitment}:
        raise LedgerError("the records of this run are not those that it began with")
