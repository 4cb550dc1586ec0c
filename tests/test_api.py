"""Tests of the Python API: one call runs what the command runs, and says what came of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import PRIVATE

import fedslm
from fedslm.config import Config, to_toml
from fedslm.errors import ConfigError, RunError
from fedslm.progress import Bar

Make = Callable[..., Config]


def test_a_file_and_a_config_give_the_same(config_in: Make, tmp_path: Path) -> None:
    """Without noise the adapter is the same; the result is what the report says, typed."""
    config = config_in(tmp_path / "one")
    (tmp_path / "my.toml").write_text(to_toml(config))
    other = {"run.directory": str(tmp_path / "two")}
    one, two = fedslm.simulate(config), fedslm.simulate(tmp_path / "my.toml", overrides=other)
    assert one.report["adapter_sha256"] == two.report["adapter_sha256"]
    assert (one.directory, two.directory) == (tmp_path / "one", tmp_path / "two")
    assert (one.rounds, one.delta, one.stopped) == (3, None, "")
    assert one.epsilon == math.inf
    written = json.loads((two.directory / "report.json").read_text())
    assert two.metrics_before == written["metrics_before"]
    assert two.metrics_after == written["metrics_after"]


def test_overrides_are_values(config_in: Make, tmp_path: Path) -> None:
    """They replace what a config says, of any type; the result has the ε that was spent."""
    config = config_in(tmp_path / "run", privacy=PRIVATE)
    result = fedslm.simulate(config, overrides={"federation.rounds": 1, "run.name": "5"})
    assert (result.rounds, result.report["name"], result.delta) == (1, "5", config.privacy.delta)
    assert 0 < result.epsilon <= float(config.privacy.epsilon or 0)
    assert result.epsilon == max(each["epsilon"] for each in result.report["privacy"].values())


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ({"rounds": 1}, "rounds: is not section.key, such as training.local_steps"),
        ({"federation.rounds": "many"}, "federation.rounds"),
        ({"federation.round": 1}, "federation.round"),
        ({"": 1}, "is not section.key"),
        ({3: 1}, "3: is not section.key"),
    ],
)
def test_a_wrong_override_is_named(
    config_in: Make, tmp_path: Path, overrides: dict[str, object], part: str
) -> None:
    """An unknown key, a value of another type, or no key at all: named before anything is made."""
    with pytest.raises(ConfigError, match=part):
        fedslm.simulate(config_in(tmp_path / "run"), overrides=overrides)
    assert not (tmp_path / "run").exists()


def test_a_run_is_resumed(config_in: Make, tmp_path: Path) -> None:
    """A finished one is left as it is; what is not there is an error of ours."""
    before = fedslm.simulate(config_in(tmp_path / "run"))
    assert fedslm.resume(tmp_path / "run") == before
    with pytest.raises(RunError):
        fedslm.resume(str(tmp_path / "nothing"))


def test_nothing_is_shown_unless_it_is_asked_for(
    config_in: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A notebook's output stays clean; an observer is told of each round."""
    one_round = {"federation.rounds": 1}
    fedslm.simulate(config_in(tmp_path / "one"), overrides=one_round)
    assert capfd.readouterr() == ("", "")
    fedslm.simulate(config_in(tmp_path / "two"), overrides=one_round, observer=Bar())
    assert "round 1" in capfd.readouterr().err
