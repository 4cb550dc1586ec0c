"""A real federation over TLS: a server, a proxy and three nodes, all processes of their own on loopback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from tiny import PRIVATE

from fedslm import simulation
from fedslm.config import Config
from fedslm.data.shards import read_client
from fedslm.deployment import control, enrolment, runs
from fedslm.deployment.authority import AUTHORITY
from fedslm.federation.node import LEDGER
from fedslm.privacy.chain import Chain, read_chain
from fedslm.privacy.keys import PUBLIC_KEY, read_public_key
from fedslm.progress import Silent
from fedslm.storage import load_adapter

pytestmark = pytest.mark.federation
MakeConfig = Callable[..., Config]
FEDSLM = str(Path(sys.executable).parent / "fedslm")
NAMES = ("north", "south", "west")
SECONDS = 120.0
POLICY = """
unit = "none"
epsilon = 50.0
delta = 1e-5
min_noise_multiplier = 0.3
max_clip_norm = 1.0
max_sample_rate = 0.2
max_steps_per_round = 4
max_rounds_per_day = 500
base_models = ["any"]
tasks = ["classification"]
"""


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def eventually(is_true: Callable[[], bool], what: str, seconds: float = SECONDS) -> None:
    """Waits, but not for ever."""
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.2)


def fedslm(*words: str | Path) -> str:
    """Runs a command; gives what it prints."""
    done = subprocess.run(
        [FEDSLM, *map(str, words)], capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@dataclass
class Site:
    """The server's and the nodes' directories, and their processes."""

    root: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def server(self) -> Path:
        """The server's directory."""
        return self.root / "server"

    def start(self, name: str, *command: str | Path) -> None:
        """Starts a process with a log of its own."""
        with (self.root / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [FEDSLM, *map(str, command)],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def stop(self, name: str, number: int = signal.SIGTERM) -> None:
        """Stops a process and all that it started."""
        process = self.processes.pop(name)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM) if number == signal.SIGTERM else os.killpg(
                process.pid, number
            )
        process.wait(30)

    def log(self, name: str) -> str:
        """What a process has said."""
        return (self.root / f"{name}.log").read_text(encoding="utf-8")

    def online(self, name: str) -> bool:
        """Whether the server sees a node."""
        rows = json.loads(fedslm("server", "status", "--server", self.server, "--json"))
        return any(row["name"] == name and row["status"] == "online" for row in rows["nodes"])

    def run(self, config: Config, *, resume: bool = False) -> tuple[str, Path]:
        """Runs a config to its end; gives its last status and its directory."""
        with control.connected(self.server) as connection:
            number, directory = runs.start(connection, self.server, config, resume=resume)
            deadline = time.monotonic() + SECONDS
            while not (status := connection.status(number)).startswith("finished"):
                assert time.monotonic() < deadline, (self.server / "logs/launcher.log").read_text()
                time.sleep(0.3)
        return status, directory


@pytest.fixture(scope="module")
def shards(
    config_in: MakeConfig, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A simulation without noise: its shards are what the nodes have, its adapter what they must reach."""
    directory = tmp_path_factory.mktemp("simulated") / "run"
    report = simulation.simulate(config_in(directory, federation={"rounds": 2}).resolved(), Silent())
    return directory, report


@pytest.fixture(scope="module")
def site(
    shards: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """A server and three nodes, up and connected."""
    if shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin") is None:
        pytest.skip("nginx is not installed; on Debian: apt-get install nginx-light")
    made = Site(tmp_path_factory.mktemp("site"))
    made.server.mkdir()
    (made.server / "federation.toml").write_text(
        f'name = "test"\nhost = "127.0.0.1"\nport = {free_port()}\ninner_port = {free_port()}\n'
    )
    fedslm("provision", "init", made.server / "federation.toml")
    made.start("server", "server", "up", made.server)
    try:
        eventually(lambda: "the server is up" in made.log("server"), "server up")
        for index, name in enumerate(NAMES):
            node = made.root / name
            node.mkdir()
            rows = read_client(shards[0] / "data", index)
            (node / "notes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            (node / "node.toml").write_text(
                f'name = "{name}"\nsource = "{node}/notes.jsonl"\npoll_seconds = 0.2\n'
            )
            (node / "policy.toml").write_text(POLICY)
            fedslm("node", "enroll", node, "--name", name)
            fedslm("provision", "admit", node / f"{name}.request.json", "--server", made.server)
            fedslm("node", "accept", node, made.server / f"admissions/{name}.admission.json")
            made.start(name, "node", "up", node)
        for name in NAMES:
            eventually(lambda name=name: made.online(name), f"{name} online")
        yield made
    finally:
        for name in list(made.processes):
            made.stop(name)


@pytest.fixture
def make(site: Site, config_in: MakeConfig, notes: Path) -> MakeConfig:
    """A config for the real nodes, with a run directory below the server's."""

    def build(name: str, **sections: dict[str, Any]) -> Config:
        values = {"federation": {"rounds": 2}, **sections}
        values["federation"] = {"rounds": 2, "num_clients": 3, **values["federation"]}
        return config_in(site.server / "runs" / name, **values)

    return build


def rounds_of(directory: Path) -> list[dict[str, Any]]:
    """Lines of a run's rounds."""
    lines = (directory / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_real_nodes_give_the_simulations_adapter(
    site: Site, make: MakeConfig, shards: tuple[Path, dict[str, Any]]
) -> None:
    """With noise off, the same config gives the same adapter on real nodes, to the last bit."""
    status, directory = site.run(make("plain"))
    assert status == control.COMPLETED
    report = json.loads((directory / "report.json").read_text())
    assert report["adapter_sha256"] == shards[1]["adapter_sha256"]
    assert [line["completed"] for line in rounds_of(directory)] == [3, 3]
    assert not (directory / "data" / "train.parquet").exists()


def test_a_private_run_is_charged_at_the_nodes(site: Site, make: MakeConfig) -> None:
    """Every node's own ledger holds the charges, and the report states them from signed statements."""
    status, directory = site.run(make("private", privacy=PRIVATE))
    assert status == control.COMPLETED
    report = json.loads((directory / "report.json").read_text())
    assert report["epsilon"] <= PRIVATE["epsilon"]
    for name in NAMES:
        chain = ledger_of(site.root / name)
        assert not chain.torn
        assert sum(event.steps for event in chain.events) >= 4


def test_nodes_reach_the_fleet_api_alone(site: Site) -> None:
    """From where nodes are, /v1/control and /v1/runtime are refused; the Fleet API wants a known key."""
    address = json.loads((site.root / "north" / enrolment.ADMISSION).read_text())["address"]
    context = ssl.create_default_context(cafile=str(site.server / AUTHORITY))
    for path, codes in {
        "/v1/control/list-runs": {403},
        "/v1/control/start-run": {403},
        "/v1/runtime/acquire-task": {403},
        "/v1/fleet/../control/list-runs": {403},
        "/v1/fleet/%2e%2e/control/list-runs": {403},
        "/v1//control/list-runs": {403},
        "/docs": {403},
        "/v1/fleet/pull-messages": {400, 401, 403, 415, 422},
    }.items():
        answer = httpx.post(f"https://{address}{path}", verify=context, content=b"", timeout=10)
        assert answer.status_code in codes, (path, answer.status_code)
    with pytest.raises(httpx.ConnectError):  # another authority's world
        httpx.get(f"https://{address}/", timeout=10)


def test_a_stranger_is_kept_out(site: Site) -> None:
    """A node with a key of its own and a copied admission never comes online."""
    stranger = site.root / "stranger"
    shutil.copytree(site.root / "north", stranger)
    (stranger / enrolment.NODE_KEY).unlink()
    enrolment.enroll(stranger, "north")
    site.start("stranger", "node", "up", stranger)
    eventually(lambda: site.processes["stranger"].poll() is not None, "the stranger gives up")
    assert site.processes.pop("stranger").returncode != 0
    assert "connected to" not in site.log("stranger")


def test_a_hostile_bundle_is_not_run(
    site: Site, make: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nodes answer nothing to an application bundle that their operators did not approve."""
    from fedslm.deployment import bundle as bundles

    mark = site.root / "pwned"
    hostile = f"open({str(mark)!r}, 'w').write('x')\n".encode() + bundles._CLIENT
    monkeypatch.setattr(bundles, "_CLIENT", hostile)
    bundles.bundle.cache_clear()
    try:
        federation = {"rounds": 1, "max_failed_rounds": 1, "min_replies": 1}
        status, directory = site.run(make("hostile", federation=federation))
    finally:
        monkeypatch.undo()
        bundles.bundle.cache_clear()
    assert status != control.COMPLETED
    assert not mark.exists()
    (line,) = rounds_of(directory)
    assert line["completed"] == 0
    assert all("not approved by this node's operator" in reason for reason in line["reasons"])
    assert "is refused: its application bundle" in site.log("north")


def test_a_killed_node_comes_back_as_itself(site: Site, make: MakeConfig) -> None:
    """A node is killed (-9): the others go on; started again, it has the same identity and ledger."""
    before = ledger_of(site.root / "west").charges
    site.stop("west", signal.SIGKILL)
    eventually(lambda: not site.online("west"), "west is offline")
    federation = {"rounds": 2, "min_clients": 2}
    status, directory = site.run(make("without", privacy=PRIVATE, federation=federation))
    assert status == control.COMPLETED
    assert [line["completed"] for line in rounds_of(directory)] == [2, 2]
    assert [line["late"] for line in rounds_of(directory)] == [1, 1]
    site.start("west", "node", "up", site.root / "west")
    eventually(lambda: site.online("west"), "west is back")
    status, directory = site.run(make("with", privacy=PRIVATE))
    assert [line["completed"] for line in rounds_of(directory)] == [3, 3]
    after = ledger_of(site.root / "west").charges
    assert after[: len(before)] == before
    assert len(after) > len(before)


def test_a_dead_worker_is_an_answer(site: Site, make: MakeConfig) -> None:
    """The process that trains is killed (-9): the message is answered with an error, and the node goes on."""
    config = make("worker", training={"local_steps": 4}, federation={"rounds": 3})
    with control.connected(site.server) as connection:
        number, directory = runs.start(connection, site.server, config, resume=False)
        killed = False
        deadline = time.monotonic() + SECONDS
        while not (status := connection.status(number)).startswith("finished"):
            assert time.monotonic() < deadline
            if not killed and (directory / "checkpoint" / "state.json").exists():
                killed = kill_worker(site.processes["south"].pid)
            time.sleep(0.05)
    assert killed
    assert status == control.COMPLETED
    assert rounds_of(directory)[-1]["completed"] == 3


def test_a_lost_server_is_resumed(
    site: Site, make: MakeConfig, shards: tuple[Path, dict[str, Any]]
) -> None:
    """Every server process is killed (-9) in mid-run; up again and --resume: the adapter of a quiet run."""
    quiet_status, quiet = site.run(make("quiet", federation={"rounds": 4}))
    assert quiet_status == control.COMPLETED
    config = make("lost", federation={"rounds": 4})
    with control.connected(site.server) as connection:
        _, directory = runs.start(connection, site.server, config, resume=False)
        eventually(lambda: (directory / "rounds.jsonl").exists(), "a first round")
    site.stop("server", signal.SIGKILL)
    kill_all(f"--runtime-api-address 127.0.0.1:{inner_port(site)}")
    site.start("server", "server", "up", site.server)
    eventually(lambda: site.log("server").count("the server is up") == 2, "server up again")
    for name in NAMES:
        eventually(lambda name=name: site.online(name), f"{name} online again")
    status, directory = site.run(config, resume=True)
    assert status == control.COMPLETED
    one, other = (load_adapter(each / "checkpoint" / moving(each)) for each in (quiet, directory))
    assert one.sha256() == other.sha256()


def test_a_revoked_node_is_shut_out(site: Site) -> None:
    """Revoked, a node is refused with a reason, and does not come back. The last test: it stays out."""
    fedslm("provision", "revoke", "west", "--server", site.server)
    eventually(lambda: site.processes["west"].poll() is not None, "west ends")
    site.processes.pop("west")
    site.start("west", "node", "up", site.root / "west")
    eventually(lambda: site.processes["west"].poll() is not None, "west ends again")
    assert site.processes.pop("west").returncode != 0


def ledger_of(node: Path) -> Chain:
    """A node's ledger, checked against its public key."""
    return read_chain(node / LEDGER, read_public_key(node / PUBLIC_KEY))


def moving(directory: Path) -> str:
    """Name of a finished run's moving tensors."""
    return max(path.name for path in (directory / "checkpoint").glob("moving-*.safetensors"))


def inner_port(site: Site) -> int:
    """The SuperLink's port."""
    return int(tomllib.loads((site.server / "federation.toml").read_text())["inner_port"])


def kill_worker(parent: int) -> bool:
    """Kills the newest grandchild of a node: its worker."""
    found = subprocess.run(["pgrep", "-P", str(parent)], capture_output=True, text=True, check=False)
    for child in found.stdout.split():
        inner = subprocess.run(["pgrep", "-P", child], capture_output=True, text=True, check=False)
        for worker in inner.stdout.split():
            os.kill(int(worker), signal.SIGKILL)
            return True
    return False


def kill_all(pattern: str) -> None:
    """Kills what a killed supervisor left."""
    subprocess.run(["pkill", "-9", "-f", "--", pattern], check=False)
