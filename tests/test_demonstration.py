"""Tests of what the demonstration shows of a finished run."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from typer.testing import CliRunner

from fedslm.cli import app
from fedslm.demonstration import ARMS, EXAMPLE, _print_answer, _table

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


def test_the_table_fits_a_terminal_of_80_columns() -> None:
    """Every run's name, unit and figure is whole: the names are those of directories."""
    figures = {"metrics_before": {"accuracy": 0.152}, "metrics_after": {"accuracy": 0.888}}
    plans = {
        arm: None if privacy["unit"] == "none" else {"unit_column": None, **privacy}
        for arm, privacy in ARMS.items()
    }
    reports: list[dict[str, Any]] = [
        {
            "name": arm,
            **figures,
            "privacy": {} if plan is None else {"0": {"epsilon": 7.97}},
            "plan": plan,
            "delta": None if plan is None else 1e-5,
            "seconds": 101.0,
        }
        for arm, plan in plans.items()
    ]
    out = io.StringIO()
    Console(file=out, width=80).print(_table(reports))
    rows = [line for line in out.getvalue().splitlines() if any(arm in line for arm in ARMS)]
    assert len(rows) == len(ARMS)
    assert "…" not in out.getvalue()
    patient = next(row for row in rows if "epsilon-8-patient" in row)
    for part in ("0.152", "0.888", "7.97", " patient ", "1e-05", "101 s"):
        assert part in patient
