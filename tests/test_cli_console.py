"""Tests of consoles that cannot show every character, and of bytes that are no characters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import DEMO, assert_clear, run, tiny
from typer.testing import CliRunner

from fedslm.cli import app
from fedslm.data import database
from fedslm.errors import DataError
from fedslm.inference.inputs import text_of

BAD = os.fsdecode(b"caf\xe9")
PLAN = [
    "budget",
    "plan",
    "--noise-multiplier",
    "1",
    "--delta",
    "1e-5",
    "--sample-rate",
    "0.1",
    "--steps",
    "2",
]


@pytest.mark.parametrize("charset", ["ascii", "cp1252"])
def test_help_is_shown_on_every_console(charset: str) -> None:
    """The same for a page of help, which comes before any command runs."""
    result = CliRunner(charset=charset).invoke(app, ["evaluate", "--help"], env={"TERM": "dumb"})
    assert result.exit_code == 0, result.output
    assert "no \\u03b5" in result.stdout


@pytest.mark.parametrize("charset", ["ascii", "cp1252"])
def test_figures_are_shown_on_every_console(charset: str) -> None:
    """The same for what a command has found out."""
    result = CliRunner(charset=charset).invoke(app, PLAN, env={"TERM": "dumb"})
    assert result.exit_code == 0, result.output
    assert "noise 1, \\u03b5 = " in result.stdout


def test_a_process_ends_well_on_every_console() -> None:
    """What the shell sees: exit code 0, and the escaped text."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "fedslm", "evaluate", "--help"]
    done = subprocess.run(command, env=environment, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"no \\u03b5" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("predict", "runs/a", "--text", BAD),
        ("generate", "runs/a", "--prompt", BAD),
        ("simulate", DEMO, "--set", f"run.directory={BAD}"),
        ("simulate", BAD),
        ("node", "enroll", BAD, "--name", "north"),
        (BAD,),
    ],
)
def test_bytes_that_are_no_text_are_refused(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """An argument that no file of ours could hold ends with 2 and the remedy, before anything is done."""
    result = run(*arguments)
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert "\\udce9" in result.stderr
    assert "write it in UTF-8" in " ".join(result.stderr.replace("│", "").split())


def test_a_variable_that_is_no_text_counts_as_not_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment's values are held to the same."""
    monkeypatch.setenv("NOTES", BAD)
    for key, kind in (("data.source", "DataError"), ("model.base", "ModelError")):
        result = run("simulate", DEMO, *tiny(tmp_path / "run", f"{key}=$NOTES"))
        assert_clear(result, kind, f"{key}='$NOTES'", "is not set, or is not text")


@pytest.mark.parametrize("name", [database.USER, database.PASSWORD])
def test_a_login_that_is_no_text_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the environment says of a database is held to the same, and is not shown."""
    monkeypatch.setenv(name, BAD)
    arguments = ("--query", "SELECT 1", "--out", "no")
    result = run("data", "split", "postgresql+psycopg://nowhere.invalid/notes", *arguments)
    assert_clear(result, "DataError", f"{name} is not text")
    assert "caf" not in result.stderr


def test_a_run_directory_that_is_no_text_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative run directory below such a place ends with 2, before anything is trained."""
    (tmp_path / BAD).mkdir()
    monkeypatch.chdir(tmp_path / BAD)
    result = run("simulate", DEMO, *tiny(Path("run")))
    assert_clear(result, "ConfigError", "run.directory", "is not UTF-8")


def test_half_a_character_is_no_text_to_read() -> None:
    """A row of a caller's own is held to the same."""
    with pytest.raises(DataError, match="row 3: column 'text' contains a lone surrogate"):
        text_of({"text": BAD}, "text", 3)


@pytest.mark.parametrize("name", ["[/b]", "[red]x"])
def test_brackets_are_shown(name: str, tmp_path: Path) -> None:
    """A client, a label or a path with brackets is text: it neither ends in an error nor goes lost."""
    directory = tmp_path / f"data {name.replace('/', '')}"
    directory.mkdir()
    rows = [json.dumps({"text": "a fall", "label": each, "client": name}) for each in (name, "y")]
    for split in ("train", "test"):
        (directory / f"{split}.jsonl").write_text("\n".join(rows * 2))
    source = f"data.source={directory}"
    shown = run("data", "preview", DEMO, "--set", source, "--set", "federation.num_clients=1")
    assert (shown.exit_code, shown.stdout.count(name)) == (0, 2), shown.output
    lost = run("data", "preview", DEMO, "--set", f"{source}/none")
    assert f"{directory}/none" in lost.stderr


def test_a_warning_is_one_line(tmp_path: Path) -> None:
    """What goes to a log is not broken at the width of a terminal."""
    known = ("--delta", "1e-5", "--sample-rate", "1e-7", "--steps", "1", "--noise-multiplier", "1")
    result = run("budget", "plan", *known)
    assert [line.split(":")[0] for line in result.stderr.splitlines()] == ["warning"]
