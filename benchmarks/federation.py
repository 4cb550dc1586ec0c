"""Federations for ``deployment.py``: real processes on loopback, over TLS and with node keys.

Each is a context manager that yields a function: a number of rounds in; out, when the first began and
when each was over, in seconds.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import scenario

PROGRAMS = Path(sys.executable).parent
PLAIN = Path(__file__).with_name("plain_flower")
NODES, LABELS, RANK, RECORDS = 2, 6, 8, 16
START_SECONDS, RUN_SECONDS, STOP_SECONDS, GLANCE_SECONDS = 90.0, 900.0, 20.0, 0.01
FLOWER = {"FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "OMP_NUM_THREADS": "1"}
POLICY = """
unit = "none"
epsilon = 1.0
delta = 1e-5
min_noise_multiplier = 1.0
max_clip_norm = 1.0
max_sample_rate = 0.2
max_steps_per_round = 4
max_rounds_per_day = 100000
base_models = ["any"]
tasks = ["classification"]
"""

Lines = list[tuple[float, dict[str, Any]]]
Run = Callable[[int], list[float]]


class Processes:
    """Starts programs with logs of their own; stops all of them, and what they started."""

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        self._directory, self._environment = directory, {**scenario.quiet(), **environment}
        self._running: list[subprocess.Popen[bytes]] = []

    @contextmanager
    def stopped(self) -> Iterator[Processes]:
        """Stops them at the end, the last one first."""
        try:
            yield self
        finally:
            for process in reversed(self._running):
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    def start(self, name: str, *command: str | Path) -> subprocess.Popen[bytes]:
        """Starts a program in a directory where nothing can be imported by accident."""
        with self.log(name).open("ab") as log:
            process = subprocess.Popen(
                [PROGRAMS / command[0], *map(str, command[1:])],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                cwd="/",
                start_new_session=True,
            )
        self._running.append(process)
        return process

    def log(self, name: str) -> Path:
        """Where a program's output goes."""
        return self._directory / f"{name}.log"

    def output(self, *command: str | Path) -> str:
        """Runs a program to its end; gives what it prints."""
        done = subprocess.run(
            [PROGRAMS / command[0], *map(str, command[1:])],
            capture_output=True,
            text=True,
            env=self._environment,
            cwd="/",
            timeout=START_SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout


@contextmanager
def fedslm(directory: Path, *, warm: bool) -> Iterator[Run]:
    """A server behind its proxy, and nodes whose workers stay warm, or do not."""
    server = directory / "server"
    server.mkdir(parents=True)
    (server / "federation.toml").write_text(
        f'name = "bench"\nhost = "127.0.0.1"\nport = {free_port()}\ninner_port = {free_port()}\n'
    )
    with Processes(directory, FLOWER).stopped() as processes:
        processes.output("fedslm", "provision", "init", server / "federation.toml")
        up = processes.start("server", "fedslm", "server", "up", server)
        wait_until(lambda: "the server is up" in processes.log("server").read_text(), up)
        for index in range(NODES):
            node = directory / f"node{index}"
            node.mkdir()
            write_records(node / "notes.jsonl")
            lines = [f'name = "{node.name}"', f'source = "{node}/notes.jsonl"']
            lines += [] if warm else ["warm = false"]
            (node / "node.toml").write_text("\n".join(lines) + "\n")
            (node / "policy.toml").write_text(POLICY)
            admission = server / "admissions" / f"{node.name}.admission.json"
            processes.output("fedslm", "node", "enroll", node, "--name", node.name)
            request = node / f"{node.name}.request.json"
            processes.output("fedslm", "provision", "admit", request, "--server", server)
            processes.output("fedslm", "node", "accept", node, admission)
            processes.start(node.name, "fedslm", "node", "up", node)
        yield lambda rounds: run_fedslm(processes, server, rounds)


def run_fedslm(processes: Processes, server: Path, rounds: int) -> list[float]:
    """One run; nothing is trained but one step on one record, and its last round evaluates."""
    run = server / "runs" / "bench"
    values = {
        "run": {"name": "bench", "directory": str(run)},
        "model": {"base": "demo", "device": "cpu"},
        "lora": {"rank": RANK, "alpha": float(RANK)},
        "data": {"source": "demo", "max_evaluation_records": 2},
        "task": {"name": "classification", "pooling": "mean", "max_length": 96},
        "training": {"local_steps": 1, "batch_size": 1},
        "privacy": {"unit": "none"},
        "federation": {"num_clients": NODES, "rounds": rounds, "evaluate_every": rounds + 1},
    }
    config = server / "bench.toml"
    config.write_text(scenario.to_toml(values))
    process = processes.start("run", "fedslm", "server", "run", config, "--server", server)
    found = watched(run / "rounds.jsonl", rounds, process)
    assert process.wait(START_SECONDS) == 0, processes.log("run").read_text()
    for _, record in found:
        assert record["completed"] == NODES, record["reasons"]
    return [found[0][0] - found[0][1]["seconds"], *(seconds for seconds, _ in found)]


@contextmanager
def flower(directory: Path) -> Iterator[Run]:
    """Flower's SuperLink and SuperNodes as they come: a process for every message."""
    from fedslm.deployment.authority import (
        AUTHORITY,
        SERVER,
        SERVER_KEY,
        create_authority,
        issue_server,
    )

    directory.mkdir(parents=True)
    create_authority(directory, "bench", 2)
    issue_server(directory, ["localhost", "127.0.0.1"], 1)
    port, authority = free_port(), directory / AUTHORITY
    (directory / "config.toml").write_text(
        f'[superlink.bench]\naddress = "127.0.0.1:{port}"\nroot-certificates = "{authority}"\n'
    )
    own = {"FLWR_HOME": str(directory), "PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}"}
    with Processes(directory, {**FLOWER, **own}).stopped() as processes:
        certificate = ("--ssl-certfile", directory / SERVER, "--ssl-keyfile", directory / SERVER_KEY)
        link = ("flower-superlink", "--host", "127.0.0.1", "--port", str(port))
        up = processes.start(
            "superlink",
            *link,
            *("--ssl-ca-certfile", authority, *certificate, "--enable-supernode-auth"),
        )
        wait_until(lambda: listening(port), up)
        for index in range(NODES):
            key = directory / f"node{index}"
            write_node_key(key)
            processes.output("flwr", "supernode", "register", f"{key}.pub", "bench")
            link = ("--superlink", f"127.0.0.1:{port}", "--root-certificates", authority)
            own_port = ("--port", str(free_port()), "--auth-supernode-private-key", key)
            processes.start(key.name, "flower-supernode", *link, *own_port)
        yield lambda rounds: run_flower(processes, directory, rounds)


def run_flower(processes: Processes, directory: Path, rounds: int) -> list[float]:
    """One run of the app beside this file."""
    from fedslm.models.base import DEMO_DIRECTORY

    file = directory / "rounds.jsonl"
    values = {
        "base": str(DEMO_DIRECTORY),
        "labels": LABELS,
        "rank": RANK,
        "nodes": NODES,
        "rounds": rounds,
        "rounds-file": str(file),
    }
    overrides = " ".join(f"{key}={json.dumps(value)}" for key, value in values.items())
    process = processes.start("run", "flwr", "run", PLAIN, "bench", "-c", overrides, "--stream")
    found = watched(file, rounds + 1, process)
    process.wait(START_SECONDS)
    listed = json.loads(processes.output("flwr", "ls", "bench", "--format", "json"))
    states = [run["status"] for run in listed["runs"]]
    assert states == ["finished:completed"], processes.log("run").read_text()
    return [seconds for seconds, _ in found]


def watched(path: Path, lines: int, process: subprocess.Popen[bytes]) -> Lines:
    """Reads a file while it grows; gives each line and when it was there."""
    found: Lines = []
    deadline = time.monotonic() + RUN_SECONDS
    while len(found) < lines:
        seen = path.read_text().splitlines(keepends=True) if path.exists() else []
        now = time.monotonic()
        found += [(now, json.loads(line)) for line in seen[len(found) :] if line.endswith("\n")]
        assert now < deadline, f"{len(found)} of {lines} rounds in {RUN_SECONDS:g} s"
        assert len(found) == lines or process.poll() in (None, 0), f"{process.args!r} failed"
        time.sleep(GLANCE_SECONDS)
    return found


def write_records(path: Path) -> None:
    """A few of the demo's records."""
    from fedslm.data.sources import load

    rows = load("demo", "train", None).select(range(RECORDS))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_node_key(path: Path) -> None:
    """A node's key pair, as ``ssh-keygen -t ecdsa -b 384`` makes it."""
    command = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", str(path)]
    subprocess.run(command, check=True)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listening(port: int) -> bool:
    """Whether a program listens."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_until(is_true: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Waits for a program to be up."""
    deadline = time.monotonic() + START_SECONDS
    while not is_true():
        assert process.poll() is None, f"{process.args!r} ended"
        assert time.monotonic() < deadline, f"{process.args!r} is not up"
        time.sleep(0.1)
