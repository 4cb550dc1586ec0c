"""Checks the chain from a federated adapter to the student distilled from it, on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedslm import layout
from fedslm.errors import LedgerError, RunError
from fedslm.federation.checkpoint import RunDirectory
from fedslm.privacy.chain import GENESIS, read_chain
from fedslm.privacy.keys import PUBLIC_KEY, read_public_key
from fedslm.storage import load_adapter


def distillations(directory: RunDirectory) -> tuple[list[dict[str, Any]], list[str]]:
    """Returns every distillation in a run's directory.

    Each step is checked: the teacher is the released adapter, the student's file is the one that was
    written, no spending was claimed, and the ledgers still contain what they contained then.

    Returns:
        One description for each distillation, and the problems found.
    """
    found, findings = [], []
    for path in sorted(directory.path.glob(f"*/{layout.DISTILL_REPORT}")):
        try:
            privacy = json.loads(path.read_text(encoding="utf-8"))["privacy"]
            steps = _steps(directory, path.parent, privacy)
        except (OSError, ValueError, KeyError, TypeError, RunError) as error:
            findings.append(f"{path.parent.name}: the distillation's record is damaged: {error}")
            continue
        findings += [f"{path.parent.name}: {step}" for step, holds in steps.items() if not holds]
        found.append({"name": path.parent.name, **privacy, "sound": all(steps.values())})
    return found, findings


def _steps(directory: RunDirectory, path: Path, privacy: dict[str, Any]) -> dict[str, bool]:
    """Returns each condition that must hold, and whether it does."""
    taught = load_adapter(directory.path / layout.ADAPTER / layout.ADAPTER_WEIGHTS).sha256()
    learned = load_adapter(path / layout.ADAPTER / layout.ADAPTER_WEIGHTS).sha256()
    report = json.loads((directory.path / layout.REPORT).read_text(encoding="utf-8"))
    same = (privacy["run_id"], privacy["epsilon"]) == (directory.run_id, report["epsilon"])
    return {
        "the teacher is not the adapter that the run released": taught
        == privacy["teacher_adapter_sha256"],
        "the student's adapter is not the one that was written": learned
        == privacy["student_adapter_sha256"],
        "its privacy statement is not the run's": same and privacy["spent_here"] == 0,
        "a ledger does not hold what it held then": all(
            _still_holds(directory.nodes / name, mark) for name, mark in privacy["ledgers"].items()
        ),
    }


def _still_holds(node: Path, mark: dict[str, Any]) -> bool:
    """Whether a ledger contains all that it did: the line that was its last is one of its lines."""
    try:
        chain = read_chain(node / layout.LEDGER, read_public_key(node / PUBLIC_KEY))
    except (LedgerError, OSError):
        return False
    is_there = mark["head"] == GENESIS or bytes.fromhex(mark["head"]) in chain.leaves
    return is_there and len(chain.charges) >= int(mark["charges"])
