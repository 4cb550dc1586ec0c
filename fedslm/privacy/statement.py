"""A node's statement to the server of what it spent: signed, bound to one release, at most 2 kB."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedslm.errors import LedgerError, PrivacyError
from fedslm.privacy.chain import Chain
from fedslm.privacy.keys import is_signed, public_hex, signature_of
from fedslm.privacy.lines import NO_UNIT, UNITS, is_short_text, stored_unit, unit_of
from fedslm.privacy.shares import MOST_NODES, least_honest
from fedslm.records import Event, epsilon_as_json, epsilon_of_json, is_count, is_number

_MOST_BYTES, _MOST_CHARGES, _MOST_KINDS = 8192, 100_000, 32

LONGEST_STATEMENT, _MOST, _LONGEST_NAME = 8_192, 10**12, 200


@dataclass(frozen=True)
class Statement:
    """A signed spend statement: only public constants and hashes, nothing computed from records.

    Attributes:
        run: Identifier of the run.
        round: Round of the run.
        unit: Whose participation the charges protect; "none" if nothing was ever charged.
        charged: Each distinct event that this run has charged so far, with its count; sorted.
        release_sha256: Hash of the released adapter.
        ledger_id: Random identifier of the ledger.
        index: Position of the ledger's last line.
        head_sha256: Hash of that line: a saved head, which reveals a rollback.
        root_sha256: Root of the Merkle tree over the hashes of all lines
            (:mod:`fedslm.privacy.merkle`).
        charges: Number of charges in the ledger, over all runs.
        epsilon: Epsilon of all of them at ``delta``, for plans that were fixed beforehand: what the
            node has spent in its lifetime. Infinite (in JSON: "infinite") after a release without
            privacy in any run.
        delta: The delta of this run's budget.
        public_key: Ed25519 key (hexadecimal).
        signature: Signature over all of the other values.
        unprotected: Number of releases without privacy in the ledger, over all runs: the reason for an
            infinite epsilon. JSON omits a zero, so that statements of older versions can be read.
        honest_nodes: The most honest nodes that any charge in the ledger assumes, over all runs; None
            (and not in JSON, likewise) if ``epsilon`` assumes none. Older versions refuse a statement
            that has it.
        epsilon_if_all_collude: Epsilon of all charges if every other node colludes; None without
            ``honest_nodes``.
    """

    run: str
    round: int
    unit: str
    charged: tuple[tuple[Event, int], ...]
    release_sha256: str
    ledger_id: str
    index: int
    head_sha256: str
    root_sha256: str
    charges: int
    epsilon: float
    delta: float
    public_key: str
    signature: str = ""
    unprotected: int = 0
    honest_nodes: int | None = None
    epsilon_if_all_collude: float | None = None

    @property
    def events(self) -> tuple[Event, ...]:
        """Every charge of this run; equal ones are adjacent."""
        return tuple(event for event, count in self.charged for _ in range(count))

    @property
    def num_charged(self) -> int:
        """Number of charges of this run."""
        return sum(count for _, count in self.charged)

    @property
    def _ledger(self) -> tuple[object, ...]:
        """The values that two statements of one ledger must share if nothing was written in between."""
        told = (self.index, self.head_sha256, self.root_sha256, self.charges, self.charged)
        return (*told, self.unprotected)

    def to_json(self) -> str:
        """Serialises the statement."""
        return json.dumps({**_values(self), "signature": self.signature}, allow_nan=False)

    def follows(self, earlier: Statement) -> bool:
        """True if this can come after ``earlier`` from the same ledger.

        The ledger has only grown, no charge is missing, and a later round was charged for.
        That the earlier lines are unchanged is shown by a proof of extension
        (:func:`fedslm.privacy.merkle.extends`), not here.
        """
        same = (self.public_key, self.ledger_id, self.run) == (
            earlier.public_key,
            earlier.ledger_id,
            earlier.run,
        ) and earlier.unit in (NO_UNIT, self.unit)
        grown = self.index > earlier.index or self._ledger == earlier._ledger
        now = dict(self.charged)
        kept = all(now.get(event, 0) >= count for event, count in earlier.charged)
        kept = kept and self.charges >= earlier.charges and self.unprotected >= earlier.unprotected
        paid = self.num_charged > earlier.num_charged or (
            not self.charged and self.unprotected > earlier.unprotected
        )
        return same and grown and kept and (paid or self.round <= earlier.round)


def signed(
    key: Ed25519PrivateKey, chain: Chain, *, run: str, round: int, release_sha256: str
) -> Statement:
    """Makes a signed statement of what a ledger contains for a run, and in total.

    Raises:
        LedgerError: The ledger is empty.
        PrivacyError: Epsilon cannot be computed.
    """
    if chain.opening is None:
        raise LedgerError("an empty ledger has nothing to state")
    own = [charge for charge in chain.charges if charge.run == run]
    delta = max((charge.delta for charge in own or chain.charges), default=0.5)
    honest_nodes = least_honest(chain.events)
    statement = Statement(
        run=run,
        round=round,
        unit=chain.unit or NO_UNIT,
        charged=_counted(charge.event for charge in own),
        release_sha256=release_sha256,
        ledger_id=chain.opening.ledger_id,
        index=len(chain.entries) - 1,
        head_sha256=chain.head,
        root_sha256=chain.root(),
        charges=len(chain.charges),
        epsilon=chain.epsilon(delta),
        delta=delta,
        public_key=public_hex(key.public_key()),
        unprotected=len(chain.unprotected),
        honest_nodes=honest_nodes,
        epsilon_if_all_collude=None if honest_nodes is None else chain.epsilon_if_all_collude(delta),
    )
    return replace(statement, signature=signature_of(key, _values(statement)))


def read_statement(text: str) -> Statement:
    """Reads a statement and checks its signature against the key that it names.

    Raises:
        PrivacyError: It is not a statement, was not signed by that key, or is longer than 8 KiB.
    """
    if not isinstance(text, str) or len(text) > LONGEST_STATEMENT:
        raise PrivacyError(
            f"the spend statement is not a text of at most {LONGEST_STATEMENT} characters"
        )
    try:
        values: dict[str, Any] = json.loads(text)
        values["charged"] = tuple(_read_counted(values["charged"]))
        values["epsilon"] = epsilon_of_json(values["epsilon"])
        if "epsilon_if_all_collude" in values:
            values["epsilon_if_all_collude"] = epsilon_of_json(values["epsilon_if_all_collude"])
        values["unit"] = unit_of(values["unit"])
        statement = Statement(**values)
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(statement.public_key))
        _check(statement)
        if not is_signed(key, _values(statement), statement.signature):
            raise ValueError("the signature does not match")
    except PrivacyError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise PrivacyError(f"the spend statement cannot be used: {str(error)[:100]}") from error
    return statement


def _counted(events: Iterable[Event]) -> tuple[tuple[Event, int], ...]:
    """Distinct events with their counts, sorted."""
    counts = Counter(events)
    return tuple(sorted(counts.items(), key=lambda each: (*_figures(each[0]), each[1])))


def _figures(event: Event) -> list[float]:
    """An event's values in the order of its fields; honest_nodes only if nodes shared the noise."""
    return list(event.as_values().values())


def _read_counted(values: Any) -> list[tuple[Event, int]]:
    """Reads what :func:`_values` writes for ``charged``."""
    if not isinstance(values, list) or len(values) > _MOST_KINDS:
        raise ValueError(f"charged must list at most {_MOST_KINDS} different events")
    found = [(Event(*event), count) for *event, count in values]
    counts = [count for _, count in found]
    if not all(map(is_count, counts)) or sum(counts) > _MOST_CHARGES:
        raise ValueError(f"counts must be from 1, and at most {_MOST_CHARGES} together")
    if len({event for event, _ in found}) != len(found):
        raise ValueError("an event is listed twice")
    return found


def _check(statement: Statement) -> None:
    """Checks types and ranges of the signed values: a key may sign anything."""
    whole = (statement.round, statement.index, statement.charges, statement.unprotected)
    if any(type(number) is not int or not 0 <= number <= _MOST for number in whole):
        raise ValueError("round, index and charges must be whole numbers from 0 to 10^12")
    if (statement.epsilon == math.inf) != (statement.unprotected > 0):
        raise ValueError("epsilon must be infinite after a release without privacy, and only then")
    _check_assumption(statement)
    if not (is_number(statement.delta) and 0 < statement.delta < 1):
        raise ValueError("delta must be in (0, 1)")
    texts = ("run", "unit", "release_sha256", "ledger_id", "head_sha256", "root_sha256", "public_key")
    if (
        not all(is_short_text(getattr(statement, name)) for name in texts)
        or statement.unit not in UNITS
    ):
        raise ValueError(f"{', '.join(texts)} must be text, and the unit one of {', '.join(UNITS)}")
    if len(statement.run) > _LONGEST_NAME:
        raise ValueError(f"run must have at most {_LONGEST_NAME} characters")
    hashes = (("head_sha256", 64), ("root_sha256", 64), ("public_key", 64))
    for name, digits in (("ledger_id", 32), *hashes):
        if not re.fullmatch(rf"[0-9a-f]{{{digits}}}", getattr(statement, name)):
            raise ValueError(f"{name} must be {digits} hexadecimal digits")
    if not statement.num_charged <= statement.charges <= statement.index - statement.unprotected:
        raise ValueError("the run has more charges than the ledger, or the ledger more than lines")
    if len(statement.to_json()) > LONGEST_STATEMENT:
        raise ValueError(f"it is longer than {LONGEST_STATEMENT} characters")


def _check_assumption(statement: Statement) -> None:
    """Checks that a statement says what its epsilon assumes, and epsilon without it."""
    nodes, own = statement.honest_nodes, least_honest(event for event, _ in statement.charged)
    if (nodes is None) != (statement.epsilon_if_all_collude is None):
        raise ValueError("honest_nodes and epsilon_if_all_collude go together")
    if nodes is not None and not (is_count(nodes) and nodes <= MOST_NODES):
        raise ValueError(f"honest_nodes must be a whole number from 1 to {MOST_NODES}")
    if own is not None and (nodes is None or own > nodes):
        raise ValueError("the run's charges assume more honest nodes than the statement says")
    if (
        statement.epsilon_if_all_collude is not None
        and not statement.epsilon_if_all_collude >= statement.epsilon
    ):
        raise ValueError("epsilon_if_all_collude must be at least epsilon")


def _values(statement: Statement) -> Mapping[str, Any]:
    """All values but the signature."""
    values = {**asdict(statement), "epsilon": epsilon_as_json(statement.epsilon)}
    values["unit"] = stored_unit(statement.unit)
    del values["signature"]
    if not statement.unprotected:
        del values["unprotected"]
    if statement.honest_nodes is None:
        del values["honest_nodes"], values["epsilon_if_all_collude"]
    elif statement.epsilon_if_all_collude is not None:
        values["epsilon_if_all_collude"] = epsilon_as_json(statement.epsilon_if_all_collude)
    charged = [[*_figures(event), count] for event, count in statement.charged]
    return {**values, "charged": charged}
