"""What goes wrong on real machines: the run completes or resumes, and no spend is forgotten."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from support.sites import NAMES, Site, eventually, federation, ledger_of, moving, rounds_of
from support.tiny import PRIVATE

from fedslm.config import Config
from fedslm.deployment import bundle as bundles
from fedslm.deployment import control
from fedslm.storage import load_adapter

pytestmark = [pytest.mark.federation, pytest.mark.slow]
MakeConfig = Callable[..., Config]
LONG = {"local_steps": 100}
REPLAYING = b'''"""A hostile server: asks for everything three times."""

import hashlib
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedslm.federation import trust
from fedslm.protocol.envelopes import ENVELOPE, content_sha256, enclosed
from fedslm.flower import serve_flower

app = ServerApp()
signing = []
usual = trust.Trust.signed


def signed(self, contents, asked):
    signing[:] = [self, asked]
    return usual(self, contents, asked)


trust.Trust.signed = signed


class Replaying:
    """Sends each answered request again: as it was, then with a new signature of the operator."""

    def __init__(self, grid, notes):
        self.grid, self.notes, self.sent = grid, notes, {}

    def __getattr__(self, name):
        return getattr(self.grid, name)

    def push_messages(self, messages):
        messages = list(messages)
        contents = [(m.content.array_records.copy(), m.content.config_records.copy()) for m in messages]
        identifiers = list(self.grid.push_messages(messages))
        for identifier, message, content in zip(identifiers, messages, contents):
            self.sent[identifier] = (message, content)
        return identifiers

    def pull_messages(self, identifiers):
        for reply in self.grid.pull_messages(identifiers):
            message, (arrays, configs) = self.sent[reply.metadata.reply_to_message_id]
            same = self.ask(message, RecordDict({**arrays, **configs}))
            anew = self.ask(message, renewed(message, RecordDict({**arrays, **configs})))
            notes = ["refused" if same.has_error() else "obeyed"]
            notes.append("same" if digest(anew) == digest(reply) else "other")
            with self.notes.open("a") as file:
                file.write("\\n".join([*notes, ""]))
            yield reply

    def ask(self, message, content):
        again = Message(
            content,
            message.metadata.dst_node_id,
            message.metadata.message_type,
            ttl=60,
            group_id=message.metadata.group_id,
        )
        (second,) = self.grid.send_and_receive([again], timeout=60)
        return second


def renewed(message, content):
    own, asked = signing
    (client, node), = ((c, n) for c, n in own.roster.items() if n.node_id == message.metadata.dst_node_id)
    bare = RecordDict({name: content[name] for name in content if name != ENVELOPE})
    seen = own.spends.standing(node.ledger_key).seen
    envelope = asked.envelope(node.ledger_key, client, content_sha256(bare), seen)
    return enclosed(bare, envelope, own._key)[0]


def digest(message):
    found = hashlib.sha256()
    for record in message.content.array_records.values():
        for name in sorted(record):
            found.update(name.encode() + record[name].data)
    return found.hexdigest()


@app.main()
def main(grid: Grid, context: Context) -> None:
    notes = Path(str(context.run_config["run.directory"])).with_suffix(".replays")
    serve_flower(Replaying(grid, notes), context.run_config, context.run_id)
'''


@contextmanager
def serving(code: bytes) -> Iterator[str]:
    """Runs are started with another server's side meanwhile; gives the bundle's hash."""
    usual = bundles._SERVER
    bundles._SERVER = code
    bundles.bundle.cache_clear()
    try:
        yield bundles.sha256_of(bundles.bundle())
    finally:
        bundles._SERVER = usual
        bundles.bundle.cache_clear()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A server and three nodes, up and connected; the nodes approve the replaying server's bundle too."""
    with serving(REPLAYING) as approved:
        more = f'approved_bundles = ["{approved}"]\n'
    with federation(tmp_path_factory.mktemp("site"), more=more) as made:
        yield made


@pytest.fixture
def make(site: Site, config_in: MakeConfig) -> MakeConfig:
    """A config for the real nodes, with a run directory below the server's."""

    def build(name: str, **sections: dict[str, Any]) -> Config:
        rounds = {"rounds": 3, **sections.pop("federation", {})}
        return config_in(site.server / "runs" / name, federation=rounds, **sections)

    return build


def test_a_superlink_that_is_gone_for_8_seconds(site: Site, make: MakeConfig) -> None:
    """The SuperLink dies and is back after 8 s: the run goes on to its end by itself."""
    with site.running(make("short", training=LONG, federation={"rounds": 5})) as (directory, ended):
        eventually(lambda: len(rounds_of(directory)) >= 1, "a first round")
        with site.without_superlink():
            time.sleep(8)
        eventually(lambda: bool(site.when_it_answers(ended)), "the end", 240)
        assert site.when_it_answers(ended) == control.COMPLETED
    assert [line["round"] for line in rounds_of(directory)] == [1, 2, 3, 4, 5]
    assert rounds_of(directory)[-1]["completed"] == 3


def test_a_superlink_that_is_gone_for_100_seconds_is_resumed(site: Site, make: MakeConfig) -> None:
    """The SuperLink is away for 100 s; if the run fails, --resume gives the adapter of a quiet run."""
    rounds = {"rounds": 5, "max_failed_rounds": 5}
    status, quiet = site.run(make("undisturbed", training=LONG, federation=rounds))
    assert status == control.COMPLETED
    config = make("long", training=LONG, federation=rounds)
    with site.running(config) as (directory, ended):
        eventually(lambda: len(rounds_of(directory)) >= 1, "a first round")
        with site.without_superlink():
            time.sleep(100)
        eventually(lambda: bool(site.when_it_answers(ended)), "the end", 240)
        status = site.when_it_answers(ended)
    assert status != control.COMPLETED
    eventually(lambda: site.status()["runs"][0]["state"] == "interrupted", "the server's side ends")
    status, directory = site.run(config, resume=True)
    assert status == control.COMPLETED
    lines = rounds_of(directory)
    assert [line["round"] for line in lines] == [1, 2, 3, 4, 5]
    one, other = (load_adapter(moving(each)) for each in (quiet, directory))
    assert one.sha256() == other.sha256()


def test_a_straggler_is_dropped_and_stays_charged(site: Site, make: MakeConfig) -> None:
    """A node that trains past the deadline is counted late; its ledger keeps the charge; it comes back."""
    south = site.root / "south"
    before = len(ledger_of(south).charges)
    federation = {"rounds": 4, "round_deadline_seconds": 20.0}
    config = make("straggler", privacy=PRIVATE, training={"local_steps": 60}, federation=federation)
    with site.running(config) as (directory, ended):
        eventually(lambda: len(ledger_of(south).charges) == before + 2, "the charge of round 2")
        worker = site.worker_of("south") or 0
        os.kill(worker, signal.SIGSTOP)
        eventually(lambda: len(rounds_of(directory)) >= 2, "round 2 is over")
        os.kill(worker, signal.SIGCONT) if alive(worker) else None
        eventually(lambda: bool(ended()), "the end")
    assert ended() == control.COMPLETED
    lines = rounds_of(directory)
    assert (lines[1]["completed"], lines[1]["late"]) == (2, 1)
    assert lines[-1]["completed"] == 3
    charged = {charge.round for charge in ledger_of(south).charges[before:]}
    assert 2 in charged
    assert charged >= {line["round"] for line in lines if line["completed"] == 3}


def test_a_full_disk_sends_nothing(site: Site, make: MakeConfig) -> None:
    """A node whose ledger cannot be written sends nothing; with room again it takes part."""
    north = site.root / "north"
    before = ledger_of(north).charges
    with full_disk(site, "north"):
        status, directory = site.run(make("full", privacy=PRIVATE, federation={"min_clients": 2}))
        assert status == control.COMPLETED
        assert [(line["completed"], line["failed"]) for line in rounds_of(directory)] == [(2, 1)] * 3
        assert not ledger_of(north).charges[len(before) :]
    status, directory = site.run(make("room", privacy=PRIVATE))
    assert [line["completed"] for line in rounds_of(directory)] == [3, 3, 3]


def test_a_node_that_is_cut_off_for_a_round(site: Site, make: MakeConfig) -> None:
    """A node's network breaks in round 2 and is mended: the others go on, and it is back."""
    federation = {"rounds": 6, "round_deadline_seconds": 20.0}
    config = make("cut", privacy=PRIVATE, training={"local_steps": 40}, federation=federation)
    before = len(ledger_of(site.root / "west").charges)
    with site.running(config) as (directory, ended):
        eventually(lambda: len(rounds_of(directory)) >= 1, "round 1")
        site.cables["west"].cut()
        eventually(lambda: len(rounds_of(directory)) >= 2, "round 2")
        site.cables["west"].mend()
        eventually(lambda: bool(ended()), "the end")
    assert ended() == control.COMPLETED
    lines = rounds_of(directory)
    assert lines[1]["completed"] == 2
    assert lines[-1]["completed"] == 3
    received = sum(line["completed"] == 3 for line in lines)
    assert len(ledger_of(site.root / "west").charges) - before >= received


def test_a_weaker_plan_is_refused_by_the_node(site: Site, make: MakeConfig) -> None:
    """A node whose policy asks for more refuses, with a reason that the server's operator can read."""
    path = site.root / "north" / "policy.toml"
    usual, before = path.read_text(), ledger_of(site.root / "north").charges
    path.write_text(usual.replace("min_noise_multiplier = 0.3", "min_noise_multiplier = 30.0"))
    try:
        status, directory = site.run(make("weak", privacy=PRIVATE))
    finally:
        path.write_text(usual)
    assert status == control.COMPLETED
    assert [(line["completed"], line["refused"]) for line in rounds_of(directory)] == [(2, 1)] * 3
    (north,) = [node for node in site.status()["nodes"] if node["name"] == "north"]
    assert "noise_multiplier" in north["reason"]
    assert "is below 30" in north["reason"]
    assert ledger_of(site.root / "north").charges == before


def test_a_run_waits_for_a_node_that_answers_at_its_own_time(site: Site, make: MakeConfig) -> None:
    """Its first request leaves too little time and is not charged; the deadline is extended for the next ones."""
    path = site.root / "north" / "policy.toml"
    usual, before = path.read_text(), len(ledger_of(site.root / "north").charges)
    path.write_text(f"{usual}answer_after_seconds = 3.0\n")
    try:
        federation = {"round_deadline_seconds": 20.0}
        status, directory = site.run(make("paced", privacy=PRIVATE, federation=federation))
    finally:
        path.write_text(usual)
    assert status == control.COMPLETED
    lines = rounds_of(directory)
    assert [(line["completed"], line["refused"]) for line in lines] == [(2, 1), (3, 0), (3, 0)]
    assert "round_deadline_seconds to at least 63" in lines[0]["reasons"][0]
    assert all(line["seconds"] >= 3.0 for line in lines[1:])
    assert [charge.round for charge in ledger_of(site.root / "north").charges[before:]] == [2, 3]


def test_a_repeated_request_is_free_and_gives_nothing_new(site: Site, make: MakeConfig) -> None:
    """A copy of a request is refused; one that is signed anew gives the same bytes; one charge."""
    before = {name: len(ledger_of(site.root / name).charges) for name in NAMES}
    with serving(REPLAYING):
        status, directory = site.run(make("replay", privacy=PRIVATE))
    assert status == control.COMPLETED
    notes = directory.with_suffix(".replays").read_text().split()
    assert notes == ["refused", "same"] * 9
    for name in NAMES:
        assert len(ledger_of(site.root / name).charges) == before[name] + 3


def alive(process: int) -> bool:
    """Whether a process is there and no zombie."""
    path = Path(f"/proc/{process}/stat")
    return path.exists() and path.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def fill(path: Path) -> None:
    """Writes until nothing more fits."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(512))


@contextmanager
def full_disk(site: Site, name: str) -> Iterator[None]:
    """A node lives on a disk that is full; its files move back at the end."""
    node = site.root / name
    disk, aside = site.root / f"{name}.disk", site.root / f"{name}.aside"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a small disk needs rights that this user lacks")
    site.stop(name)
    try:
        subprocess.run(["cp", "-a", f"{node}/.", str(disk)], check=True)
        node.rename(aside)
        node.symlink_to(disk)
        site.start_node(name)
        fill(disk / "filler")
        yield
    finally:
        (disk / "filler").unlink(missing_ok=True)
        site.stop(name)
        if node.is_symlink():
            node.unlink()
            aside.rename(node)
            subprocess.run(["cp", "-a", f"{disk}/.", str(node)], check=True)
        subprocess.run(["umount", str(disk)], check=True)
        site.start_node(name)
