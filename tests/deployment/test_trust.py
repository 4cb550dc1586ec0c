"""An admitted node against the others, and against the server's memory: real processes over TLS."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ConfigRecord, Error, Message, RecordDict
from support.sites import Site, federation, fedslm, ledger_of, rounds_of
from support.tiny import PRIVATE

from fedslm import layout
from fedslm.config import Config
from fedslm.deployment import control
from fedslm.deployment.enrolment import node_key
from fedslm.deployment.fleet import connected
from fedslm.deployment.instructions import Believed, Instructions
from fedslm.deployment.link import Link
from fedslm.deployment.node import import_records, open_node
from fedslm.engines.local import handle
from fedslm.errors import FederationError
from fedslm.federation.spends import SPENDS, read_standings, standings_of_run
from fedslm.layout import OPERATOR_KEY
from fedslm.privacy.keys import new_private_key, public_hex, signing_key
from fedslm.protocol.envelopes import ENVELOPE, sealed
from fedslm.records import epsilon_of_json
from fedslm.workers import InlinePool

pytestmark = pytest.mark.federation
MakeConfig = Callable[..., Config]


class West:
    """A node's own keys in the hands of somebody who answers what he likes; no process of its own runs.

    Attributes:
        answer: Turns what was asked into what is sent; tests replace it.
    """

    def __init__(self, directory: Path) -> None:
        self._ready, self._stop = open_node(directory), threading.Event()
        self.directory, self.answer = directory, self.honest
        self._thread = threading.Thread(target=self._serve)
        import_records(self._ready)
        self._thread.start()

    def honest(self, message: Message, believed: Believed) -> RecordDict:
        """What west's process would send."""
        reply = self.trained(message, believed, self.directory)
        return sealed(reply, believed.request_sha256, signing_key(self.directory))

    def trained(self, message: Message, believed: Believed, directory: Path) -> RecordDict:
        """What the records and the ledger of a directory give, unsigned."""
        metadata, client = message.metadata, believed.envelope.client
        context = open_node(directory).context(metadata.dst_node_id, metadata.run_id, client)
        return InlinePool(threads=1).call(handle, message, context).content

    def close(self) -> None:
        """Ends it."""
        self._stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive()

    def _serve(self) -> None:
        ready, key = self._ready, node_key(self.directory)
        instructions = Instructions(ready.directory, ready.admission)
        with connected(ready.admission.address, ready.admission.authority.encode(), key) as found:
            link = Link(*found, ready.approved, 1 << 30)

            def answered(message: Message, run: int) -> Message:
                try:
                    content = self.answer(message, instructions.believed(message, run))
                except Exception as error:
                    return Message(Error(code=2, reason=str(error)), reply_to=message)
                return Message(content, reply_to=message)

            link.serve(answered, lambda seconds: not self._stop.wait(seconds), 0.5)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A server and two nodes, up and connected; west is admitted as they are."""
    with federation(tmp_path_factory.mktemp("site"), held="west") as made:
        yield made


@pytest.fixture(scope="module")
def west(site: Site) -> Iterator[West]:
    """West, connected, in the hands of the tests: honest, unless one says otherwise."""
    made = West(site.root / "west")
    try:
        site.wait_for("west")
        yield made
    finally:
        made.close()


@pytest.fixture
def make(site: Site, west: West, config_in: MakeConfig) -> MakeConfig:
    """A private config for all three nodes, with a run directory below the server's."""

    def build(name: str, **sections: dict[str, Any]) -> Config:
        rounds = {"rounds": 1, **sections.pop("federation", {})}
        sections.setdefault("privacy", PRIVATE)
        return config_in(site.server / "runs" / name, federation=rounds, **sections)

    return build


def ledger_key(site: Site, name: str) -> str:
    """A node's ledger key, as the server knows it."""
    return public_hex(signing_key(site.root / name).public_key())


def charges(site: Site) -> dict[str, int]:
    """How often each node has charged so far."""
    return {
        name: len(ledger_of(site.root / name).charges)
        if (site.root / name / layout.LEDGER).exists()
        else 0
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
    for where in (reasons(directory), site.log("north"), site.log("south")):
        assert "not signed with the operator's key" in where
    assert charges(site) == before


def test_replies_are_the_admitted_nodes_own(site: Site, west: West, make: MakeConfig) -> None:
    """An unsigned reply, one under another key, and one for another request do not count; the right one does."""
    own, other = signing_key(west.directory), Ed25519PrivateKey.generate()

    def lie(message: Message, believed: Believed) -> RecordDict:
        reply = west.trained(message, believed, west.directory)
        match believed.envelope.round:
            case 1:
                return reply
            case 2:
                return sealed(reply, believed.request_sha256, other)
            case 3:
                return sealed(reply, "0" * 64, own)
            case _:
                return sealed(reply, believed.request_sha256, own)

    west.answer = lie
    _, directory = site.run(make("first", federation={"rounds": 4}))
    west.answer = west.honest
    lines = rounds_of(directory)
    assert [(line["completed"], line["failed"]) for line in lines] == [(2, 1), (2, 1), (2, 1), (3, 0)]
    for line in lines[:3]:
        (reason,) = line["reasons"]
        assert reason == "west: the reply is not signed for this request with the admitted ledger key"


def test_a_spend_is_not_forgotten_by_the_next_run(site: Site, make: MakeConfig) -> None:
    """A ledger that was deleted is found out by another run; its node is out until it is readmitted.

    The others go on; status says who is out, why, and what each has spent over all runs.
    """
    shutil.copytree(site.root / "west", site.root / "backup")  # for the test below
    spent = read_standings(site.server / SPENDS)
    south, key = site.root / "south", ledger_key(site, "south")
    assert spent[key].charges == charges(site)["south"] >= 1
    node = next(each for each in site.status()["nodes"] if each["name"] == "south")
    assert epsilon_of_json(node["lifetime_epsilon"]) == pytest.approx(spent[key].epsilon)
    site.stop("south")
    for path in south.glob("ledger.jsonl*"):
        path.unlink()
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
    assert "south is excluded since" in " ".join(text.split())
    said = fedslm("provision", "readmit", "south", "--server", site.server, "--reason", "disk lost")
    assert f"{spent[key].charges} charge" in said


def test_a_restored_backup_is_found_out_by_the_server(site: Site, west: West, make: MakeConfig) -> None:
    """A node that hides that its ledger is an old copy, and signs what it says, is put out all the same.

    The node that was readmitted takes part; the audit says who is out, and why it was let in again.
    """
    backup = site.root / "backup"

    def hides(message: Message, believed: Believed) -> RecordDict:
        values = json.loads(str(message.content[ENVELOPE][ENVELOPE]))
        message.content[ENVELOPE] = ConfigRecord({ENVELOPE: json.dumps({**values, "seen": []})})
        reply = west.trained(message, believed, backup)
        return sealed(reply, believed.request_sha256, signing_key(backup))

    west.answer = hides
    _, directory = site.run(make("third"))
    west.answer = west.honest
    (line,) = rounds_of(directory)
    assert (line["completed"], line["failed"]) == (2, 1)
    (reason,) = line["reasons"]
    assert reason.startswith("west: ")
    assert "it was rolled back" in reason
    standing = read_standings(site.server / SPENDS)[ledger_key(site, "west")]
    assert standing.out
    assert standings_of_run(directory)["west"].out == standing.out
    audit = fedslm("audit", "run", directory, "--no-empirical", code=1)
    page = (directory / "audit.md").read_text()
    assert "west is excluded since" in page, audit
    assert audit.count("finding: ") == 1, audit  # south, which was readmitted, is none
    assert "disk lost" in page, audit
    fedslm("provision", "readmit", "west", "--server", site.server, "--reason", "a test")


def test_a_revoked_node_in_the_middle(site: Site, west: West, make: MakeConfig) -> None:
    """A run under way goes on without it, and later runs are possible; the last test: it stays out."""

    def revokes(message: Message, believed: Believed) -> RecordDict:
        if believed.envelope.round == 2:
            fedslm("provision", "revoke", "south", "--server", site.server)
        return west.honest(message, believed)

    west.answer = revokes
    status, directory = site.run(make("under-way", federation={"rounds": 3, "min_clients": 2}))
    west.answer = west.honest
    assert status == control.COMPLETED
    lines = rounds_of(directory)
    assert (lines[0]["completed"], lines[-1]["completed"]) == (3, 2)
    assert "the node was revoked" in "\n".join(lines[-1]["reasons"])
    with pytest.raises(FederationError, match=r"2 nodes would take part \(north, west\)"):
        site.run(make("three"))
    status, directory = site.run(make("two", federation={"num_clients": 2}))
    assert status == control.COMPLETED
    assert rounds_of(directory)[0]["completed"] == 2
