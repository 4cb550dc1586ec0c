"""Following and starting a run while the SuperLink is away; test_run_life.py has it up."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.places import admitted_node

from fedslm.config import Config
from fedslm.deployment import runs
from fedslm.deployment.control import Control, connected
from fedslm.errors import FederationError


@pytest.fixture
def away(tmp_path: Path) -> Iterator[Control]:
    """A connection to a SuperLink that is not there."""
    admitted_node(tmp_path, 'name = "n"\n')
    with connected(tmp_path / "server") as control:
        yield control


def test_a_watcher_gives_up_with_advice(
    away: Control, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It says once that it waits, still tells of rounds, and warns of continuing what may be alive."""
    monkeypatch.setattr(runs, "_OUTAGE_SECONDS", 1.5)
    lines: list[dict[str, Any]] = []
    path = tmp_path / "rounds.jsonl"
    path.write_text(json.dumps({"round": 1}) + '\n{"round":')
    began = time.monotonic()
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(FederationError, match="--resume only if it is failed or interrupted"),
    ):
        runs.follow(away, 7, tmp_path, lines.append, threading.Event())
    assert time.monotonic() - began > 1.5
    assert [record.getMessage() for record in caplog.records].count(
        "the SuperLink does not answer; waiting"
    ) == 1
    assert lines == [{"round": 1}]


def test_a_watcher_may_leave_meanwhile(away: Control, tmp_path: Path) -> None:
    """Ctrl-C ends it while it waits."""
    stop = threading.Event()
    stop.set()
    assert runs.follow(away, 7, tmp_path, lambda _: None, stop) == ""


def test_nothing_is_started_that_cannot_be_asked_about(
    away: Control, tmp_path: Path, config_in: Callable[..., Config]
) -> None:
    """Whether a run is alive is asked first: without an answer nothing of it is touched."""
    directory = tmp_path / "server" / "runs" / "run"
    directory.mkdir(parents=True)
    for name in ("config.json", "error.txt"):
        (directory / name).write_text("{}")
    directory.with_name("run.run").write_text("7")
    with pytest.raises(FederationError, match="does not answer"):
        runs.start(away, tmp_path / "server", config_in(directory), resume=True)
    assert directory.with_name("run.run").read_text() == "7"
    assert (directory / "error.txt").exists()


def test_lines_are_read_once(tmp_path: Path) -> None:
    """Each whole line is told once; a torn one when it is whole."""
    lines = runs._Lines(tmp_path / "lines")
    assert lines.new() == []
    for text, told in [
        ('{"a": 1}\n{"a"', [{"a": 1}]),
        ("", []),
        (': 2}\n{"a": 3}\n', [{"a": 2}, {"a": 3}]),
    ]:
        with (tmp_path / "lines").open("a") as file:
            file.write(text)
        assert lines.new() == told
