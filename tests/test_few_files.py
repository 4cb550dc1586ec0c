"""A run with hundreds of clients under the smallest limit on open files that systems set."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CLIENTS, COHORT, FILES = 300, 40, 128
LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, ({files}, {files}))
from fedslm.cli import app
app(sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_a_run_needs_few_open_files(tmp_path: Path) -> None:
    """Neither the population nor the cohort keeps a file open (`ulimit -n 128`)."""
    script = tmp_path / "limited.py"
    script.write_text(LIMITED.format(files=FILES))
    values = [
        f"run.directory={tmp_path / 'run'}",
        f"federation.num_clients={CLIENTS}",
        f"federation.clients_per_round={COHORT}",
        "federation.rounds=2",
        "data.partition=iid",
        "data.max_evaluation_records=20",
        "training.local_steps=1",
        "training.batch_size=2",
        "privacy.sample_rate=0.2",
        "engine.workers=2",
    ]
    sets = [part for value in values for part in ("--set", value)]
    done = subprocess.run(
        [sys.executable, str(script), "simulate", str(ROOT / "simulations" / "demo.toml"), *sets],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report.json").exists()
