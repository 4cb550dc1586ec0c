"""A real federation over TLS: a server, a proxy and three nodes, all processes of their own on loopback."""

from __future__ import annotations

import json
import shutil
import signal
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.sites import FEDSLM, NAMES, Site, eventually, fedslm, ledger_of, rounds_of
from support.tiny import PRIVATE

import fedslm as fedslm_package
from fedslm import layout
from fedslm.config import Config
from fedslm.deployment import admission, control, enrolment
from fedslm.deployment.authority import AUTHORITY
from fedslm.deployment.fleet import UNKNOWN_KEY
from fedslm.errors import FederationError

pytestmark = pytest.mark.federation
MakeConfig = Callable[..., Config]
Simulated = tuple[Path, dict[str, Any]]


def test_real_nodes_give_the_simulations_adapter(
    site: Site, make: MakeConfig, simulated: Simulated
) -> None:
    """With noise off, the same config gives the same adapter on real nodes, to the last bit."""
    status, directory = site.run(make("plain"))
    assert status == control.COMPLETED
    report = json.loads((directory / "report.json").read_text())
    assert report["adapter_sha256"] == simulated[1]["adapter_sha256"]
    assert [line["completed"] for line in rounds_of(directory)] == [3, 3, 3, 3]
    assert not (directory / "data" / "train.parquet").exists()


def test_a_private_run_is_charged_at_the_nodes(site: Site, make: MakeConfig) -> None:
    """Every node's own ledger holds the charges, and the report states them from signed statements."""
    status, directory = site.run(make("private", privacy=PRIVATE, federation={"rounds": 2}))
    assert status == control.COMPLETED
    report = json.loads((directory / "report.json").read_text())
    assert report["epsilon"] <= PRIVATE["epsilon"]
    found = json.loads(fedslm("server", "status", "--server", site.server, "--json"))
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


def test_masked_sums_survive_a_node_that_is_killed(site: Site, make: MakeConfig) -> None:
    """A node is killed between its masked part and the removal of the masks: the others end the round.

    Until the authority has signed the list of nodes, no run begins. The killed node comes back, and takes
    part in later rounds; what it had sent stays charged.
    """
    config = make(
        "masked",
        privacy={**PRIVATE, "noise": "distributed"},
        training={"local_steps": 1, "optimizer": "sgd", "learning_rate": 0.05},
        secure_aggregation={"threshold": 2, "leg_deadline_seconds": 30.0},
    )
    with pytest.raises(FederationError, match="provision roster"):
        site.run(config)
    assert "3 nodes" in fedslm("provision", "roster", "--server", site.server)
    west = site.root / "west"
    with site.running(config) as (directory, ended):
        eventually(lambda: has_signed(west, 2), "west signs the survivors", every_seconds=0.002)
        site.stop("west", signal.SIGKILL)
        eventually(lambda: len(rounds_of(directory)) > 1, "round 2 ends")
        site.start_node("west")
        eventually(lambda: bool(ended()), "the run's end")
    lines = rounds_of(directory)
    assert [line["kept"] for line in lines] == [False] * 4
    assert lines[1]["completed"] == 3
    assert any("west" in reason for reason in lines[1]["reasons"])
    assert lines[-1]["completed"] == 3
    for name in NAMES:
        charges = [each for each in ledger_of(site.root / name).charges if each.protocol == "masked"]
        assert {each.round for each in charges} >= ({1, 2, 4} if name == "west" else {1, 2, 3, 4})
        assert {each.event.honest_nodes for each in charges} == {2}
        assert "on list" in fedslm("node", "check", site.root / name)
    found = fedslm("audit", "run", directory)
    assert "secure aggregation" in (directory / "audit.md").read_text(), found


def has_signed(node: Path, round: int) -> bool:
    """Whether a node has signed a round's survivors, and has not opened its shares."""
    for path in (node / layout.SECAGG).glob("*/state.json"):
        legs = json.loads(path.read_text())["legs"]
        number = json.loads(legs["keys"]["request"])["cohort"]["round"]
        if number == round and "survivors" in legs and "unmask" not in legs:
            return True
    return False


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


def test_a_foreign_bundle_is_not_run(
    site: Site, make: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nodes answer nothing to an application bundle that their operators did not approve.

    It is of another version, too: every node's reason names both.
    """
    from fedslm.deployment import bundle as bundles

    mark = site.root / "pwned"
    hostile = f"open({str(mark)!r}, 'w').write('x')\n".encode() + bundles._CLIENT
    monkeypatch.setattr(bundles, "_CLIENT", hostile)
    monkeypatch.setattr(fedslm_package, "__version__", "0.0.9")
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
    assert len(line["reasons"]) == 3
    for reason in line["reasons"]:
        assert "not approved by this node's operator" in reason
        assert "'0.0.9'" in reason
        assert fedslm_package.__version__ in reason
    assert "is refused: the application bundle" in site.log("north")


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
