"""Law 5: the same no-noise job gives the same adapter on the local engine, on Ray and under flwr run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.sites import free_port

from fedslm import config as configuration
from fedslm.config import Config
from fedslm.records import AdapterState
from fedslm.storage import load_adapter

pytestmark = pytest.mark.real
ROOT = Path(__file__).parent.parent.parent
POLITE = {"RAY_worker_niceness": "0"}  # by default other tests that run now would starve Ray's workers
BIN = Path(sys.executable).parent


def make_config(assets: Path, directory: Path, **engine: Any) -> Config:
    """A small job on a real model and real data."""
    return configuration.from_mapping(
        {
            "run": {"name": "engines", "directory": str(directory)},
            "model": {"base": str(assets / "models/stories260K")},
            "lora": {"rank": 4, "alpha": 8.0},
            "data": {
                "source": str(assets / "data/shakespeare_speakers"),
                "label_column": "",
                "partition": "natural",
                "max_evaluation_records": 40,
            },
            "task": {"name": "causal-lm", "max_length": 48},
            "training": {"local_steps": 3, "batch_size": 8, "learning_rate": 0.01},
            "privacy": {"unit": "none"},
            "federation": {"num_clients": 4, "rounds": 2},
            "engine": engine,
        }
    )


def adapter_of(directory: Path) -> AdapterState:
    """The adapter that a run ended with."""
    state = json.loads((directory / "checkpoint" / "state.json").read_text())
    assert state["round"] == 2
    return load_adapter(directory / "checkpoint" / state["files"]["moving"]["name"])


def write(config: Config, path: Path) -> Path:
    """Writes a config that Flower reads too: scalars alone."""
    lines = []
    section = ""
    for dotted, value in config.flat().items():
        name, key = dotted.split(".")
        if name != section:
            lines.append(f"[{name}]")
            section = name
        lines.append(f"{key} = {json.dumps(value)}")
    path.write_text("\n".join(lines))
    return path


def simulate(config: Config, path: Path) -> AdapterState:
    """Runs the command line."""
    command = [BIN / "fedslm", "simulate", write(config, path), "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=400, env={**os.environ, **POLITE}
    )
    assert done.returncode == 0, done.stderr
    return adapter_of(Path(str(config.run.directory)))


@contextlib.contextmanager
def flower(home: Path) -> Iterator[dict[str, str]]:
    """An environment of its own for Flower's persistent local SuperLink, stopped at the end."""
    environment = {
        **os.environ,
        **POLITE,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
        "FLWR_LOCAL_CONTROL_API_PORT": str(free_port()),
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    try:
        yield environment
    finally:
        for process in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                variables = (process / "environ").read_bytes()
                if process.name != str(os.getpid()) and str(home).encode() in variables:
                    os.kill(int(process.name), signal.SIGKILL)


def flwr_run(config: Config, path: Path, environment: dict[str, str]) -> AdapterState:
    """Runs ``flwr run`` from a neutral directory and waits for its report."""
    command = ["flwr", "run", str(ROOT), "local", "--stream", "-c", str(write(config, path))]
    federation = "num-supernodes=4 client-resources-num-cpus=1 init-args-num-cpus=2"
    done = subprocess.run(
        [*command, "--federation-config", federation],
        cwd="/",
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    report = Path(str(config.run.directory)) / "report.json"
    deadline = time.monotonic() + 60
    while not report.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert report.exists(), done.stdout + done.stderr
    return adapter_of(report.parent)


def assert_close(one: AdapterState, other: AdapterState) -> None:
    """The same tensors to rounding."""
    assert one.shapes == other.shapes
    for key in one:
        np.testing.assert_allclose(one[key], other[key], atol=1e-6)


def test_engines_agree(assets: Path, tmp_path: Path) -> None:
    """In this process and in workers: bit-equal; on Ray and under flwr run: equal to 1e-6."""
    inline = simulate(make_config(assets, tmp_path / "inline", workers=0), tmp_path / "a.toml")
    workers = simulate(make_config(assets, tmp_path / "workers", workers=2), tmp_path / "b.toml")
    assert inline.sha256() == workers.sha256()
    on_ray = simulate(make_config(assets, tmp_path / "ray", name="ray", workers=2), tmp_path / "c.toml")
    assert_close(inline, on_ray)
    with flower(tmp_path / "home") as environment:
        run = flwr_run(make_config(assets, tmp_path / "flwr"), tmp_path / "d.toml", environment)
    assert_close(inline, run)
    bundle = {path.suffix for path in (tmp_path / "home" / "apps").rglob("*") if path.is_file()}
    names = {path.name for path in (tmp_path / "home" / "apps").rglob("*.py")}
    assert bundle <= {".py", ".toml"}
    assert names == {"__init__.py", "app.py"}
