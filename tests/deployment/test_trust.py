"""An admitted node against the others, and against the server's memory: real processes over TLS."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ConfigRecord, Message, RecordDict
from sites import Site, eventually, federation, fedslm, ledger_of, rounds_of
from tiny import PRIVATE

from fedslm import simulation
from fedslm.config import Config
from fedslm.deployment import control
from fedslm.deployment.enrolment import node_key
from fedslm.deployment.fleet import connected
from fedslm.deployment.instructions import Believed, Instructions
from fedslm.deployment.link import Link
from fedslm.deployment.node import import_records, open_node
from fedslm.errors import FederationError
from fedslm.federation.envelopes import ENVELOPE, sealed
from fedslm.federation.local_grid import handle
from fedslm.federation.node import LEDGER
from fedslm.federation.spends import SPENDS, read_standings, standings_of_run
from fedslm.federation.trust import OPERATOR_KEY
from fedslm.privacy.keys import new_private_key, public_hex, signing_key
from fedslm.progress import Silent
from fedslm.records import epsilon_of_json

pytestmark = pytest.mark.federation
MakeConfig = Callable[..., Config]
Lie = Callable[[Message, Message, Believed], RecordDict]


@pytest.fixture(scope="module")
def site(config_in: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A server and three nodes, up and connected."""
    directory = tmp_path_factory.mktemp("simulated") / "run"
    simulation.simulate(config_in(directory, federation={"rounds": 1}).resolved(), Silent())
    with federation(tmp_path_factory.mktemp("site"), directory / "data") as made:
        yield made


@pytest.fixture
def make(site: Site, config_in: MakeConfig) -> MakeConfig:
    """A private config for the real nodes, with a run directory below the server's."""

    def build(name: str, **sections: dict[str, Any]) -> Config:
        rounds = {"rounds": 1, **sections.pop("federation", {})}
        sections.setdefault("privacy", PRIVATE)
        return config_in(site.server / "runs" / name, federation=rounds, **sections)

    return build


@contextmanager
def hostile(site: Site, name: str, lie: Lie, *, trains: bool = True) -> Iterator[None]:
    """A node's own keys in the hands of somebody who answers what he likes; its process is stopped."""
    site.stop(name)
    ready, stop = open_node(site.root / name), threading.Event()
    import_records(ready)

    def serve() -> None:
        key, pem = node_key(ready.directory), ready.admission.authority.encode()
        instructions = Instructions(ready.directory, ready.admission)
        with connected(ready.admission.address, pem, key) as found:
            link = Link(*found, ready.approved, 1 << 30)

            def answered(message: Message, run: int) -> Message:
                believed = instructions.believed(message, run)
                context = ready.context(link.node_id, run, believed.envelope.client)
                reply = handle(message, context) if trains else message
                return Message(lie(message, reply, believed), reply_to=message)

            link.serve(answered, lambda seconds: not stop.wait(seconds), 0.2)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        eventually(lambda: site.online(name), f"{name} is online")
        yield
    finally:
        stop.set()
        thread.join(60)
        site.start_node(name)


def ledger_key(site: Site, name: str) -> str:
    """A node's ledger key, as the server knows it."""
    return public_hex(signing_key(site.root / name).public_key())


def charges(site: Site) -> dict[str, int]:
    """How often each node has charged so far."""
    return {
        name: len(ledger_of(site.root / name).charges) if (site.root / name / LEDGER).exists() else 0
        for name in ("north", "south", "west")
    }


def reasons(directory: Path) -> str:
    """Why clients were left out in the last round."""
    return "\n".join(rounds_of(directory)[-1]["reasons"])


def test_requests_of_another_operator_are_refused(site: Site, make: MakeConfig) -> None:
    """Whoever commands Flower's server without the operator's key commands no node: nothing is charged.

    The log and the node's own figures say so.
    """
    before, path = charges(site), site.server / OPERATOR_KEY
    usual = path.read_bytes()
    try:
        path.write_bytes(new_private_key())
        _, directory = site.run(make("foreign", federation={"max_failed_rounds": 1}))
    finally:
        path.write_bytes(usual)
    assert rounds_of(directory)[0]["completed"] == 0
    for where in (reasons(directory), site.log("north"), site.log("west")):
        assert "not signed with the operator's key" in where
    assert charges(site) == before


def test_replies_are_the_admitted_nodes_own(site: Site, make: MakeConfig) -> None:
    """An unsigned reply, one under another key, and one for another request do not count; the right one does."""
    other = Ed25519PrivateKey.generate()

    def lie(message: Message, reply: Message, believed: Believed) -> RecordDict:
        match believed.envelope.round:
            case 1:
                return reply.content
            case 2:
                return sealed(reply.content, believed.request_sha256, other)
            case 3:
                return sealed(reply.content, "0" * 64, signing_key(site.root / "west"))
            case _:
                return sealed(reply.content, believed.request_sha256, signing_key(site.root / "west"))

    with hostile(site, "west", lie):
        _, directory = site.run(make("replies", privacy={"unit": "none"}, federation={"rounds": 4}))
    lines = rounds_of(directory)
    assert [(line["completed"], line["failed"]) for line in lines] == [(2, 1), (2, 1), (2, 1), (3, 0)]
    for line in lines[:3]:
        (reason,) = line["reasons"]
        assert reason == "west: the reply is not signed for this request with the admitted ledger key"


def test_a_spend_is_not_forgotten_by_the_next_run(site: Site, make: MakeConfig) -> None:
    """A ledger that was deleted is found out by another run; its node is out until it is readmitted.

    The others go on; status says who is out, why, and what each has spent over all runs.
    """
    site.run(make("first"))
    shutil.copytree(site.root / "west", site.root / "backup")  # for the test below
    spent = read_standings(site.server / SPENDS)
    south, key = site.root / "south", ledger_key(site, "south")
    assert spent[key].charges == charges(site)["south"] >= 1
    node = next(each for each in site.status()["nodes"] if each["name"] == "south")
    assert epsilon_of_json(node["lifetime_epsilon"]) == pytest.approx(spent[key].epsilon)
    site.stop("south")
    saved = {path.name: path.read_bytes() for path in south.glob("ledger.jsonl*")}
    for name in saved:
        (south / name).unlink()
    site.start_node("south")
    _, directory = site.run(make("second", federation={"rounds": 2}))
    found_out, out = rounds_of(directory)
    assert (found_out["completed"], found_out["refused"]) == (2, 1)
    assert "it was deleted, or restored from an older copy" in found_out["reasons"][0]
    assert charges(site)["south"] == 0
    assert (out["completed"], out["failed"]) == (2, 1)
    assert "fedslm provision readmit south" in out["reasons"][0]
    assert "it says that its ledger was rolled back" in out["reasons"][0]
    text = fedslm("server", "status", "--server", site.server)
    assert "south is out since" in " ".join(text.split())
    said = fedslm("provision", "readmit", "south", "--server", site.server, "--reason", "disk lost")
    assert f"{spent[key].charges} charge" in said
    _, directory = site.run(make("third"))
    assert rounds_of(directory)[0]["completed"] == 3
    audit = fedslm("audit", "run", directory, "--no-empirical")
    assert "disk lost" in (directory / "audit.md").read_text(), audit


def test_a_restored_backup_is_found_out_by_the_server(site: Site, make: MakeConfig) -> None:
    """A node that hides that its ledger is an old copy, and signs what it says, is put out all the same."""
    backup = site.root / "backup"

    def hides(message: Message, reply: Message, believed: Believed) -> RecordDict:
        values = json.loads(str(message.content[ENVELOPE][ENVELOPE]))
        message.content[ENVELOPE] = ConfigRecord({ENVELOPE: json.dumps({**values, "seen": []})})
        context = open_node(backup).context(5, 1, believed.envelope.client)
        content = handle(message, context).content
        return sealed(content, believed.request_sha256, signing_key(backup))

    import_records(open_node(backup))
    with hostile(site, "west", hides, trains=False):
        _, directory = site.run(make("hidden"))
    (line,) = rounds_of(directory)
    assert (line["completed"], line["failed"]) == (2, 1)
    assert "it was rolled back" in reasons(directory)
    standing = read_standings(site.server / SPENDS)[ledger_key(site, "west")]
    assert standing.out
    assert standings_of_run(directory)["west"].out == standing.out
    fedslm("provision", "readmit", "west", "--server", site.server, "--reason", "a test")


def test_a_revoked_node_in_the_middle(site: Site, make: MakeConfig) -> None:
    """A run under way goes on without it, and later runs are possible; the last test: it stays out."""
    config = make("under-way", federation={"rounds": 5, "min_clients": 2}, training={"local_steps": 20})
    with site.running(config) as (directory, ended):
        eventually(lambda: len(rounds_of(directory)) == 1, "a first round")
        fedslm("provision", "revoke", "south", "--server", site.server)
        eventually(lambda: bool(ended()), "the end", 240)
    assert ended() == control.COMPLETED
    lines = rounds_of(directory)
    assert (lines[0]["completed"], lines[-1]["completed"]) == (3, 2)
    assert "the node was revoked" in "\n".join(lines[-1]["reasons"])
    with pytest.raises(FederationError, match=r"2 nodes would take part \(north, west\)"):
        site.run(make("three"))
    status, directory = site.run(make("two", federation={"num_clients": 2}))
    assert status == control.COMPLETED
    assert rounds_of(directory)[0]["completed"] == 2
