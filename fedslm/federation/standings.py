"""A server's record of one ledger key, and its JSON form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fedslm.records import epsilon_as_json, epsilon_of_json, is_number


@dataclass(frozen=True)
class Readmission:
    """One readmission of a node by the operator.

    Attributes:
        at: When, ISO 8601, UTC.
        reason: The operator's reason.
        was_out_for: Why the node was excluded.
        ledger_id: Ledger that was seen before; empty if none was.
        charges: Number of its charges.
        epsilon: Its stated spend; infinite after a release without privacy.
        delta: The delta of that epsilon.
    """

    at: str
    reason: str
    was_out_for: str
    ledger_id: str
    charges: int
    epsilon: float
    delta: float


@dataclass(frozen=True)
class Standing:
    """The server's record of one ledger key.

    Attributes:
        ledger_id: Identifier of the ledger; empty before the first statement.
        seen: Every (lines, Merkle root) that the next statement must extend; one, unless runs are
            concurrent.
        charges: Number of charges in the ledger, over all runs and servers, as stated.
        epsilon: Epsilon of all of them; infinite (in JSON: "infinite") after a release without privacy,
            and permanently from then on.
        delta: The delta of that epsilon.
        stated: Each (delta, epsilon) that was stated for the whole ledger, the largest delta first;
            only those that no other one implies.
        runs: Run to the charges that were stated for it, for the latest runs.
        out: Why the node is excluded; empty if it is not.
        since: When it was excluded, ISO 8601, UTC.
        readmissions: Each readmission of the node.
    """

    ledger_id: str = ""
    seen: tuple[tuple[int, str], ...] = ()
    charges: int = 0
    epsilon: float = 0.0
    delta: float = 0.5
    stated: tuple[tuple[float, float], ...] = ()
    runs: Mapping[str, int] = field(default_factory=dict)
    out: str = ""
    since: str = ""
    readmissions: tuple[Readmission, ...] = ()


def as_values(standing: Standing) -> dict[str, Any]:
    """A standing as JSON values, which cannot be infinite numbers."""
    stated = [(delta, epsilon_as_json(epsilon)) for delta, epsilon in standing.stated]
    values = {**asdict(standing), "epsilon": epsilon_as_json(standing.epsilon), "stated": stated}
    again = [
        {**asdict(each), "epsilon": epsilon_as_json(each.epsilon)} for each in standing.readmissions
    ]
    return {**values, "readmissions": again}


def standing_of(values: Mapping[str, Any]) -> Standing:
    """Reads one entry; if a value has the wrong type, no figure of the entry is accepted.

    Raises:
        ValueError, KeyError, TypeError, PrivacyError: It is not what :func:`as_values` wrote.
    """
    seen = tuple((_count(size), _text(root)) for size, root in values["seen"])
    again = tuple(Readmission(**_spent(each)) for each in values["readmissions"])
    pairs = values.get("stated", ())
    stated = tuple((_delta(delta), epsilon_of_json(epsilon)) for delta, epsilon in pairs)
    kept = {key: each for key, each in _spent(values).items() if key != "older"}  # from old versions
    found = Standing(**{**kept, "seen": seen, "readmissions": again, "stated": stated})
    for text in (found.ledger_id, found.out, found.since):
        _text(text)
    for number in found.runs.values():
        _count(number)
    return found


def _spent(values: Mapping[str, Any]) -> dict[str, Any]:
    """An entry's values, after a check that charges, epsilon and delta are numbers."""
    numbers = {"charges": _count(values["charges"]), "delta": _delta(values["delta"])}
    return {**values, **numbers, "epsilon": epsilon_of_json(values["epsilon"])}


def _delta(value: object) -> float:
    """Checks a delta in (0, 1)."""
    if not (isinstance(value, int | float) and is_number(value) and 0 < value < 1):
        raise ValueError(f"delta={str(value)[:40]!r} must be in (0, 1)")
    return value


def _count(value: object) -> int:
    """Checks a whole number >= 0; a boolean is not one."""
    if type(value) is not int or value < 0:
        raise ValueError(f"{str(value)[:40]!r} must be a whole number >= 0")
    return value


def _text(value: object) -> str:
    """Checks a text."""
    if not isinstance(value, str):
        raise ValueError(f"{str(value)[:40]!r} must be text")
    return value
