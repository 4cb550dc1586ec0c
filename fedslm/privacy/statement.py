"""What a node tells the server of its spending: signed, and bound to one release."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedslm.errors import LedgerError, PrivacyError
from fedslm.privacy.chain import Chain
from fedslm.privacy.keys import is_signed, public_hex, signature_of
from fedslm.records import Event


@dataclass(frozen=True)
class Statement:
    """A signed spend statement: public constants and hashes alone, nothing computed from records.

    Attributes:
        run: Identifier of the run.
        round: Round of the run.
        unit: Whose participation the charges protect.
        events: Everything that this run has charged so far.
        release_sha256: Hash of the released adapter.
        ledger_id: Random identifier of the ledger.
        index: Position of the ledger's last line.
        head_sha256: Hash of that line: a saved head, against which a rollback shows.
        public_key: Ed25519 key (hexadecimal).
        signature: Over all of the above.
    """

    run: str
    round: int
    unit: str
    events: tuple[Event, ...]
    release_sha256: str
    ledger_id: str
    index: int
    head_sha256: str
    public_key: str
    signature: str = ""

    def to_json(self) -> str:
        """Serialises the statement."""
        return json.dumps({**_values(self), "signature": self.signature})

    def follows(self, earlier: Statement) -> bool:
        """True if this can come after ``earlier`` from the same ledger.

        The ledger has only grown, and a later round was charged for.
        """
        same = (self.public_key, self.ledger_id, self.unit, self.run) == (
            earlier.public_key,
            earlier.ledger_id,
            earlier.unit,
            earlier.run,
        )
        grown = self.index > earlier.index or (
            self.index == earlier.index and self.head_sha256 == earlier.head_sha256
        )
        kept = self.events[: len(earlier.events)] == earlier.events
        paid = self.round <= earlier.round or len(self.events) > len(earlier.events)
        return same and grown and kept and paid


def signed(
    key: Ed25519PrivateKey, chain: Chain, *, run: str, round: int, release_sha256: str
) -> Statement:
    """States what a ledger holds for a run.

    Raises:
        LedgerError: The ledger is empty.
    """
    if chain.opening is None:
        raise LedgerError("an empty ledger has nothing to state")
    statement = Statement(
        run=run,
        round=round,
        unit=chain.opening.unit,
        events=tuple(charge.event for charge in chain.charges if charge.run == run),
        release_sha256=release_sha256,
        ledger_id=chain.opening.ledger_id,
        index=len(chain.entries) - 1,
        head_sha256=chain.head,
        public_key=public_hex(key.public_key()),
    )
    return replace(statement, signature=signature_of(key, _values(statement)))


def read_statement(text: str) -> Statement:
    """Reads a statement and checks its signature against the key that it names.

    Raises:
        PrivacyError: It is not a statement, or was not signed by that key.
    """
    try:
        values: dict[str, Any] = json.loads(text)
        values["events"] = tuple(Event(**event) for event in values["events"])
        statement = Statement(**values)
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(statement.public_key))
        numbers = (statement.round, statement.index)
        if not all(isinstance(number, int) for number in numbers):
            raise ValueError("round and index must be whole numbers")
        if not is_signed(key, _values(statement), statement.signature):
            raise ValueError("the signature does not match")
    except PrivacyError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise PrivacyError(f"the spend statement cannot be used: {error}") from error
    return statement


def _values(statement: Statement) -> Mapping[str, Any]:
    """Everything but the signature."""
    values = asdict(statement)
    del values["signature"]
    return {**values, "events": [asdict(event) for event in statement.events]}
