"""What does a Ray cluster cost over the workers of this machine?

The same job without privacy: on the local engine with two workers, and on a Ray cluster of two nodes of
one CPU each, which are both on this machine. Processor time is that of the whole run's processes in the
rounds after the first, Ray's own included; both must end with the same adapter, bit for bit.

    python benchmarks/cluster.py
    python benchmarks/cluster.py --model 0.2M --rounds 5

Linux only: the gauge is in /proc.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import scenario
import sides
from scenario import MEDIUM, SMALL

GOAL = 1.5
_START_SECONDS = 120.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=MEDIUM.name, choices=[SMALL.name, MEDIUM.name])
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default: 5)")
    arguments = parser.parse_args()
    size = {each.name: each for each in (SMALL, MEDIUM)}[arguments.model]
    busy = scenario.busy_cores()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        scenario.write_model(directory / "model", size)
        job = sides.Job(size.name, directory / "model", False, 8, 10, 4, 64)
        here = measure(job, directory, "local", arguments.rounds)
        with cluster() as address:
            there = measure(job, directory, "ray", arguments.rounds, address)
    report(here, there, busy)


def measure(
    job: sides.Job, directory: Path, name: str, rounds: int, address: str = ""
) -> dict[str, Any]:
    """Runs the job on one engine; the cluster's processes are below this one, so they count."""
    import fedslm

    path = sides.write_config(job, directory, name, rounds=rounds, steps=job.steps)
    engine = {"engine.name": "ray", "engine.address": address} if address else {"engine.workers": 2}
    watch = sides.Stopwatch()
    began = time.monotonic()
    run = fedslm.simulate(path, overrides=engine, observers=[watch])
    pairs = list(itertools.pairwise(watch.rounds[1:]))
    return {
        "sha256": run.report["adapter_sha256"],
        "cpu_seconds": statistics.median(end[1] - start[1] for start, end in pairs),
        "wall_seconds": statistics.median(end[0] - start[0] for start, end in pairs),
        "seconds": time.monotonic() - began,
    }


@contextmanager
def cluster() -> Iterator[str]:
    """A cluster of two nodes; its address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    port = address.split(":")[1]
    kinds = (["--head", "--port", port, "--include-dashboard", "false"], ["--address", address])
    nodes, folders = list[subprocess.Popen[bytes]](), list[str]()
    try:
        for kind in kinds:
            folders.append(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # paths of sockets must be short
            nodes.append(node([*kind, "--temp-dir", folders[-1]]))
            wait_for(address, len(nodes))
        yield address
    finally:
        for each in nodes:
            with suppress(ProcessLookupError):
                os.killpg(each.pid, signal.SIGTERM)
            each.wait(60)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def node(options: Sequence[str]) -> subprocess.Popen[bytes]:
    """Starts a node of one CPU, which ends with its process."""
    ray = str(Path(sys.executable).parent / "ray")
    own = ["--num-cpus", "1", "--object-store-memory", "100000000", "--disable-usage-stats", "--block"]
    environment = {**os.environ, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    return subprocess.Popen(
        [ray, "start", *options, *own],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def wait_for(address: str, count: int) -> None:
    """Waits until so many nodes are there."""
    from fedslm.config import EngineConfig
    from fedslm.engines.ray_cluster import survey
    from fedslm.errors import FederationError

    until = time.monotonic() + _START_SECONDS
    while time.monotonic() < until:
        with suppress(FederationError):
            if len(survey(EngineConfig(name="ray", address=address))) >= count:
                return
        time.sleep(0.5)
    raise SystemExit(f"the cluster at {address} did not start within {_START_SECONDS:g} s")


def report(here: dict[str, Any], there: dict[str, Any], busy: float) -> None:
    """The table, with its goal, and everything as one JSON line."""
    if here["sha256"] != there["sha256"]:
        raise SystemExit("the adapters differ")
    rows = [
        [name, *(f"{found[key]:.2f}" for key in ("cpu_seconds", "wall_seconds", "seconds"))]
        for name, found in (("local, two workers", here), ("Ray, two nodes", there))
    ]
    scenario.print_table(["", "CPU s a round", "wall s a round", "the whole run, s"], rows)
    ratio = there["cpu_seconds"] / here["cpu_seconds"]
    wall = there["wall_seconds"] / here["wall_seconds"]
    print(f"the same adapter; CPU {ratio:.2f} (goal ≤ {GOAL:g}), wall {wall:.2f}")
    ratios = {"cpu": round(ratio, 3), "wall": round(wall, 3)}
    print(json.dumps({"benchmark": "cluster", "busy_cores": busy, "ratios": ratios}))


if __name__ == "__main__":
    main()
