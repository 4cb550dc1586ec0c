"""A ledger as a file: signed lines, each of which contains the hash of the line before.

Reading needs only the public key. :mod:`fedslm.privacy.lines` defines the content of a line;
:mod:`fedslm.privacy.ledger` writes lines.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedslm.errors import LedgerError, PrivacyError
from fedslm.privacy import accounting
from fedslm.privacy.keys import is_signed, public_hex, signature_of
from fedslm.privacy.lines import (
    NO_UNIT,
    Charge,
    Correction,
    Entry,
    Opening,
    Unprotected,
    is_index,
    is_short_text,
    stored_unit,
    unit_of,
)
from fedslm.privacy.merkle import root_of
from fedslm.records import Event
from fedslm.storage import read_lines, read_text

GENESIS = "0" * 64
_WITH_UNIT = {"opening", "charge"}
HEAD_SUFFIX = ".head"
LONGEST_LINE, _MOST_HEAD_BYTES = 1 << 16, 4096
_NO_ENTRY = (ValueError, TypeError, KeyError, AttributeError, RecursionError, PrivacyError)


@dataclass(frozen=True)
class Chain:
    """A complete ledger that was checked.

    Attributes:
        entries: All entries; the first is the opening. Empty if there is no ledger yet.
        head: Hash of the last line.
        torn: True if bytes that are not a line follow the last line: a crash during a write.
    """

    entries: tuple[Entry, ...]
    head: str
    torn: bool

    @property
    def opening(self) -> Opening | None:
        """The ledger's opening; None if there is no ledger yet."""
        return self.entries[0].opening if self.entries else None

    @property
    def charges(self) -> tuple[Charge, ...]:
        """Every charge of the ledger, in order."""
        return tuple(entry.charge for entry in self.entries if entry.charge is not None)

    @property
    def events(self) -> tuple[Event, ...]:
        """The events of all charges."""
        return tuple(charge.event for charge in self.charges)

    @property
    def unprotected(self) -> tuple[Unprotected, ...]:
        """Every release without privacy, in order."""
        return tuple(entry.unprotected for entry in self.entries if entry.unprotected is not None)

    @property
    def runs(self) -> tuple[str, ...]:
        """Every run with a charge or a release without privacy, once each, in order."""
        made = (entry.charge or entry.unprotected for entry in self.entries)
        return tuple(dict.fromkeys(each.run for each in made if each is not None))

    @property
    def unit(self) -> str | None:
        """The unit whose participation is counted; None if no line names one yet."""
        opened = None if self.opening is None or self.opening.unit == NO_UNIT else self.opening.unit
        return opened or next((each.unit for each in self.charges if each.unit is not None), None)

    @property
    def unit_column(self) -> str | None:
        """The unit's column: that of the opening, or of the first charge that names one."""
        opened = None if self.opening is None else self.opening.unit_column
        named = (each.unit_column for each in self.charges if each.unit_column is not None)
        return opened if opened is not None else next(named, None)

    def epsilon(self, delta: float) -> float:
        """Epsilon of everything that was ever released; infinite after a release without privacy.

        Raises:
            PrivacyError: Delta is out of range, or the events are beyond what can be computed.
        """
        return math.inf if self.unprotected else accounting.epsilon(self.events, delta)

    def epsilon_if_all_collude(self, delta: float) -> float:
        """The same if every other node colludes: of noise that nodes shared, only this node's counts.

        Raises:
            PrivacyError: As :meth:`epsilon`.
        """
        return math.inf if self.unprotected else accounting.epsilon_if_all_collude(self.events, delta)

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
    for part in _WITH_UNIT & set(values):
        if values[part]["unit"] is not None:
            values[part]["unit"] = stored_unit(values[part]["unit"])
    if entry.charge is not None:
        values["charge"]["event"] = entry.charge.event.as_values()
        if entry.charge.protocol is None:  # as older versions write it
            del values["charge"]["protocol"]
    return json.dumps({**values, "signature": signature_of(key, values)}).encode() + b"\n"


def line_hash(line: bytes) -> str:
    """Hash of a line without its line end."""
    return hashlib.sha256(line).hexdigest()


def whole_lines(content: bytes) -> list[bytes]:
    """The lines that were written completely, without their line ends."""
    return content.split(b"\n")[:-1]


def read_chain(path: Path, key: Ed25519PublicKey) -> Chain:
    """Reads a ledger and checks every line, signature and link.

    Formal guarantees:
        * Any changed, inserted, dropped, swapped or duplicated byte or line before the end of the last
          line is refused.
        * Lines missing at the end are detected if the head (stored next to the file, or saved
          elsewhere) is known: :func:`check_head`.
        * A line has exactly one valid encoding, and any other is refused, whoever signed it: extra
          spaces, another system's line end, a duplicate key, another spelling of a number or a letter.
          So every JSON reader finds the same content in it.
        * A line of more than 64 KiB is refused; no more than that is read of it.

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
    """Reads the index and hash of a saved head; None if there is no such file.

    Raises:
        LedgerError: The file cannot be read.
    """
    if not path.exists():
        return None
    try:
        values = json.loads(read_text(path, _MOST_HEAD_BYTES))
        index, sha256 = values["index"], values["sha256"]
        if not (type(index) is int and (index == -1 or is_index(index)) and is_short_text(sha256)):
            raise ValueError("it names no line")
        return index, sha256
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise LedgerError(f"the head {path} cannot be read: {error}") from error


def check_head(path: Path, chain: Chain, index: int, sha256: str) -> None:
    """Checks that a ledger still contains the line that was once its last.

    Raises:
        LedgerError: It does not: the ledger was rolled back, or is a different one.
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
    """Yields the entries and checks the links between them."""
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
    """Reads one line, checks its signature, and checks that it is of exactly one kind."""
    values: dict[str, Any] = json.loads(line)
    if json.dumps(values).encode() != line:
        raise ValueError("the line is not written as fedslm writes it")
    signature = values.pop("signature")
    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key))
    if not is_signed(key, values, signature):
        raise ValueError("the line does not match its signature")
    opening, charge = values.pop("opening", None), values.pop("charge", None)
    for part in (opening, charge):
        if part is not None and part.get("unit") is not None:
            part["unit"] = unit_of(part["unit"])
    unprotected, correction = values.pop("unprotected", None), values.pop("correction", None)
    entry = Entry(
        **values,
        opening=None if opening is None else Opening(**opening),
        charge=None if charge is None else Charge(**{**charge, "event": Event(**charge["event"])}),
        unprotected=None if unprotected is None else Unprotected(**unprotected),
        correction=None if correction is None else Correction(**correction),
    )
    kinds = (entry.opening, entry.charge, entry.reserve, entry.unprotected, entry.correction)
    if sum(kind is not None for kind in kinds) != 1:
        raise ValueError("the line is of no kind, or of several")
    if entry.opening is not None and entry.opening.public_key != public_key:
        raise ValueError("the ledger was opened with another key")
    return entry
