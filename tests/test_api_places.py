"""Tests of where the API runs: in a notebook's event loop, twice in a process, in a script without a guard."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from support.tiny import make_rows

import fedslm
from fedslm.config import Config

Make = Callable[..., Config]
TRAIN, PUBLIC = make_rows(90, 0), make_rows(40, 1)
SCRIPT = """
import sys
import fedslm
from support.tiny import make_rows

result = fedslm.simulate(
    {
        "model": {"base": "demo", "device": "cpu"},
        "lora": {"rank": 2, "alpha": 2.0, "target_modules": ["3.output.dense"]},
        "task": {"name": "classification", "pooling": "mean", "max_length": 24},
        "training": {"local_steps": 2, "batch_size": 4, "learning_rate": 0.01},
        "privacy": {"unit": "none"},
        "federation": {"num_clients": 3, "rounds": 3, "evaluate_every": 1},
        "data": {"partition": "natural"},
        "engine": {"workers": 2},
    },
    overrides={"run.directory": sys.argv[1]},
    train=make_rows(90, 0),
    evaluation=make_rows(40, 1),
)
print(result.report["adapter_sha256"])
"""


def test_inside_a_running_event_loop_and_twice(config_in: Make, tmp_path: Path) -> None:
    """As in Jupyter: both runs of the process give the same adapter."""

    async def cell(name: str) -> str:
        result = fedslm.simulate(config_in(tmp_path / name), train=TRAIN, evaluation=PUBLIC)
        return str(result.report["adapter_sha256"])

    assert asyncio.run(cell("one")) == asyncio.run(cell("two"))


def test_a_script_without_a_guard_starts_workers(config_in: Make, tmp_path: Path) -> None:
    """Worker processes do not run the script again; they train what this process trains."""
    (tmp_path / "script.py").write_text(SCRIPT)
    places = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py", tmp_path / "run"],
        capture_output=True,
        text=True,
        timeout=800,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places)},
    )
    assert done.returncode == 0, done.stderr
    here = fedslm.simulate(config_in(tmp_path / "here"), train=TRAIN, evaluation=PUBLIC)
    assert done.stdout.split() == [here.report["adapter_sha256"]]
