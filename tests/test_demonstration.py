"""Tests of what the demonstration shows of a finished run."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from typer.testing import CliRunner

from fedslm.cli import app
from fedslm.demonstration import EXAMPLE, _print_answer

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "cli.md")


def test_a_model_of_the_demonstration_is_asked(finished_run: Callable[[str], Path]) -> None:
    """What a run's model says of the example is printed, with the command that says the same."""
    run, out = finished_run("classification"), io.StringIO()
    _print_answer(Console(file=out, width=200), run)
    command, answer = out.getvalue().splitlines()[-2:]
    assert command.strip() == f'fedslm predict {run} --text "{EXAMPLE}"'
    label, share = answer.split()
    assert label in ("heart", "bone")
    assert 0.5 <= float(share.strip("()")) <= 1
    asked = CliRunner().invoke(app, ["predict", str(run), "--text", EXAMPLE], env={"COLUMNS": "200"})
    assert f"{label} ({label} {share.strip('()')}" in asked.stdout


def test_the_same_example_everywhere() -> None:
    """README, docs/cli.md and help ask what the demonstration asks, since other texts may be answered wrongly."""
    for page in PAGES:
        assert f'runs/demo/epsilon-8 --text "{EXAMPLE}"' in page.read_text(encoding="utf-8")
    helped = CliRunner().invoke(app, ["predict", "--help"], env={"COLUMNS": "300"})
    assert EXAMPLE in " ".join(helped.stdout.split())
