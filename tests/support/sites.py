"""A federation on loopback that the tests of this directory share: real processes, real TLS."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fedslm import layout
from fedslm.attestations import places_of_node, places_of_simulation
from fedslm.client.self_test_gate import attest
from fedslm.config import Config
from fedslm.deployment import admission, authority, control, enrolment, runs
from fedslm.deployment.status import status_of
from fedslm.errors import FederationError
from fedslm.privacy.chain import Chain, read_chain
from fedslm.privacy.keys import PUBLIC_KEY, read_public_key
from fedslm.workers import InlinePool
from support.tiny import make_rows, write_rows

FEDSLM = str(Path(sys.executable).parent / "fedslm")
NAMES = ("north", "south", "west")
SECONDS = 600.0  # whatever succeeds ends the wait
POLICY = """
unit = "none"
epsilon = 50.0
delta = 1e-5
min_noise_multiplier = 0.3
max_clip_norm = 1.0
max_sample_rate = 0.2
max_steps_per_round = 400
max_rounds_per_day = 500
base_models = ["any"]
tasks = ["classification"]
weakest_passes = "fixed"
allow_distributed_noise = true
least_honest_nodes = 2
most_colluding_nodes = 0
"""


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def eventually(
    is_true: Callable[[], bool], what: str, seconds: float = SECONDS, *, every_seconds: float = 0.1
) -> None:
    """Waits, but not for ever."""
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(every_seconds)


def fedslm(*words: str | Path, code: int = 0) -> str:
    """Runs a command that ends with a code; gives all that it prints."""
    done = subprocess.run(
        [FEDSLM, *map(str, words)], capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stdout + done.stderr


class Cable:
    """A way to a port that can be cut: connections break, and new ones are refused, until it is mended."""

    def __init__(self, port: int) -> None:
        self._target, self._open = port, True
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Breaks every connection."""
        self._open = False
        for pair in self._pairs:
            for end in pair:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()
        self._pairs.clear()

    def mend(self) -> None:
        """Lets connections through again."""
        self._open = True

    def close(self) -> None:
        """Ends it."""
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                self._carry(self._listener.accept()[0])

    def _carry(self, near: socket.socket) -> None:
        """Connects one end to the other; breaks it if there is no way."""
        try:
            if not self._open:
                raise ConnectionError
            far = socket.create_connection(("127.0.0.1", self._target))
        except OSError:
            near.close()
            return
        self._pairs.append((near, far))
        for source, sink in ((near, far), (far, near)):
            threading.Thread(target=_pump, args=(source, sink), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    """Carries bytes one way until an end closes."""
    with suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    for end in (source, sink):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


@dataclass
class Site:
    """The server's and the nodes' directories, and their processes."""

    root: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    cables: dict[str, Cable] = field(default_factory=dict)

    @property
    def server(self) -> Path:
        """The server's directory."""
        return self.root / "server"

    @property
    def settings(self) -> dict[str, Any]:
        """What federation.toml says."""
        return tomllib.loads((self.server / "federation.toml").read_text())

    def start(self, name: str, *command: str | Path) -> None:
        """Starts a process with a log of its own."""
        with (self.root / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [FEDSLM, *map(str, command)],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def start_node(self, name: str) -> None:
        """Starts a node, and waits until the server sees it."""
        self.start(name, "node", "up", self.root / name)
        self.wait_for(name)

    def wait_for(self, name: str) -> None:
        """Waits until the server sees a node."""
        eventually(lambda: self.online(name), f"{name} online", every_seconds=0.5)

    def start_server(self) -> None:
        """Starts the server, and waits until it is up."""
        before = self.log("server").count("the server is up") if "server" in self.logs else 0
        self.start("server", "server", "up", self.server)
        eventually(lambda: self.log("server").count("the server is up") > before, "server up")

    @property
    def logs(self) -> set[str]:
        """Names of the logs so far."""
        return {path.stem for path in self.root.glob("*.log")}

    def stop(self, name: str, number: int = signal.SIGTERM) -> None:
        """Stops a process; SIGKILL takes all that it started with it."""
        process = self.processes.pop(name)
        if process.poll() is None:
            if number == signal.SIGTERM:
                process.terminate()
            else:
                os.killpg(process.pid, number)
        process.wait(SECONDS)

    def log(self, name: str) -> str:
        """What a process has said."""
        return (self.root / f"{name}.log").read_text(encoding="utf-8")

    def status(self) -> dict[str, Any]:
        """What the server says of nodes and runs, as `fedslm server status --json` prints it."""
        with control.connected(self.server) as connection:
            return status_of(self.server, connection.nodes()).as_json()

    def online(self, name: str) -> bool:
        """Whether the server sees a node."""
        nodes = self.status()["nodes"]
        return any(node["name"] == name and node["status"] == "online" for node in nodes)

    def run(self, config: Config, *, resume: bool = False) -> tuple[str, Path]:
        """Runs a config to its end; gives its last status and its directory."""
        with self.running(config, resume=resume) as (directory, ended):
            eventually(lambda: bool(ended()), "the run's end", 2 * SECONDS, every_seconds=0.5)
            return ended(), directory

    @contextmanager
    def running(
        self, config: Config, *, resume: bool = False
    ) -> Iterator[tuple[Path, Callable[[], str]]]:
        """Starts a run; gives its directory, and what tells its last status, once there is one."""
        with control.connected(self.server) as connection:
            number, directory = runs.start(connection, self.server, config, resume=resume)

            last: list[str] = []

            def ended() -> str:
                if not last and (status := connection.status(number)).startswith("finished"):
                    last.append(status)
                return last[0] if last else ""

            yield directory, ended

    def pid_of_superlink(self) -> int:
        """The SuperLink's process."""
        pattern = f"flower-superlink.*--port {self.settings['inner_port']}"
        found = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True, check=True)
        return int(found.stdout.split()[0])

    @contextmanager
    def without_superlink(self) -> Iterator[None]:
        """The SuperLink is killed (-9), and whoever would start it again is held meanwhile."""
        supervisor = self.processes["server"].pid
        os.kill(supervisor, signal.SIGSTOP)
        os.kill(self.pid_of_superlink(), signal.SIGKILL)
        try:
            yield
        finally:
            os.kill(supervisor, signal.SIGCONT)

    def when_it_answers(self, ended: Callable[[], str]) -> str:
        """A run's last status; nothing while the SuperLink is not there."""
        with suppress(FederationError):
            return ended()
        return ""

    @property
    def launcher(self) -> str:
        """What the launcher and the server's side of a run have in their command lines."""
        return f"--runtime-api-address 127.0.0.1:{self.settings['inner_port']}"

    def is_training(self, name: str) -> bool:
        """Whether a node's worker computes now."""
        worker = self.worker_of(name)
        if worker is None:
            return False
        return Path(f"/proc/{worker}/stat").read_text().rsplit(")", 1)[1].split()[0] == "R"

    def worker_of(self, name: str) -> int | None:
        """The process that trains at a node; None if there is none now."""
        for child in _children(self.processes[name].pid):
            for worker in _children(child):
                return worker
        return None


def _children(parent: int) -> list[int]:
    """A process's children."""
    found = subprocess.run(["pgrep", "-P", str(parent)], capture_output=True, text=True, check=False)
    return [int(child) for child in found.stdout.split()]


@contextmanager
def federation(
    root: Path,
    names: tuple[str, ...] = NAMES,
    *,
    held: str = "",
    more: str = "",
    is_tested: bool = True,
) -> Iterator[Site]:
    """A server and nodes, up and connected; each node has a cable of its own.

    Args:
        root: Where they live.
        names: The nodes: each has the records of one client of a simulation of as many.
        held: One of them whose process is not started: a test answers with its keys.
        more: Further lines for each node.toml.
        is_tested: Whether the code has passed its self-test at the nodes already.
    """
    if shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin") is None:
        pytest.skip("nginx is not installed; on Debian: apt-get install nginx-light")
    site = Site(root)
    site.server.mkdir()
    port = free_port()
    (site.server / "federation.toml").write_text(
        f'name = "test"\nhost = "127.0.0.1"\nport = {port}\ninner_port = {free_port()}\n'
        f"metrics_port = {free_port()}\n"
    )
    authority.certify(site.server)
    try:
        site.start_server()
        with control.connected(site.server) as connection:
            for index, name in enumerate(names):
                write_node(root / name, index, more)
                if is_tested:
                    keep_self_test(root / name)
                request = enrolment.enroll(root / name, name)
                _, told = admission.admit(site.server, request, connection.register)
                admission.accept(root / name, told)
                site.cables[name] = Cable(port)
                change_admission(root / name, address=f"127.0.0.1:{site.cables[name].port}")
                if name != held:
                    site.start(name, "node", "up", root / name)
        for name in site.processes.keys() & {*names}:
            site.wait_for(name)
        yield site
    finally:
        for name, process in site.processes.items():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGCONT)
            if name != "server":  # the others end beside each other
                process.terminate()
        for name in reversed(list(site.processes)):
            site.stop(name)
        for cable in site.cables.values():
            cable.close()


def write_node(node: Path, index: int, more: str) -> None:
    """A node's records, settings and policy."""
    node.mkdir()
    site = f"site-{index % 3}"
    write_rows(node / "notes.jsonl", [row for row in make_rows(90, 0) if row["client"] == site])
    (node / "node.toml").write_text(
        f'name = "{node.name}"\nsource = "{node}/notes.jsonl"\npoll_seconds = 0.5\n{more}'
    )
    (node / "policy.toml").write_text(POLICY)


def keep_self_test(node: Path) -> None:
    """Gives a node the result of the self-test: the nodes of one machine would all run the same one."""
    shared = places_of_simulation(node)
    InlinePool(threads=1).call(attest, shared)
    own, *_ = places_of_node(node)
    shutil.copytree(shared[0], own, ignore=lambda _, names: [n for n in names if "self-test" not in n])


def change_admission(node: Path, **changes: str) -> None:
    """Changes what a node was told."""
    path = node / admission.ADMISSION
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rounds_of(directory: Path) -> list[dict[str, Any]]:
    """Lines of a run's rounds so far."""
    path = directory / "rounds.jsonl"
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def ledger_of(node: Path) -> Chain:
    """A node's ledger, checked against its public key."""
    return read_chain(node / layout.LEDGER, read_public_key(node / PUBLIC_KEY))


def moving(directory: Path) -> Path:
    """A run's moving tensors after its last round."""
    return max((directory / "checkpoint").glob("moving-*.safetensors"))
