"""A real federation over TLS: a server, a proxy and three nodes, all processes of their own on loopback."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sites import FEDSLM, NAMES, Site, eventually, federation, fedslm, ledger_of, moving, rounds_of
from tiny import PRIVATE

import fedslm as fedslm_package
from fedslm import simulation
from fedslm.config import Config, to_toml
from fedslm.deployment import admission, control, enrolment
from fedslm.deployment.authority import AUTHORITY
from fedslm.deployment.fleet import UNKNOWN_KEY
from fedslm.progress import Silent
from fedslm.storage import load_adapter

pytestmark = pytest.mark.federation
MakeConfig = Callable[..., Config]
Simulated = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def simulated(config_in: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Simulated:
    """A simulation without noise: its shards are what the nodes have, its adapter what they must reach."""
    directory = tmp_path_factory.mktemp("simulated") / "run"
    report = simulation.simulate(config_in(directory, federation={"rounds": 2}).resolved(), Silent())
    return directory, report


@pytest.fixture(scope="module")
def site(simulated: Simulated, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A server and three nodes, up and connected."""
    with federation(tmp_path_factory.mktemp("site"), simulated[0] / "data") as made:
        yield made


@pytest.fixture
def make(site: Site, config_in: MakeConfig) -> MakeConfig:
    """A config for the real nodes, with a run directory below the server's."""

    def build(name: str, **sections: dict[str, Any]) -> Config:
        rounds = {"rounds": 2, **sections.pop("federation", {})}
        return config_in(site.server / "runs" / name, federation=rounds, **sections)

    return build


def test_real_nodes_give_the_simulations_adapter(
    site: Site, make: MakeConfig, simulated: Simulated
) -> None:
    """With noise off, the same config gives the same adapter on real nodes, to the last bit."""
    status, directory = site.run(make("plain"))
    assert status == control.COMPLETED
    report = json.loads((directory / "report.json").read_text())
    assert report["adapter_sha256"] == simulated[1]["adapter_sha256"]
    assert [line["completed"] for line in rounds_of(directory)] == [3, 3]
    assert not (directory / "data" / "train.parquet").exists()


def test_a_private_run_is_charged_at_the_nodes(site: Site, make: MakeConfig) -> None:
    """Every node's own ledger holds the charges, and the report states them from signed statements."""
    status, directory = site.run(make("private", privacy=PRIVATE))
    assert status == control.COMPLETED
    report = json.loads((directory / "report.json").read_text())
    assert report["epsilon"] <= PRIVATE["epsilon"]
    found = site.status()
    for node in found["nodes"]:
        assert node["epsilon_spent"] + node["epsilon_left"] == pytest.approx(PRIVATE["epsilon"])
        assert 0 < node["epsilon_spent"] <= report["epsilon"]
    assert (found["runs"][0]["name"], found["runs"][0]["state"]) == ("private", "finished")
    figures = httpx.get(f"http://127.0.0.1:{site.settings['metrics_port']}/metrics", timeout=30).text
    for name in NAMES:
        assert f'fedslm_node_online{{node="{name}"}} 1.0' in figures
    assert 'fedslm_run_round{run="private"} 2.0' in figures
    for name in NAMES:
        chain = ledger_of(site.root / name)
        assert not chain.torn
        assert sum(event.steps for event in chain.events) >= 4


def test_nodes_reach_the_fleet_api_alone(site: Site) -> None:
    """From where nodes are, /v1/control and /v1/runtime are refused; the Fleet API wants a known key."""
    address = json.loads((site.root / "north" / admission.ADMISSION).read_text())["address"]
    context = ssl.create_default_context(cafile=str(site.server / AUTHORITY))
    for path, codes in {
        "/v1/control/list-runs": {403},
        "/v1/control/start-run": {403},
        "/v1/runtime/acquire-task": {403},
        "/v1/fleet/../control/list-runs": {403},
        "/v1/fleet/%2e%2e/control/list-runs": {403},
        "/v1//control/list-runs": {403},
        "/docs": {403},
        "/v1/fleet/pull-messages%23": {403},
        "/v1/fleet/pull-messages%3Fx": {403},
        "/v1/fleet/pull-messages?x=1": {403},
        "/v1/fleet/%70ull-messages": {403},
        "/v1/fleet//pull-messages": {403},
        "/v1/fleet/pull-messages/": {403},
        "/v1/fleet/pull-messages;x": {403},
        "/v1/fleet/register-node": {403},
        "/v1/fleet/unregister-node": {403},
        "/v1/fleet/": {403},
        "/v1/fleet/pull-messages": {401},
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
    assert "is refused: the application bundle" in site.log("north")


def test_versions_that_differ_are_both_named(
    site: Site, make: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server of another version is refused by every node, with a reason that names both versions."""
    from fedslm.deployment import bundle as bundles

    monkeypatch.setattr(fedslm_package, "__version__", "0.0.9")
    bundles.bundle.cache_clear()
    try:
        _, directory = site.run(make("skewed", federation={"rounds": 1, "max_failed_rounds": 1}))
    finally:
        monkeypatch.undo()
        bundles.bundle.cache_clear()
    (line,) = rounds_of(directory)
    assert len(line["reasons"]) == 3
    for reason in line["reasons"]:
        assert "'0.0.9'" in reason
        assert fedslm_package.__version__ in reason


def test_a_node_that_is_away_is_left_out(site: Site, make: MakeConfig) -> None:
    """A node that is not there from the start is counted as late; the first round waits for the others."""
    site.stop("west")
    eventually(lambda: not site.online("west"), "west is offline")
    status, directory = site.run(make("without", privacy=PRIVATE, federation={"min_clients": 2}))
    assert status == control.COMPLETED
    assert [(line["completed"], line["late"]) for line in rounds_of(directory)] == [(2, 1), (2, 1)]
    site.start_node("west")


def test_a_killed_node_comes_back_as_itself(site: Site, make: MakeConfig) -> None:
    """Killed (-9) in mid-round and started again with other records: same identity, ledger and run."""
    before = ledger_of(site.root / "west").charges
    config = make("killed", privacy=PRIVATE, training={"local_steps": 60}, federation={"rounds": 3})
    with site.running(config) as (directory, ended):
        eventually(lambda: len(rounds_of(directory)) == 1 and site.is_training("west"), "round 2")
        site.stop("west", signal.SIGKILL)
        notes = site.root / "west" / "notes.jsonl"
        with notes.open("a") as file:  # of no known label: later runs train on what they trained on
            file.write(json.dumps({"text": "admitted meanwhile", "label": "other"}) + "\n")
        site.start("west", "node", "up", site.root / "west")
        eventually(lambda: bool(ended()), "the end")
    assert ended() == control.COMPLETED
    assert [line["completed"] for line in rounds_of(directory)] == [3, 2, 3]
    after = ledger_of(site.root / "west").charges
    assert after[: len(before)] == before
    assert [charge.round for charge in after[len(before) :]] in ([1, 2, 3], [1, 3])
    assert len({charge.dataset_commitment for charge in after[len(before) :]}) == 1
    twice = fedslm("node", "up", site.root / "west", code=1)
    assert "another process runs the node" in twice


def test_a_dead_worker_is_an_answer(site: Site, make: MakeConfig) -> None:
    """The process that trains is killed (-9): the message is answered with an error, and the node goes on."""
    config = make("worker", training={"local_steps": 100}, federation={"rounds": 3})
    with site.running(config) as (directory, ended):
        eventually(lambda: len(rounds_of(directory)) == 1 and site.is_training("south"), "round 2")
        os.kill(site.worker_of("south") or 0, signal.SIGKILL)
        eventually(lambda: bool(ended()), "the end")
    assert ended() == control.COMPLETED
    lines = rounds_of(directory)
    assert [line["completed"] for line in lines] == [3, 2, 3]
    assert "worker died" in lines[1]["reasons"][0]


def test_a_lost_server_is_resumed(site: Site, make: MakeConfig) -> None:
    """Every server process is killed (-9) in mid-run; up again and --resume: the adapter of a quiet run."""
    status, quiet = site.run(make("quiet", federation={"rounds": 4}))
    assert status == control.COMPLETED
    config = make("lost", federation={"rounds": 4})
    with site.running(config) as (directory, _):
        eventually(lambda: len(rounds_of(directory)) >= 1, "a first round")
        site.stop("server", signal.SIGKILL)
        subprocess.run(["pkill", "-9", "-f", "--", site.launcher], check=False)
    site.start_server()
    status, directory = site.run(config, resume=True)
    assert status == control.COMPLETED
    one, other = (load_adapter(moving(each)) for each in (quiet, directory))
    assert one.sha256() == other.sha256()


def test_resuming_tells_of_new_rounds_alone(site: Site, make: MakeConfig) -> None:
    """`server run --resume` prints the rounds after the checkpoint, each once, and names who was left out."""
    config = make("again", federation={"rounds": 6, "min_clients": 2}, training={"local_steps": 150})
    path = site.root / "again.toml"
    path.write_text(to_toml(config))
    words = ("server", "run", path, "--server", site.server)
    site.start("again", *words)
    directory = site.server / "runs" / "again"
    eventually(lambda: len(rounds_of(directory)) >= 1, "a first round")
    fedslm("server", "stop", "again", "--server", site.server)
    eventually(lambda: site.processes["again"].poll() is not None, "the watcher ends")
    site.processes.pop("again")
    done = len(rounds_of(directory))
    site.stop("south")
    eventually(lambda: not site.online("south"), "south is offline")
    said = told(*words, "--resume")
    assert [int(each) for each in re.findall(r"^round (\d+): ", said, re.MULTILINE)] == list(
        range(done + 1, 7)
    )
    assert len(re.findall(r"^  south: late$", said, re.MULTILINE)) == 6 - done
    assert "client" not in said
    (south,) = [node for node in site.status()["nodes"] if node["name"] == "south"]
    assert south["reason"] == "round 6: late"
    assert "south: late" in (directory / "report.md").read_text()
    site.start_node("south")


def told(*words: str | Path) -> str:
    """What a command that ends well says on standard error."""
    done = subprocess.run(
        [FEDSLM, *map(str, words)], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_a_revoked_node_is_shut_out(site: Site) -> None:
    """Revoked while it runs, a node ends with one line and code 1; it does not come back. The last test."""
    known = fedslm("node", "check", site.root / "west")
    assert "checking key at the server ... ok: the server knows it" in known
    assert site.online("west")  # a check takes no running node's place
    site.stop("server")
    site.start("revoke", "provision", "revoke", "west", "--server", site.server)
    eventually(lambda: "waiting up to 60 s for the server" in site.log("revoke"), "it waits")
    site.start_server()
    eventually(lambda: site.processes["revoke"].poll() is not None, "west is revoked")
    assert site.processes.pop("revoke").returncode == 0
    assert site.log("revoke").count("waiting") == 1
    assert "west is revoked" in site.log("revoke")

    eventually(lambda: site.processes["west"].poll() is not None, "west ends")
    assert site.processes.pop("west").returncode == 1
    assert site.log("west").splitlines()[-1] == UNKNOWN_KEY
    assert site.log("west").count(UNKNOWN_KEY) == 1

    again = subprocess.run(
        [FEDSLM, "node", "up", site.root / "west"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert again.returncode == 1
    assert [line for line in again.stderr.splitlines() if not is_information(line)] == [UNKNOWN_KEY]
    found = fedslm("node", "check", site.root / "west", code=1)
    assert f"checking key at the server ... NO: {UNKNOWN_KEY}" in found
    assert found.count("NO: ") == 1
    assert all(is_private(path) for path in (site.root / "west" / "data").rglob("*"))


def is_information(line: str) -> bool:
    """Whether a line of a log in JSON is no warning and no error."""
    return line.startswith("{") and json.loads(line)["level"] == "info"


def is_private(path: Path) -> bool:
    """Whether nobody but its owner may do anything with a file."""
    return not path.stat().st_mode & 0o077
