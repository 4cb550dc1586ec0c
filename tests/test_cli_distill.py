"""Tests of ``fedslm distill`` as people call it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.pairs import public, student
from typer.testing import CliRunner

from fedslm.cli import app

FEW = ["--steps", "4", "--device", "cpu", "--set", "distill.rank=2", "--set", "distill.batch_size=4"]


@pytest.fixture(scope="module")
def call(
    finished_run: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[int, str, str]]:
    """Calls ``fedslm distill`` on a tiny finished run."""
    root = tmp_path_factory.mktemp("cli-distill")
    given = ["--student", str(student(root, "causal-lm")), "--data", str(public(root)), *FEW]

    def run(*arguments: str) -> tuple[int, str, str]:
        path = str(finished_run("causal-lm"))
        done = CliRunner().invoke(app, ["distill", path, *given, *arguments])
        return done.exit_code, done.stdout, done.stderr

    return run


def test_it_teaches_and_says_where_to_look(
    call: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    """Figures, the privacy that was inherited, the directory; with --json one line."""
    code, said, _ = call("--out", str(tmp_path / "one"))
    assert code == 0
    assert f"report: {tmp_path / 'one'}/distill.md" in said
    assert "student after" in said
    code, said, _ = call("--out", str(tmp_path / "two"), "--json")
    values = json.loads(said)
    assert code == 0
    assert values["method"] == "proxy-target"
    assert values["privacy"]["epsilon"] == "infinite"


def test_a_proof_is_told(call: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """Each control with its interval, and what follows."""
    code, said, _ = call("--out", str(tmp_path / "out"), "--prove", "--resamples", "1000")
    assert code == 0
    assert said.count("gain over ") >= 4
    assert "proof of transfer:" in said


def test_a_dry_run_estimates_and_writes_nothing(
    call: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    """Memory, time and method; all checks are made."""
    code, said, _ = call("--dry-run", "--out", str(tmp_path / "out"))
    assert code == 0
    assert "GB on cpu" in said
    assert "for 4 steps" in said
    assert not (tmp_path / "out").exists()
    code, said, _ = call("--dry-run", "--json")
    assert json.loads(said)["total_bytes"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "distill.alfa=2"], "did you mean 'alpha'?"),
        (["--set", "lora.rank=2"], "only keys of [distill] can be set"),
        (["--method", "magic"], "--method: value"),
        (["--probe", "x"], "are for --prove"),
        (["--student", "/nowhere/at/all"], "no such directory"),
        (["--prove", "--resamples", "3"], "--resamples: value 3 must be at least 1000"),
        (["--prove", "--seeds", "0"], "--seeds: value 0 must be at least 1"),
        (["--prove", "--dry-run", "--test", "/no.jsonl"], "--test='/no.jsonl': no such file"),
    ],
)
def test_bad_options_are_named(
    arguments: list[str], message: str, call: Callable[..., tuple[int, str, str]]
) -> None:
    """Exit status 2, and what is wrong."""
    code, said, complained = call(*arguments)
    assert code == 2
    assert message in " ".join((said + complained).split())
