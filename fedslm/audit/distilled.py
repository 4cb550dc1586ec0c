"""The chain from a federated adapter to the student that was distilled from it, checked on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedslm import layout
from fedslm.errors import LedgerError, RunError
from fedslm.federation.checkpoint import RunDirectory
from fedslm.privacy.chain import read_chain
from fedslm.privacy.keys import PUBLIC_KEY, read_public_key
from fedslm.storage import load_adapter


def distillations(directory: RunDirectory) -> tuple[list[dict[str, Any]], list[str]]:
    """Every distillation that lies in a run's directory.

    Each step is looked at: the released adapter is the one that taught, the student's file is the one
    that was written, nothing was claimed to be spent, and what the ledgers held then they hold still.

    Returns:
        One description for each distillation, and what is wrong.
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
    """What must hold, and whether it does."""
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
    """Whether a ledger has at least the charges that it had."""
    try:
        chain = read_chain(node / layout.LEDGER, read_public_key(node / PUBLIC_KEY))
    except (LedgerError, OSError):
        return False
    return len(chain.charges) >= int(mark["charges"])
