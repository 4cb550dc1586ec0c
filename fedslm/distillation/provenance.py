"""Why distillation spends no budget: the hash chain from the federated adapter to the student's.

A distillation reads the adapter, public records and the student. A result computed from a private
release and from public data is post-processing: it has the release's (epsilon, delta). The following
would break it: private records among the public ones, a checkpoint or setting chosen by a metric on
private records, or a teacher that is not the released adapter.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedslm import layout
from fedslm.errors import PrivacyError
from fedslm.inference.trained import FinishedRun
from fedslm.privacy.chain import read_chain
from fedslm.privacy.keys import PUBLIC_KEY, read_public_key
from fedslm.records import INFINITE, AdapterState


@dataclass(frozen=True)
class LedgerMark:
    """The state of a node's ledger at one point in time.

    Attributes:
        charges: Number of charges in the ledger.
        head: Hash of its last entry.
    """

    charges: int
    head: str


def ledgers_of(directory: Path) -> dict[str, LedgerMark]:
    """The ledgers of a simulation's nodes, by name; real nodes keep their own.

    Raises:
        LedgerError: A ledger is damaged.
    """
    found = {}
    for node in sorted((directory / layout.NODES).glob("client-*")):
        if (node / layout.LEDGER).exists():
            chain = read_chain(node / layout.LEDGER, read_public_key(node / PUBLIC_KEY))
            found[node.name] = LedgerMark(len(chain.charges), chain.head)
    return found


def chain_of(run: FinishedRun, adapter: AdapterState, before: dict[str, LedgerMark]) -> dict[str, Any]:
    """Returns the guarantee that the student's adapter inherits, and its source.

    Args:
        run: The teacher's run.
        adapter: The student's adapter.
        before: Result of :func:`ledgers_of` before the distillation.

    Raises:
        PrivacyError: A ledger changed meanwhile: another process trains on the same nodes.
    """
    after = ledgers_of(run.directory)
    if after != before:
        moved = sorted(name for name in after if after[name] != before.get(name))
        raise PrivacyError(
            f"the ledgers of {', '.join(moved)} changed during the distillation: another run charged "
            f"them, so the spending of this one is unknown"
        )
    report = run.report
    plan = report["plan"]
    return {
        "epsilon": report["epsilon"] if plan else INFINITE,
        "delta": report["delta"] if plan else None,
        "unit": plan["unit"] if plan else None,
        "assumption": report.get("assumption"),  # absent in reports of older versions
        "spent_here": 0.0,
        "run_id": report.get("run_id"),
        "config_sha256": report.get("config_sha256"),
        "teacher_adapter_sha256": report["adapter_sha256"],
        "student_adapter_sha256": adapter.sha256(),
        "ledgers": {name: asdict(mark) for name, mark in after.items()},
    }
