"""The command line in this process, and what a clear error looks like."""

from __future__ import annotations

from pathlib import Path

from click.testing import Result
from typer.testing import CliRunner

from fedslm import errors
from fedslm.cli import app
from fedslm.cli.console import code_of

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "simulations" / "demo.toml")
TINY = [
    "run.directory={run}",
    "engine.workers=0",
    "privacy.unit=none",
    "lora.rank=1",
    "training.local_steps=1",
    "training.batch_size=2",
    "federation.rounds=1",
]


def run(*arguments: str) -> Result:
    """Runs the command line in this process."""
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "TERM": "dumb"})


def tiny(run_directory: Path, *more: str) -> list[str]:
    """Overrides for a run that is over in no time."""
    values = [value.format(run=run_directory) for value in TINY]
    return [part for value in (*values, *more) for part in ("--set", value)]


def assert_clear(result: Result, kind: str, *parts: str) -> None:
    """An error of ours: its exit code, and its text on standard error; neither class name nor traceback."""
    assert isinstance(result.exception, SystemExit)
    assert result.exit_code == code_of(getattr(errors, kind))
    assert result.stdout == ""
    assert "error: " in result.stderr
    assert kind not in result.stderr
    assert "Traceback" not in result.output
    for part in parts:
        assert part in result.stderr
