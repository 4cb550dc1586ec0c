"""The possible contents of one line of a ledger: an opening, a charge, a commit, or another kind.

Formal guarantees:
    * Reading and writing enforce the same types, ranges and lists of words: a ledger never contains a
      line that it cannot read, and no word that nothing counts ("adapter" with one foreign letter) is
      accepted as a purpose, a unit or a relation.
    * A boolean is not a number here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from fedslm.errors import PrivacyError
from fedslm.privacy.shares import PROTOCOLS
from fedslm.records import Event, is_count, is_number
from fedslm.storage import is_text

ADJACENCY = "add-or-remove-one"
ADAPTER, METRIC = "adapter", "metric"  # the purposes of a charge
PURPOSES = (ADAPTER, METRIC)
NO_UNIT = "none"  # for a ledger that began with a release without privacy
UNITS = (NO_UNIT, "record", "user", "client")
LATEST_TIME = 4_102_444_800  # 2100-01-01: no clock beyond this date is right
_LONGEST_TEXT, _MOST_LINES = 512, 10**12


def stored_unit(unit: str) -> str:
    """The word that ledgers, statements and plans store for a unit: "patient" for a user.

    The stored words are signed or hashed, and many exist: they are mapped, never renamed.
    """
    return "patient" if unit == "user" else unit


def unit_of(stored: str) -> str:
    """The unit that a stored word stands for.

    Raises:
        PrivacyError: It is "user", which is never stored: each unit has one word on disk.

    >>> unit_of(stored_unit("user")), unit_of("record")
    ('user', 'record')
    """
    if stored == "user":
        raise PrivacyError('the unit is stored as "patient", not as "user"')
    return "user" if stored == "patient" else stored


@dataclass(frozen=True)
class Opening:
    """The first line of a ledger: whose participation it counts, and who signs it.

    Attributes:
        ledger_id: Random identifier; two ledgers never share one.
        dataset: The node's name for its data.
        unit: Whose participation every charge protects; "none" if the ledger began with a release
            without privacy: then the first charge determines it.
        adjacency: Relation of neighbouring data sets.
        public_key: Ed25519 key (hexadecimal) that signs all lines.
        unit_column: Column that identifies the owner of a record; None: the unit needs none, or the
            ledger was made by a version that did not write it: then the first charge that names one
            determines it.

    Raises:
        PrivacyError: A value has another type, or is not one of the known words.
    """

    ledger_id: str
    dataset: str
    unit: str
    adjacency: str
    public_key: str
    unit_column: str | None = None

    def __post_init__(self) -> None:
        _check(
            ledger_id=is_short_text(self.ledger_id) and re.fullmatch("[0-9a-f]{32}", self.ledger_id),
            dataset=is_short_text(self.dataset),
            unit=self.unit in UNITS,
            adjacency=self.adjacency == ADJACENCY,
            public_key=is_short_text(self.public_key),
            unit_column=self.unit_column is None or is_short_text(self.unit_column),
        )


@dataclass(frozen=True)
class Charge:
    """What one release costs, and everything that the charge is bound to.

    Attributes:
        event: Sample rate, noise multiplier and steps.
        purpose: "adapter" or "metric".
        clip_norm: Largest L2 norm of one unit's contribution.
        delta: The delta of the run's budget.
        run: Identifier of the run.
        round: Round of the run, from 1.
        plan_sha256: Hash of the plan; one run has one plan.
        request_sha256: Hash of the request: an equal request may be answered again.
        base_sha256: Hash of the base model.
        config_sha256: Hash of the run's config, as stated by the server.
        code_version: Version of fedslm on the node.
        dataset_commitment: Keyed hash of the records.
        unit: Whose participation it protects; this and the following are None in older lines.
        unit_column: Column that identifies the owner of a record; None if the unit needs none.
        max_records_per_unit: Most records of a unit in one step; None if the unit needs none.
        normaliser: Divisor of each noisy sum.
        protocol: How the sum over nodes is formed ("masked": by secure aggregation; "ideal": readable
            by the server, in a simulation); None if the node added all of the noise, so that its own
            release may be seen. A line without it is written as by older versions; they refuse a line
            with it.

    Raises:
        PrivacyError: A value has another type, or is out of range. Reading and writing apply the same
            checks: a ledger never contains a line that it cannot read.
    """

    event: Event
    purpose: str
    clip_norm: float
    delta: float
    run: str
    round: int
    plan_sha256: str
    request_sha256: str
    base_sha256: str
    config_sha256: str
    code_version: str
    dataset_commitment: str
    unit: str | None = None
    unit_column: str | None = None
    max_records_per_unit: int | None = None
    normaliser: int | None = None
    protocol: str | None = None

    def __post_init__(self) -> None:
        texts = (self.plan_sha256, self.request_sha256, self.base_sha256, self.config_sha256)
        _check(
            event=isinstance(self.event, Event),
            purpose=self.purpose in PURPOSES,
            clip_norm=is_number(self.clip_norm) and self.clip_norm > 0,
            delta=is_number(self.delta) and 0 < self.delta < 1,
            run=is_short_text(self.run),
            round=is_count(self.round),
            hashes=all(map(is_short_text, (*texts, self.dataset_commitment))),
            code_version=is_short_text(self.code_version),
            unit=self.unit is None or self.unit in UNITS[1:],
            unit_column=self.unit_column is None or is_short_text(self.unit_column),
            max_records_per_unit=self.max_records_per_unit is None
            or is_count(self.max_records_per_unit),
            normaliser=self.normaliser is None or is_count(self.normaliser),
            protocol=self.protocol is None
            if self.event.honest_nodes is None
            else self.protocol in PROTOCOLS,
        )


@dataclass(frozen=True)
class Unprotected:
    """A release without privacy, which the node's policy allowed: from here on epsilon is infinite.

    Attributes:
        run: Identifier of the run.
        round: Round of the run, from 1.
        purpose: "adapter" or "metric".
        release_sha256: Hash of what was released.
    """

    run: str
    round: int
    purpose: str
    release_sha256: str

    def __post_init__(self) -> None:
        _check(
            run=is_short_text(self.run),
            round=is_count(self.round),
            purpose=self.purpose in PURPOSES,
            release_sha256=is_short_text(self.release_sha256),
        )


@dataclass(frozen=True)
class Correction:
    """The operator's statement that the clock had jumped forwards, and is right at this line.

    Attributes:
        ahead: Number of seconds by which the ledger was ahead of the clock.
        reason: The operator's reason; for the audit.
    """

    ahead: int
    reason: str

    def __post_init__(self) -> None:
        _check(
            ahead=is_count(self.ahead), reason=is_short_text(self.reason) and bool(self.reason.strip())
        )


@dataclass(frozen=True)
class Entry:
    """One line; in a ledger it is of exactly one kind.

    Attributes:
        index: Position in the file, from 0.
        previous: SHA-256 of the line before.
        time: Seconds since 1970 by the ledger's own time (:mod:`fedslm.privacy.clock`).
        opening: Identifies the ledger (only in the first line).
        charge: A reservation: charged from here on, committed or not.
        reserve: A commit: the index of the reservation that it releases.
        release_sha256: Hash of what was released (only in a commit).
        unprotected: A release without privacy.
        correction: A correction of the clock.
    """

    index: int
    previous: str
    time: int
    opening: Opening | None = None
    charge: Charge | None = None
    reserve: int | None = None
    release_sha256: str | None = None
    unprotected: Unprotected | None = None
    correction: Correction | None = None

    def __post_init__(self) -> None:
        released = self.release_sha256
        _check(
            index=is_index(self.index),
            time=is_index(self.time) and self.time <= LATEST_TIME,
            reserve=self.reserve is None or is_index(self.reserve),
            release_sha256=is_short_text(released) if self.reserve is not None else released is None,
        )


def is_short_text(value: object) -> bool:
    """True for a text that is short enough for a line and can be stored in any file."""
    return isinstance(value, str) and len(value) <= _LONGEST_TEXT and is_text(value)


def is_index(value: object) -> bool:
    """True for a whole number from 0 up to 10^12; a boolean is not one."""
    return type(value) is int and 0 <= value <= _MOST_LINES


def _check(**holds: object) -> None:
    """Refuses a line in which a condition does not hold.

    Raises:
        PrivacyError: Names the first condition that does not hold.
    """
    for name, holding in holds.items():
        if not holding:
            raise PrivacyError(f"{name} of a ledger's line has another type, or is out of its range")
