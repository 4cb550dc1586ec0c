"""A ledger as a file: signed lines, each of which names the hash of the line before.

Reading needs the public key alone. Writing is :mod:`fedslm.privacy.ledger`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedslm.errors import LedgerError, PrivacyError
from fedslm.privacy.keys import is_signed, public_hex, signature_of
from fedslm.privacy.merkle import root_of
from fedslm.records import Event
from fedslm.storage import read_lines, read_text

GENESIS = "0" * 64
ADJACENCY = "add-or-remove-one"
HEAD_SUFFIX = ".head"
LONGEST_LINE, _MOST_HEAD_BYTES = 1 << 16, 4096
_NO_ENTRY = (ValueError, TypeError, KeyError, AttributeError, RecursionError, PrivacyError)
ADAPTER, METRIC = "adapter", "metric"  # what a charge can be for


@dataclass(frozen=True)
class Opening:
    """Whose ledger this is: its first line.

    Attributes:
        ledger_id: Random identifier; two ledgers never share one.
        dataset: The node's name for its data.
        unit: Whose participation every charge protects.
        adjacency: Relation of neighbouring data sets.
        public_key: Ed25519 key (hexadecimal) that signs all lines.
    """

    ledger_id: str
    dataset: str
    unit: str
    adjacency: str
    public_key: str


@dataclass(frozen=True)
class Charge:
    """What one release costs, and everything that it is bound to.

    Attributes:
        event: Sample rate, noise multiplier and steps.
        purpose: "adapter" or "metric".
        clip_norm: Largest L2 norm of one unit's contribution.
        delta: The delta of the run's budget.
        run: Identifier of the run.
        round: Round of the run, from 1.
        plan_sha256: Hash of the plan; one run has one plan.
        request_sha256: Hash of what was asked for: an equal request may be answered again.
        base_sha256: Hash of the base model.
        config_sha256: Hash of the run's config, as the server states it.
        code_version: Version of fedslm on the node.
        dataset_commitment: Keyed hash of the records.
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


@dataclass(frozen=True)
class Entry:
    """One line.

    Attributes:
        index: Position in the file, from 0.
        previous: SHA-256 of the line before.
        time: Seconds since 1970 by the node's clock.
        opening: What the ledger is about (the first line alone).
        charge: A reservation: charged from here on, committed or not.
        reserve: A commit: the index of the reservation that it releases.
        release_sha256: Hash of what was released (commit alone).
    """

    index: int
    previous: str
    time: int
    opening: Opening | None = None
    charge: Charge | None = None
    reserve: int | None = None
    release_sha256: str | None = None


@dataclass(frozen=True)
class Chain:
    """A whole ledger, checked.

    Attributes:
        entries: All entries; the first is the opening. Empty if there is no ledger yet.
        head: Hash of the last line.
        torn: True if bytes follow the last line that are no line: a crash while it was written.
    """

    entries: tuple[Entry, ...]
    head: str
    torn: bool

    @property
    def opening(self) -> Opening | None:
        """What the ledger is about."""
        return self.entries[0].opening if self.entries else None

    @property
    def charges(self) -> tuple[Charge, ...]:
        """Everything that was ever charged, in order."""
        return tuple(entry.charge for entry in self.entries if entry.charge is not None)

    @property
    def events(self) -> tuple[Event, ...]:
        """The events of all charges."""
        return tuple(charge.event for charge in self.charges)

    @property
    def leaves(self) -> list[bytes]:
        """Hashes of all lines, in order: the leaves of the ledger's Merkle tree."""
        hashes = [entry.previous for entry in self.entries[1:]]
        return [bytes.fromhex(each) for each in (*hashes, self.head)] if self.entries else []

    def root(self, size: int | None = None) -> str:
        """Root (hexadecimal) of the Merkle tree over the first ``size`` lines, or over all."""
        return root_of(self.leaves[:size]).hex()


def encode(key: Ed25519PrivateKey, entry: Entry) -> bytes:
    """Writes an entry as one signed line."""
    values = {name: value for name, value in asdict(entry).items() if value is not None}
    return json.dumps({**values, "signature": signature_of(key, values)}).encode() + b"\n"


def line_hash(line: bytes) -> str:
    """Hash of a line without its end."""
    return hashlib.sha256(line).hexdigest()


def whole_lines(content: bytes) -> list[bytes]:
    """The lines that were written to their end, without it."""
    return content.split(b"\n")[:-1]


def read_chain(path: Path, key: Ed25519PublicKey) -> Chain:
    """Reads a ledger and checks every line, signature and link.

    Formal guarantees:
        * Any changed, inserted, dropped, swapped or duplicated byte or line before the end of the last
          line is refused.
        * Lines missing at the end are seen if the head (beside the file, or saved elsewhere) is known:
          :func:`check_head`.

        * A line of more than 64 KiB is refused; no more of it is read.

    Raises:
        LedgerError: The file cannot be read or was changed.
    """
    entries: list[Entry] = []
    head, torn = GENESIS, False

    def lines() -> Iterator[bytes]:
        nonlocal head, torn
        for line in read_lines(path, LONGEST_LINE) if path.exists() else ():
            torn = not line.endswith(b"\n")
            if not torn:
                yield line[:-1]
                head = line_hash(line[:-1])

    try:
        entries.extend(_entries(path, lines(), key))
    except (OSError, ValueError) as error:
        raise LedgerError(f"the ledger {path} cannot be read: {error}") from error
    return Chain(tuple(entries), head, torn)


def read_head(path: Path) -> tuple[int, str] | None:
    """Index and hash of a saved head; None if there is no such file.

    Raises:
        LedgerError: The file cannot be read.
    """
    if not path.exists():
        return None
    try:
        values = json.loads(read_text(path, _MOST_HEAD_BYTES))
        index, sha256 = values["index"], values["sha256"]
        if not (isinstance(index, int) and index >= -1 and isinstance(sha256, str)):
            raise ValueError("it names no line")
        return index, sha256
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise LedgerError(f"the head {path} cannot be read: {error}") from error


def check_head(path: Path, chain: Chain, index: int, sha256: str) -> None:
    """Checks that a ledger still holds the line that was once its last.

    Raises:
        LedgerError: It does not: the ledger was rolled back, or is another one.
    """
    if not 0 <= index < len(chain.entries):
        raise LedgerError(
            f"the ledger {path} was rolled back: it has {len(chain.entries)} entries, and entry "
            f"{index} was seen before"
        )
    following = chain.entries[index + 1].previous if index + 1 < len(chain.entries) else chain.head
    if following != sha256:
        raise LedgerError(f"the ledger {path} was rewritten: entry {index} is not what was seen before")


def _entries(path: Path, lines: Iterable[bytes], key: Ed25519PublicKey) -> Iterator[Entry]:
    """Yields entries, checking the links between them."""
    previous, open_reservations = GENESIS, set[int]()
    for index, line in enumerate(lines):
        try:
            entry = _parse(line, public_hex(key))
        except _NO_ENTRY as error:
            text = f"the ledger {path} cannot be read at line {index + 1}: {str(error)[:200]}"
            raise LedgerError(text) from error
        linked = entry.index == index and entry.previous == previous
        if not linked or (entry.opening is not None) != (index == 0):
            raise LedgerError(f"the ledger {path} was changed at line {index + 1}")
        if entry.charge is not None:
            open_reservations.add(index)
        elif entry.reserve is not None:
            if entry.reserve not in open_reservations:
                raise LedgerError(f"the ledger {path} commits what is not open at line {index + 1}")
            open_reservations.remove(entry.reserve)
        previous = line_hash(line)
        yield entry


@lru_cache(maxsize=16_384)
def _parse(line: bytes, public_key: str) -> Entry:
    """Reads one line and checks its signature; what it says must be of one kind."""
    values: dict[str, Any] = json.loads(line)
    signature = values.pop("signature")
    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key))
    if not is_signed(key, values, signature):
        raise ValueError("the line does not match its signature")
    opening, charge = values.pop("opening", None), values.pop("charge", None)
    entry = Entry(
        **values,
        opening=None if opening is None else Opening(**opening),
        charge=None if charge is None else Charge(**{**charge, "event": Event(**charge["event"])}),
    )
    kinds = (entry.opening, entry.charge, entry.reserve)
    if sum(kind is not None for kind in kinds) != 1:
        raise ValueError("the line is of no kind, or of several")
    if entry.opening is not None and entry.opening.public_key != public_key:
        raise ValueError("the ledger was opened with another key")
    return entry
