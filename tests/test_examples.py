"""examples/: each script runs as a user starts it, and the notebook's cells run in order."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def environment(programs: Path | None = None) -> dict[str, str]:
    """This environment, with fedslm importable from anywhere, and programs found first."""
    own = dict(os.environ, PYTHONPATH=str(ROOT))
    path = [str(programs)] if programs else []
    return own | {"PATH": os.pathsep.join([*path, own["PATH"], "/usr/sbin"])}


def started(*command: str | Path, cwd: Path, programs: Path | None = None) -> str:
    """What a command prints; an error of it fails the test with what it said."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment(programs),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_researcher(tmp_path: Path) -> None:
    """Each epsilon is kept, and its accuracy printed."""
    script = EXAMPLES / "researcher.py"
    small = ("--rounds", "1", "--records", "40", "--epsilons", "2", "8")
    lines = started(sys.executable, script, *small, cwd=tmp_path).splitlines()
    found = [[float(cell) for cell in line.split()] for line in lines[1:3]]
    assert [row[0] for row in found] == [2, 8]
    assert all(0 < spent <= epsilon for epsilon, spent, _, _ in found)
    assert (tmp_path / "runs" / "researcher" / "epsilon-2" / "report.md").exists()


@pytest.mark.slow
def test_the_auditor(tmp_path: Path) -> None:
    """The honest ledger has no findings; both forgeries are found out."""
    lines = started(sys.executable, EXAMPLES / "auditor.py", "--rounds", "1", cwd=tmp_path).splitlines()
    assert lines[0] == "honest: no findings"
    assert "'epsilon':" in lines[1]
    assert [line.partition(":")[0] for line in lines[2:]] == ["shortened", "rewritten"]
    assert not any("not found out" in line for line in lines)


@pytest.mark.slow
@pytest.mark.federation
def test_the_engineer(tmp_path: Path) -> None:
    """A server and three nodes finish a run, and a node's ledger is sound."""
    if shutil.which("nginx", path=environment()["PATH"]) is None:
        pytest.skip("nginx is not installed; on Debian: apt-get install nginx-light")
    (program := tmp_path / "programs" / "fedslm").parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m fedslm "$@"\n')
    program.chmod(0o755)
    script = EXAMPLES / "engineer.sh"
    printed = started("bash", script, tmp_path / "run", "1", cwd=tmp_path, programs=program.parent)
    assert "sound" in printed


def cells(name: str) -> list[dict[str, Any]]:
    """A notebook's cells of code."""
    notebook = json.loads((EXAMPLES / name).read_text())
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def executed(name: str) -> dict[str, Any]:
    """The names that a notebook's cells leave, with one round in place of four."""
    names: dict[str, Any] = {}
    for cell in cells(name):
        exec(compile("".join(cell["source"]), name, "exec"), names)  # noqa: S102  (our own page)
        if "SETTINGS" in names and "run" not in names:
            names["SETTINGS"]["federation.rounds"] = 1
    return names


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_is_clean(path: Path) -> None:
    """Nobody's outputs are in it."""
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells(path.name))


@pytest.mark.slow
def test_the_first_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells run in one namespace."""
    monkeypatch.chdir(tmp_path)
    names = executed("first_run.ipynb")
    assert names["run"].rounds == 1
    assert names["audit"]["findings"] == []


@pytest.mark.slow
def test_own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CSV becomes a model for patients: trained, compared, audited and exported, and no copy stays."""
    monkeypatch.chdir(tmp_path)
    names = executed("own_data.ipynb")
    run = names["run"]
    assert 0 < run.epsilon <= 8
    assert run.report["plan"]["unit"] == "user"
    assert set(names["accuracy"]) == {"base", "tuned", "difference"}
    assert names["audit"]["findings"] == []
    assert (tmp_path / "own-model" / "adapter_config.json").exists()
    assert not (run.directory / "data").exists()
    assert run.predict("palpitations")[0]["label"] in names["WORDS"]
