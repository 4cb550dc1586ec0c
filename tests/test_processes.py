"""Whole runs as real processes: Ctrl-C, kill -9, a full disk, and the command line's answers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import PRIVATE

from fedslm.config import Config, to_toml
from fedslm.privacy.ledger import Ledger

MakeConfig = Callable[..., Config]


def start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """Starts the command line."""
    return subprocess.Popen(
        [sys.executable, "-m", "fedslm", *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
    )


def write(config: Config, path: Path) -> Path:
    """Writes a config file."""
    path.write_text(to_toml(config), encoding="utf-8")
    return path


def wait_for_round(directory: Path, round: int, process: subprocess.Popen[str]) -> None:
    """Waits until a round is on disk."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        file = directory / "rounds.jsonl"
        if file.exists() and len(file.read_text().splitlines()) >= round:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError(f"round {round} never came")


def test_json_run_in_worker_processes(make_config: MakeConfig, tmp_path: Path) -> None:
    """Simulate --json with worker processes ends with one JSON line that says everything."""
    config = make_config(engine={"workers": 2}, privacy=PRIVATE)
    path = write(config, tmp_path / "c.toml")
    process = start("simulate", str(path), "--json", cwd=tmp_path)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    report = json.loads(out.splitlines()[-1])
    assert set(report["privacy"]) == {"site-0", "site-1", "site-2"}
    assert 0 < report["epsilon"] <= 8.0
    assert report["delta"] == 1e-5
    assert report["bytes_up"] == report["bytes_down"] > 0
    assert {"metrics_before", "metrics_after", "seconds", "directory"} <= set(report)
    assert "round 3/3" in err
    assert "Traceback" not in err


def test_ctrl_c_ends_cleanly_and_resume_gives_the_same_bits(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """SIGINT: exit 130, a hint how to go on, no orphans; the resumed adapter equals an uninterrupted one."""
    federation = {"rounds": 12}
    whole = write(
        make_config(
            engine={"workers": 2}, federation=federation, run={"directory": str(tmp_path / "w")}
        ),
        tmp_path / "w.toml",
    )
    process = start("simulate", str(whole), "--json", cwd=tmp_path)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    expected = json.loads(out.splitlines()[-1])["adapter_sha256"]
    stopped = tmp_path / "s"
    config = make_config(engine={"workers": 2}, federation=federation, run={"directory": str(stopped)})
    process = start("simulate", str(write(config, tmp_path / "s.toml")), cwd=tmp_path)
    wait_for_round(stopped, 2, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert f"--resume {stopped}" in err.replace("\n", "")
    assert "Traceback" not in err
    process = start("simulate", "--resume", str(stopped), "--json", cwd=tmp_path)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert json.loads(out.splitlines()[-1])["adapter_sha256"] == expected


def test_kill_at_any_moment_never_forgets_a_spend(make_config: MakeConfig, tmp_path: Path) -> None:
    """Kill -9 three times: every release in a checkpoint was charged before, and the run ends well."""
    directory = tmp_path / "run"
    config = make_config(
        privacy={**PRIVATE, "epsilon": 20.0, "noise_multiplier": 2.0},
        federation={"rounds": 6},
        engine={"workers": 2},
    )
    path = write(config, tmp_path / "c.toml")
    charged = 0
    for kill, number in enumerate((1, 2, 4)):
        arguments = ("simulate", str(path)) if kill == 0 else ("simulate", "--resume", str(directory))
        process = start(*arguments, cwd=tmp_path)
        wait_for_round(directory, number, process)
        time.sleep(0.05 * kill)
        process.kill()
        process.communicate(timeout=60)
        events = Ledger(directory / "ledger" / "client-00000.jsonl").events()
        done = len((directory / "rounds.jsonl").read_text().splitlines())
        assert len(events) >= max(done, charged)
        charged = len(events)
    process = start("simulate", "--resume", str(directory), "--json", cwd=tmp_path)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    report = json.loads(out.splitlines()[-1])
    assert report["rounds"] == 6
    assert report["epsilon"] <= 20.0
    spent = report["privacy"]["site-0"]["steps"]
    assert spent == sum(e.steps for e in Ledger(directory / "ledger" / "client-00000.jsonl").events())
    assert spent >= 12


def test_full_disk_at_a_checkpoint_loses_nothing(make_config: MakeConfig, tmp_path: Path) -> None:
    """Where files may not grow the run stops with a clear error; with room again it resumes and ends."""
    directory = tmp_path / "run"
    config = make_config(federation={"rounds": 4}, task={"max_length": 16})
    path = write(config, tmp_path / "c.toml")
    process = start("simulate", str(path), "--json", cwd=tmp_path)
    wait_for_round(directory, 1, process)
    process.kill()
    process.communicate(timeout=60)
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900))\n"
        "from fedslm.cli import app\n"
        f"sys.argv = ['fedslm', 'simulate', '--resume', {str(directory)!r}]\n"
        "app()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert "RunError" in done.stderr
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    process = start("simulate", "--resume", str(directory), "--json", cwd=tmp_path)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert json.loads(out.splitlines()[-1])["rounds"] == 4


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"source": "/no/such/data"}}, "no such file or directory"),
        ({"data": {"label_column": "diagnosis"}}, "data.label_column='diagnosis' is not a column"),
        ({"task": {"labels": ["heart", "skin"]}}, "labels that are not in task.labels"),
        ({"model": {"base": "/no/such/model"}}, "no such directory"),
        ({"lora": {"target_modules": ["nothing"]}}, "matches no layer"),
        ({"training": {"batch_size": 64}}, "fewer records than training.batch_size=64"),
        ({"federation": {"num_clients": 4}}, "names 3 clients, fewer than"),
    ],
    ids=["data", "column", "label", "model", "target", "batch", "clients"],
)
def test_bad_input_is_a_clear_error(
    make_config: MakeConfig, tmp_path: Path, sections: dict[str, dict[str, object]], message: str
) -> None:
    """Each kind of bad input ends the command with 1 and one clear message, without a traceback."""
    path = write(make_config(**sections), tmp_path / "c.toml")
    process = start("simulate", str(path), cwd=tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert message in err
    assert "Traceback" not in err
