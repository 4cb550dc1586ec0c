"""Runs of the local scenario files, for the tests on real weights and data."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from fedslm import config as configuration
from fedslm import simulation
from fedslm.progress import Bar

ROOT = Path(__file__).parent.parent.parent


def run(scenario: str, tmp_path: Path, *overrides: str) -> dict[str, Any]:
    """Runs a scenario file with overrides and prints what came out."""
    everywhere = (f"run.directory={tmp_path / 'run'}", *overrides)
    config = configuration.from_toml(ROOT / "simulations" / "local" / scenario, everywhere)
    began = time.monotonic()
    report = simulation.simulate(config, [Bar()])
    print(
        f"{scenario}: {report['metrics_before']} -> {report['metrics_after']}, "
        f"epsilon {report['epsilon']}, {time.monotonic() - began:.0f} s"
    )
    return report
