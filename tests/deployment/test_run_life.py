"""The life of a run on real nodes: what is alive is left alone, and what dies holds nobody."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.sites import FEDSLM, SECONDS, Site, eventually, federation, fedslm, rounds_of
from support.tiny import PRIVATE

from fedslm import config as configuration
from fedslm.config import Config
from fedslm.deployment import control, runs
from fedslm.errors import RunError

pytestmark = [pytest.mark.federation, pytest.mark.slow]
MakeConfig = Callable[..., Config]
NAMES = ("north", "south")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A server and two nodes."""
    with federation(tmp_path_factory.mktemp("site"), NAMES) as made:
        yield made


@pytest.fixture
def make(site: Site, config_in: MakeConfig) -> MakeConfig:
    """A config for the real nodes, with a run directory below the server's."""

    def build(name: str, **sections: dict[str, Any]) -> Config:
        rounds = {"rounds": 2, "num_clients": 2, **sections.pop("federation", {})}
        return config_in(site.server / "runs" / name, federation=rounds, **sections)

    return build


def written(site: Site, config: Config) -> Path:
    """The config as a file."""
    path = site.root / "config.toml"
    path.write_text(configuration.to_toml(config))
    return path


def test_a_run_that_is_alive_is_left_alone(site: Site, make: MakeConfig) -> None:
    """From its start on nobody starts or continues it again; stop finds it, and then it can resume."""
    config = make("alive", training={"local_steps": 50}, federation={"rounds": 40})
    with control.connected(site.server) as connection:
        number, directory = runs.start(connection, site.server, config, resume=False)
        for resume in (False, True):  # its process has not even taken the directory
            with pytest.raises(RunError, match=rf"alive is active: run {number} is"):
                runs.start(connection, site.server, config, resume=resume)
        eventually(lambda: len(rounds_of(directory)) >= 1, "a first round")
        command = ("server", "run", written(site, config), "--server", site.server, "--resume")
        said = fedslm(*command, code=1)
        assert f"run {number} is running" in said
        assert "fedslm server stop alive" in said
        assert runs._number(directory) == number
        assert "alive is stopped" in fedslm("server", "stop", "alive", "--server", site.server)
        lines = rounds_of(directory)
        assert connection.status(number) == control.STOPPED
        assert site.status()["runs"][0]["state"] == "interrupted"
        assert "is not running" in fedslm("server", "stop", "alive", "--server", site.server, code=1)
        assert rounds_of(directory) == lines
        again, _ = runs.start(connection, site.server, config, resume=True)
        assert again != number
        eventually(lambda: len(rounds_of(directory)) > len(lines), "the run goes on")
        runs.stop(connection, directory)


def test_a_node_that_dies_in_mid_upload_holds_nobody(site: Site, make: MakeConfig) -> None:
    """The round ends at its deadline, and the reply that came in time counts."""
    seconds = 25.0
    config = make("upload", federation={"rounds": 1, "round_deadline_seconds": seconds})
    site.stop("north")  # client 0: its reply is the first that is waited for
    script = Path(__file__).parents[1] / "support" / "dying_node.py"
    dying = subprocess.Popen([sys.executable, str(script), str(site.root / "north")])
    try:
        eventually(lambda: site.online("north"), "the dying node is online")
        status, directory = site.run(config)
        assert dying.wait(5) == -9
    finally:
        dying.kill()
        dying.wait()
        site.start_node("north")
    assert status == control.COMPLETED
    (line,) = rounds_of(directory)
    assert (line["completed"], line["late"]) == (1, 1)
    assert line["reasons"] == ["north: late"]
    assert seconds <= line["seconds"] < seconds + 30.0  # Flower's own loop took 180 s more


def test_a_watcher_waits_through_a_restart(site: Site, make: MakeConfig) -> None:
    """`fedslm server run` says once that the SuperLink is away, and ends with 0 when the run does."""
    # Flower gives an instruction's outline out once: the kill may lose one, and that node is late.
    federation = {"rounds": 4, "round_deadline_seconds": 45.0}
    config = make("watched", training={"local_steps": 100}, federation=federation)
    command = [FEDSLM, "server", "run", str(written(site, config)), "--server", str(site.server)]
    watcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    directory = site.server / "runs" / "watched"
    try:
        eventually(lambda: len(rounds_of(directory)) >= 1, "a first round")
        with site.without_superlink():
            time.sleep(4)
        _, said = watcher.communicate(timeout=SECONDS)
    finally:
        watcher.kill()
    assert watcher.returncode == 0, said
    assert said.count("the SuperLink does not answer; waiting") == 1
    assert [f"round {number}: " in said for number in (1, 2, 3, 4)] == [True] * 4
    assert rounds_of(directory)[-1]["completed"] == 2


def test_a_run_in_which_no_node_takes_part(site: Site, make: MakeConfig) -> None:
    """`fedslm server run` ends with 1 and each node's reason, and the run's state is failed."""
    usual = {}
    for name in NAMES:
        path = site.root / name / "policy.toml"
        usual[path] = path.read_text()
        path.write_text(
            usual[path].replace("min_noise_multiplier = 0.3", "min_noise_multiplier = 99.0")
        )
    try:
        config = written(site, make("nobody", privacy=PRIVATE))
        said = fedslm("server", "run", config, "--server", site.server, code=1)
    finally:
        for path, text in usual.items():
            path.write_text(text)
    assert "no node took part in any of the 2 rounds" in said
    for name in NAMES:
        assert f"{name}, 2 times: " in said
    assert "noise_multiplier" in said
    (run,) = [each for each in site.status()["runs"] if each["name"] == "nobody"]
    assert (run["state"], run["refused"]) == ("failed", 4)
    report = json.loads((site.server / "runs/nobody/report.json").read_text())
    assert report["metrics_after"] == report["metrics_before"]
