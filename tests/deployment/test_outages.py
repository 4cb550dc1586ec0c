"""What a real federation survives: nodes, workers and servers that die, and come back."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from sites import FEDSLM, Site, eventually, fedslm, ledger_of, moving, rounds_of
from tiny import PRIVATE

from fedslm.config import Config, to_toml
from fedslm.deployment import control
from fedslm.storage import load_adapter

pytestmark = pytest.mark.federation
MakeConfig = Callable[..., Config]


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
