"""What a real federation survives: nodes, workers and servers that die, and come back."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.sites import FEDSLM, Site, eventually, fedslm, ledger_of, rounds_of
from support.tiny import PRIVATE

from fedslm.config import Config, to_toml
from fedslm.deployment import control, runs

pytestmark = pytest.mark.federation
MakeConfig = Callable[..., Config]
Simulated = tuple[Path, dict[str, Any]]


def test_what_is_killed_comes_back(site: Site, make: MakeConfig) -> None:
    """A node and another's worker are killed (-9) in mid-round: each misses that round alone.

    The node is started again with other records: same identity, ledger and run. The worker's message is
    answered with an error.
    """
    config = make("killed", privacy=PRIVATE, training={"local_steps": 60}, federation={"rounds": 4})
    with site.running(config) as (directory, ended):
        eventually(lambda: len(rounds_of(directory)) == 1 and site.is_training("west"), "round 2")
        site.stop("west", signal.SIGKILL)
        notes = site.root / "west" / "notes.jsonl"
        with notes.open("a") as file:  # of no known label: later runs train on what they trained on
            file.write(json.dumps({"text": "admitted meanwhile", "label": "other"}) + "\n")
        site.start("west", "node", "up", site.root / "west")
        eventually(lambda: len(rounds_of(directory)) == 2 and site.is_training("south"), "round 3")
        os.kill(site.worker_of("south") or 0, signal.SIGKILL)
        eventually(lambda: bool(ended()), "the end", every_seconds=0.5)
    assert ended() == control.COMPLETED
    lines = rounds_of(directory)
    assert [line["completed"] for line in lines] == [3, 2, 2, 3]
    assert lines[1]["reasons"][0].startswith("west: ")
    assert "worker died" in lines[2]["reasons"][0]
    charges = ledger_of(site.root / "west").charges
    assert [charge.round for charge in charges] in ([1, 2, 3, 4], [1, 3, 4])
    assert len({charge.dataset_commitment for charge in charges}) == 1
    twice = fedslm("node", "up", site.root / "west", code=1)
    assert "another process runs the node" in twice


def test_a_lost_server_is_resumed(site: Site, make: MakeConfig, simulated: Simulated) -> None:
    """Every server process is killed (-9) in mid-run; up again and --resume: the adapter of a quiet run."""
    config = make("lost")
    with site.running(config) as (directory, _):
        eventually(lambda: len(rounds_of(directory)) >= 1, "a first round")
        site.stop("server", signal.SIGKILL)
        subprocess.run(["pkill", "-9", "-f", "--", site.launcher], check=False)
    site.start_server()
    status, directory = site.run(config, resume=True)
    assert status == control.COMPLETED
    report = json.loads((directory / "report.json").read_text())
    assert report["adapter_sha256"] == simulated[1]["adapter_sha256"]


def test_resuming_tells_of_new_rounds_alone(site: Site, make: MakeConfig) -> None:
    """`server run --resume` prints the rounds after the checkpoint, each once, and names who was left out.

    A node that is not there from the start is counted as late; the rounds go on without it. The last
    test: it stays away.
    """
    site.stop("south")
    eventually(lambda: not site.online("south"), "south is offline", every_seconds=0.5)
    config = make(
        "again",
        privacy=PRIVATE,
        federation={"rounds": 5, "min_clients": 2},
        training={"local_steps": 60},
    )
    path = site.root / "again.toml"
    path.write_text(to_toml(config))
    words = ("server", "run", path, "--server", site.server)
    site.start("again", *words)
    directory = site.server / "runs" / "again"
    eventually(lambda: len(rounds_of(directory)) >= 1, "a first round")
    with control.connected(site.server) as connection:
        runs.stop(connection, directory)
    eventually(lambda: site.processes["again"].poll() is not None, "the watcher ends")
    site.processes.pop("again")
    done = len(rounds_of(directory))
    said = told(*words, "--resume")
    assert [int(each) for each in re.findall(r"^round (\d+): ", said, re.MULTILINE)] == list(
        range(done + 1, 6)
    )
    assert len(re.findall(r"^  south: late$", said, re.MULTILINE)) == 5 - done > 0
    assert "client" not in said
    (south,) = [node for node in site.status()["nodes"] if node["name"] == "south"]
    assert south["reason"] == "round 5: late"
    assert "south: late" in (directory / "report.md").read_text()
    assert [(line["completed"], line["late"]) for line in rounds_of(directory)] == [(2, 1)] * 5


def told(*words: str | Path) -> str:
    """What a command that ends well says on standard error."""
    done = subprocess.run(
        [FEDSLM, *map(str, words)], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stderr
