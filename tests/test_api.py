"""Tests of the Python API: one call runs what the command runs, and says what came of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from support.tiny import PRIVATE

import fedslm
from fedslm.config import Config, to_toml
from fedslm.errors import ConfigError, RunError
from fedslm.progress import Bar
from fedslm.records import RoundRecord

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
        ({"rounds": 1}, "rounds: is not section.key; give overrides such as "),
        ({"federation": {"rounds": 1}}, "federation: is not section.key"),
        ({".rounds": 1}, "is not section.key"),
        (["federation.rounds=1"], "overrides: value of type list: should be a mapping such as"),
        ({"federation.rounds": "many"}, "federation.rounds"),
        ({"federation.round": 1}, "federation.round"),
        ({"": 1}, "is not section.key"),
        ({3: 1}, "3: is not section.key"),
    ],
)
def test_a_wrong_override_is_named(config_in: Make, tmp_path: Path, overrides: Any, part: str) -> None:
    """An unknown key, a value of another type, or no key at all: named before anything is made."""
    with pytest.raises(ConfigError, match=part):
        fedslm.simulate(config_in(tmp_path / "run"), overrides=overrides)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("config", [7, None, ["my.toml"]])
def test_another_kind_of_config_is_named(config: Any) -> None:
    """It is said what was given, and what it may be."""
    with pytest.raises(
        ConfigError, match=f"type {type(config).__name__}: should be the path of a TOML"
    ):
        fedslm.simulate(config)


def test_a_value_in_place_of_a_section_is_named(tmp_path: Path) -> None:
    """With and without an override of a key in it."""
    path = tmp_path / "my.toml"
    path.write_text('privacy = 3\n[model]\nbase = "demo"\n')
    for overrides in ({}, {"privacy.epsilon": 2}):
        with pytest.raises(
            ConfigError, match=r"privacy: value 3: should be a section; write \[privacy\]"
        ):
            fedslm.simulate(path, overrides=overrides)


def test_sections_may_be_a_mapping(config_in: Make, tmp_path: Path) -> None:
    """What a notebook builds is as good as a file."""
    sections = config_in(tmp_path / "run").model_dump(mode="json")
    assert fedslm.simulate(sections, overrides={"federation.rounds": 1}).rounds == 1


def test_an_observer_is_checked_first_and_may_fail_later(config_in: Make, tmp_path: Path) -> None:
    """One without methods is refused before anything is made; after an exception the run resumes."""

    class Failing(Bar):
        def on_round(self, record: object) -> None:
            raise KeyError("mine")

    config = config_in(tmp_path / "run")
    lacking: Any = object()
    with pytest.raises(ConfigError, match="type object: has no on_start, on_client, on_round, on_end"):
        fedslm.simulate(config, observers=[lacking])
    with pytest.raises(ConfigError, match="type Bar: should be a list of observers"):
        fedslm.simulate(config, observers=Bar())  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()
    with pytest.raises(KeyError, match="mine"):
        fedslm.simulate(config, observers=[Failing()])
    assert fedslm.resume(tmp_path / "run").rounds == 3


def test_observers_are_told_the_end_once(config_in: Make, tmp_path: Path) -> None:
    """All of them, with the report; with nothing after Ctrl-C, whoever pressed it."""
    told: list[tuple[str, str]] = []

    class Tells(fedslm.Observer):
        def __init__(self, name: str, stops: bool = False) -> None:
            self.name, self.stops = name, stops

        def on_round(self, record: RoundRecord) -> None:
            if self.stops:
                raise KeyboardInterrupt

        def on_end(self, report: Mapping[str, Any] | None) -> None:
            told.append((self.name, "none" if report is None else report["adapter_sha256"]))

    with pytest.raises(KeyboardInterrupt):
        fedslm.simulate(config_in(tmp_path / "run"), observers=[Tells("a"), Tells("b", stops=True)])
    result = fedslm.resume(tmp_path / "run", observers=(Tells("a"), Tells("b")))
    sha256 = result.report["adapter_sha256"]
    assert told == [("a", "none"), ("b", "none"), ("a", sha256), ("b", sha256)]


def test_an_observer_that_fails_at_the_end_hides_nothing(
    config_in: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The other observers are told, the report is returned, and Ctrl-C stays Ctrl-C; the log has the error."""
    told = []

    class Fails(fedslm.Observer):
        def on_end(self, report: Mapping[str, Any] | None) -> None:
            raise RuntimeError("mine")

    class Stops(fedslm.Observer):
        def on_round(self, record: RoundRecord) -> None:
            raise KeyboardInterrupt

        def on_end(self, report: Mapping[str, Any] | None) -> None:
            told.append(report)

    with pytest.raises(KeyboardInterrupt):
        fedslm.simulate(config_in(tmp_path / "run"), observers=[Fails(), Stops()])
    assert told == [None]
    assert fedslm.resume(tmp_path / "run", observers=[Fails()]).rounds == 3
    assert "on_end of Fails failed" in caplog.text


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
    fedslm.simulate(config_in(tmp_path / "two"), overrides=one_round, observers=[Bar()])
    assert "round 1" in capfd.readouterr().err
