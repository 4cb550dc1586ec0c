"""What the tests of ledgers share: a key, charges, a filled ledger, copies of it, a full disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedslm.privacy import accounting
from fedslm.privacy.chain import HEAD_SUFFIX
from fedslm.privacy.ledger import Ledger
from fedslm.privacy.limits import Limits
from fedslm.privacy.lines import ADAPTER, METRIC, Charge
from fedslm.records import Event

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER_KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
EVENT = Event(0.05, 3.0, 10)
OTHER = Event(0.02, 2.0, 5)
DELTA = 1e-5
AMPLE = Limits(run=(100.0, DELTA))


def budget_for(*events: Event) -> tuple[float, float]:
    """The budget that exactly these events use up."""
    return accounting.epsilon(events, DELTA), DELTA


def charge(event: Event = EVENT, **changes: Any) -> Charge:
    """A charge of round 1 of a run; keywords change its fields."""
    values: dict[str, Any] = {
        "purpose": ADAPTER,
        "clip_norm": 0.5,
        "delta": DELTA,
        "run": "run",
        "round": 1,
        "plan_sha256": "plan",
        "request_sha256": "request",
        "base_sha256": "base",
        "config_sha256": "config",
        "code_version": "0",
        "dataset_commitment": "data",
    }
    return Charge(event, **{**values, **changes})


def reserve(
    ledger: Ledger, event: Event = EVENT, limits: Limits | tuple[float, float] = AMPLE, **changes: Any
) -> int:
    """Reserves one charge; a pair is the run's budget."""
    if isinstance(limits, tuple):
        limits = Limits(run=limits)
    (index,) = ledger.reserve([charge(event, **changes)], limits)
    return index


def filled(path: Path) -> Ledger:
    """Opening, two reservations, each committed, and an open one for an adapter and a metric."""
    ledger = Ledger(path, KEY)
    for number in range(2):
        index = reserve(ledger, request_sha256=f"request-{number}")
        ledger.commit(index, f"release-{number}")
    ledger.reserve([charge(OTHER), charge(OTHER, purpose=METRIC)], AMPLE)
    return ledger


FILLED = (EVENT, EVENT, OTHER, OTHER)
FILLED_LINES = 7


def head_of(path: Path) -> Path:
    """The head beside a ledger."""
    return path.with_name(path.name + HEAD_SUFFIX)


def lines_of(path: Path) -> list[bytes]:
    """The file's lines, with their ends."""
    return path.read_bytes().splitlines(keepends=True)


def copy_of(path: Path, content: bytes, head: bytes | None) -> Ledger:
    """A ledger of these bytes, with this head (None: there is none)."""
    path.write_bytes(content)
    head_of(path).unlink(missing_ok=True)
    if head is not None:
        head_of(path).write_bytes(head)
    return Ledger(path, KEY)


def head_for(path: Path, position: int) -> bytes:
    """The head that was beside a ledger when line ``position`` was its last."""
    from fedslm.privacy.chain import line_hash

    line = lines_of(path)[position].removesuffix(b"\n")
    return json.dumps({"index": position, "sha256": line_hash(line)}).encode()
