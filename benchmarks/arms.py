"""Runs of `fedslm simulate` that tables are made of: made once, resumed if interrupted."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs"
FEDSLM = str(Path(sys.executable).parent / "fedslm")
RUN_SECONDS = 3600


def finished_run(config: Path, directory: Path, overrides: Iterable[str]) -> Path:
    """Runs, resumes, or finds one arm.

    Args:
        config: The scenario's file.
        directory: The run's directory; its parent is made.
        overrides: What the arm changes, as for ``--set``.

    Returns:
        The directory, with a finished run in it.
    """
    if (directory / "report.json").exists():
        return directory
    command = [FEDSLM, "simulate"]
    if (directory / "checkpoint").exists():
        command += ["--resume", str(directory)]
    else:
        command.append(str(config))
        for override in (f"run.directory={directory}", *overrides):
            command += ["--set", override]
    print("$", " ".join(command), flush=True)
    subprocess.run(command, check=True, timeout=RUN_SECONDS)
    return directory


def report_of(directory: Path) -> dict[str, Any] | None:
    """A finished run's report; None if it is not finished."""
    path = directory / "report.json"
    if not path.exists():
        return None
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report
