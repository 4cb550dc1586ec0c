"""A ledger that is audited."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fedslm.audit.ledgers import Evidence, LedgerAudit, audit_ledger
from fedslm.privacy import keys
from fedslm.privacy.ledger import Ledger
from fedslm.privacy.limits import Limits
from fedslm.privacy.lines import ADAPTER, Charge
from fedslm.records import Event

EVENT = Event(0.05, 3.0, 10)
DELTA = 1e-5
CHARGE = Charge(EVENT, ADAPTER, 1.0, DELTA, "run", 1, "plan", "request", "base", "config", "1", "data")
AMPLE = Limits((100.0, DELTA))


def spend(ledger: Ledger, round: int, *, commit: bool = True, plan: str = "plan") -> None:
    """Charges one round, and releases it unless told otherwise."""
    charge = replace(CHARGE, round=round, run=f"run-{plan}", plan_sha256=plan)
    (index,) = ledger.reserve([charge], AMPLE)
    if commit:
        ledger.commit(index, f"release-{round}")


def audit(node: Path, evidence: Evidence = Evidence()) -> LedgerAudit:
    """Audits with the public key that lies beside the ledger."""
    return audit_ledger(node, keys.read_public_key(node / keys.PUBLIC_KEY), evidence)
