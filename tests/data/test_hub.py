"""Tests of names that are looked up on the hub: none of them reaches it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fedslm.data import hub
from fedslm.data.sources import load
from fedslm.errors import DataError

DEMO = Path(__file__).parents[2] / "simulations" / "demo.toml"


@pytest.mark.parametrize(
    "source",
    ["imdb", "notes/train.jsonl", "deep/er/notes", "/notes", "./notes", "my notes/x", "a/b.csv"],
)
def test_what_cannot_be_a_name_is_a_missing_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str
) -> None:
    """A misspelt path is said to be missing at once, with where it was looked for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "load", lambda *_: pytest.fail("looked up on the hub"))
    with pytest.raises(DataError, match="no such file or directory"):
        load(source, "train")


def closed_port() -> int:
    """A port where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def simulate(directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """``fedslm simulate`` on a hub name, in a process of its own: the hub's address is read at import."""
    source = "data.source=some-owner/some-notes"
    arguments = ["--set", source, "--set", f"run.directory={directory / 'run'}"]
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "fedslm",
            "simulate",
            str(DEMO),
            *arguments,
            "--set",
            "engine.workers=0",
        ],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "HF_HOME": str(directory / "cache"), "COLUMNS": "200", **environment},
    )


def test_a_hub_that_cannot_be_reached_is_said(tmp_path: Path) -> None:
    """Without a network one request is made, nothing is tried again, and a local path is suggested."""
    done = simulate(tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{closed_port()}", HF_HUB_OFFLINE="0")
    assert done.returncode == 2, done.stderr
    assert "error: " in done.stderr
    assert "data.source='some-owner/some-notes' is not a local path" in done.stderr
    assert "the hub cannot be reached" in done.stderr
    assert "give the path of a local file" in done.stderr
    assert "Retrying" not in done.stderr
    assert len(done.stderr.splitlines()) < 10
    assert not (tmp_path / "run").exists()


def test_offline_mode_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has switched the hub off is told so."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="HF_HUB_OFFLINE is set"):
        load("some-owner/some-notes", "train")
    assert constants.HF_HUB_OFFLINE is True
