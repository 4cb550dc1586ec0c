"""docs/tutorial.md: its commands and its Python run in the order of the page."""

from __future__ import annotations

import csv
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "tutorial.md").read_text()
SMALL = ["--set", "federation.rounds=1", "--set", "data.max_evaluation_records=60"]
DATA = "generate(np.random.default_rng(7))"


def blocks() -> list[tuple[str, str]]:
    """(language, code) of what runs; step 3 needs nginx, and examples/engineer.sh is tested for it."""
    return re.findall(r"```(sh|python)\n(.*?)```", TEXT, re.DOTALL)


def run_shell(block: str, cwd: Path) -> None:
    """Runs the fedslm commands of a block; simulations are small."""
    for line in block.replace("\\\n", " ").splitlines():
        program, *arguments = shlex.split(line)
        assert program == "fedslm"
        command, _, target = " ".join(arguments).partition(" > ")
        words = shlex.split(command) if target else arguments
        words += SMALL if words[0] == "simulate" else []
        done = subprocess.run(
            [sys.executable, "-m", "fedslm", *words],
            cwd=cwd,
            env=dict(os.environ, PYTHONPATH=str(ROOT)),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, line + done.stdout + done.stderr
        if target:
            (cwd / target).write_text(done.stdout)


def test_the_stand_in_is_as_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files have the records and the people that the page's output counts."""
    monkeypatch.chdir(tmp_path)
    code = next(code for kind, code in blocks() if kind == "python")
    exec(compile(code, "tutorial.md", "exec"), {})  # noqa: S102  (our own page)
    with open("notes.csv", encoding="utf-8", newline="") as file:
        notes = list(csv.DictReader(file))
    people = len({row["patient"] for row in notes})
    assert f"notes.csv: {len(notes)} records" in TEXT
    assert f"people: {people} different values of patient" in TEXT
    with open("public.csv", encoding="utf-8", newline="") as file:
        assert next(csv.reader(file)) == ["text", "label"]


@pytest.mark.slow
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 1, 2 and 4, with fewer notes and rounds; the audits at the end find nothing."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    assert any(DATA in code for _, code in blocks())
    for kind, code in blocks():
        if kind == "sh":
            run_shell(code, tmp_path)
        else:
            small = code.replace(DATA, f"{DATA[:-1]}, records_per_hospital=40, num_evaluation=60)")
            exec(compile(small, "tutorial.md", "exec"), names)  # noqa: S102  (our own page)
    assert names["run"].rounds == 1
    assert 0 < names["run"].epsilon <= 3
    assert (tmp_path / "runs" / "demo-patients" / "audit.html").exists()
