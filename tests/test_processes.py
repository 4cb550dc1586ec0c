"""Whole runs as real processes: Ctrl-C, kill -9, a full disk, and the command line's answers."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.served import StopAfter
from support.tiny import PRIVATE
from typer.testing import CliRunner

from fedslm import simulation
from fedslm.cli import app
from fedslm.config import Config, to_toml
from fedslm.federation.checkpoint import RunDirectory
from fedslm.privacy.accounting import epsilon
from fedslm.privacy.chain import Chain, check_head, read_chain, read_head
from fedslm.privacy.keys import PUBLIC_KEY, read_public_key

MakeConfig = Callable[..., Config]
PATIENCE = 600.0  # seconds; whatever succeeds ends the wait


def start(*arguments: str, cwd: Path, **options: Any) -> subprocess.Popen[str]:
    """Starts the command line."""
    return subprocess.Popen(
        [sys.executable, "-m", "fedslm", *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        preexec_fn=_hear_interrupts,
        **options,
    )


def _hear_interrupts() -> None:
    """A test run that was started in the background hands "ignore Ctrl-C" down; a user's shell does not."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def write(config: Config, path: Path) -> Path:
    """Writes a config file."""
    path.write_text(to_toml(config), encoding="utf-8")
    return path


def simulate(*arguments: str) -> dict[str, Any]:
    """What ``simulate --json`` reports, run in this process: a new one would import all libraries again."""
    result = CliRunner().invoke(app, ["simulate", *arguments, "--json"])
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return report


def wait_for_round(directory: Path, round: int, process: subprocess.Popen[str]) -> None:
    """Waits until a round is on disk."""
    deadline = time.monotonic() + PATIENCE
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
    out, err = process.communicate(timeout=PATIENCE)
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
    stopped, federation = tmp_path / "s", {"rounds": 12}
    config = make_config(engine={"workers": 2}, federation=federation, run={"directory": str(stopped)})
    process = start("simulate", str(write(config, tmp_path / "s.toml")), cwd=tmp_path)
    wait_for_round(stopped, 2, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, err
    assert f"--resume {stopped}" in err.replace("\n", "")
    assert "Traceback" not in err
    resumed = simulate("--resume", str(stopped))
    whole = make_config(federation=federation, run={"directory": str(tmp_path / "w")})
    expected = simulate(str(write(whole, tmp_path / "w.toml")))  # without worker processes
    assert resumed["adapter_sha256"] == expected["adapter_sha256"]


def nodes_of(directory: Path) -> dict[int, Path]:
    """The directories of the nodes that have a ledger, by client."""
    return {int(p.parent.name[7:]): p.parent for p in directory.glob("nodes/client-*/ledger.jsonl")}


def chain_of(node: Path) -> Chain:
    """A node's ledger, as an auditor reads it: with the public key alone."""
    return read_chain(node / "ledger.jsonl", read_public_key(node / PUBLIC_KEY))


def releases(directory: Path) -> dict[int, set[str]]:
    """Distinct releases that the server has statements for, by client."""
    path = directory / "config.json"
    if not path.exists():
        return {}
    found: dict[int, set[str]] = {}
    for client, statement in RunDirectory.open(directory)[0].statements():
        found.setdefault(client, set()).add(statement.release_sha256)
    return found


def audit(directory: Path) -> tuple[int, int, int]:
    """Checks all ledgers of a run that was killed; gives charges, releases and torn last lines."""
    charged = torn = 0
    chains = {client: chain_of(node) for client, node in nodes_of(directory).items()}
    released = releases(directory)
    for client, hashes in released.items():
        assert len(chains[client].charges) >= len(hashes)
        committed = {entry.release_sha256 for entry in chains[client].entries}
        assert hashes <= committed, "a release that no charge paid for"
    for client, chain in chains.items():
        charged, torn = charged + len(chain.charges), torn + chain.torn
        path = nodes_of(directory)[client] / "ledger.jsonl"
        head = read_head(path.with_name("ledger.jsonl.head"))
        if head is not None and head[0] >= 0:
            check_head(path, chain, *head)
    if released:
        for client, statement in RunDirectory.open(directory)[0].statements():
            path = nodes_of(directory)[client] / "ledger.jsonl"
            check_head(path, chains[client], statement.index, statement.head_sha256)
    return charged, sum(map(len, released.values())), torn


def size_of_ledgers(directory: Path) -> int:
    """Bytes of all ledgers: grows with every charge and commit."""
    return sum(path.stat().st_size for path in directory.glob("nodes/*/ledger.jsonl"))


def kill_group(process: subprocess.Popen[str]) -> None:
    """Kill -9 of a command and all its workers, and waits until none is left."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=PATIENCE)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and _alive(process.pid):
        time.sleep(0.01)
    assert not _alive(process.pid)


def _alive(group: int) -> bool:
    """True if a process of the group still runs (a zombie does not)."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, of_group = path.read_text().rpartition(")")[2].split()[:3]
            if int(of_group) == group and state != "Z":
                return True
    return False


def kill_at_random(
    process: subprocess.Popen[str], directory: Path, generator: random.Random, *, early: bool
) -> bool:
    """Kills a run at a random moment: while it starts, or soon after it has charged something.

    Returns:
        False if the run was over before.
    """
    before, deadline = size_of_ledgers(directory), time.monotonic() + PATIENCE
    if early:
        deadline = time.monotonic() + generator.uniform(0.0, 8.0)
    while time.monotonic() < deadline and size_of_ledgers(directory) == before:
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    if not early:
        time.sleep(generator.uniform(0.0, 0.6))
    if process.poll() is not None:
        return False
    kill_group(process)
    return True


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kill_at_any_moment_never_forgets_a_spend(make_config: MakeConfig, tmp_path: Path) -> None:
    """Kill -9 twenty times at random: every release that the server knows was charged, and the run ends."""
    directory, generator = tmp_path / "run", random.Random(20)
    config = make_config(
        privacy={**PRIVATE, "sample_rate": 0.05, "spare_rounds": 60},
        federation={"rounds": 60},
        training={"local_steps": 1},
        engine={"workers": 2},
    )
    path = write(config, tmp_path / "c.toml")
    kills = torn = charged = released = 0
    began = time.monotonic()
    while kills < 20:
        resumed = (directory / "config.json").exists()
        arguments = ("--resume", str(directory)) if resumed else (str(path),)
        process = start("simulate", *arguments, cwd=tmp_path, start_new_session=True)
        if not kill_at_random(process, directory, generator, early=kills % 7 == 3):
            out, err = process.communicate(timeout=PATIENCE)
            assert process.returncode == 0, err
            break
        kills += 1
        now = audit(directory)
        assert now[0] >= charged
        assert now[1] >= released
        charged, released, torn = now[0], now[1], torn + now[2]
        print(f"kill {kills}: {charged} charged, {released} released, {torn} torn")
    assert kills >= 20
    process = start("simulate", "--resume", str(directory), "--json", cwd=tmp_path)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    report = json.loads(out.splitlines()[-1])
    charged, released, _ = audit(directory)
    assert (report["rounds"], report["stopped"]) == (60, "")
    events = [chain_of(node).events for node in nodes_of(directory).values()]
    assert report["epsilon"] == pytest.approx(max(epsilon(each, 1e-5) for each in events))
    assert 0 < report["epsilon"] <= 8.0
    assert sum(spent["steps"] for spent in report["privacy"].values()) == charged
    print(
        f"{kills} kills in {time.monotonic() - began:.0f} s: {charged} rounds charged, {released} "
        f"released, {torn} torn last lines, epsilon {report['epsilon']:.3f}"
    )


def test_full_disk_at_a_checkpoint_loses_nothing(make_config: MakeConfig, tmp_path: Path) -> None:
    """Where files may not grow the run stops with a clear error; with room again it resumes and ends."""
    directory = tmp_path / "run"
    config = make_config(federation={"rounds": 4}, task={"max_length": 16})
    with pytest.raises(KeyboardInterrupt):
        simulation.simulate(config, [StopAfter(1)])
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900))\n"
        "from fedslm.cli import app\n"
        f"sys.argv = ['fedslm', 'simulate', '--resume', {str(directory)!r}]\n"
        "app()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 1
    assert "error: " in done.stderr
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert simulate("--resume", str(directory))["rounds"] == 4


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
    """Each kind of bad input ends the command with 2 and one clear message, without a traceback."""
    path = write(make_config(**sections), tmp_path / "c.toml")
    result = CliRunner().invoke(app, ["simulate", str(path)], env={"COLUMNS": "200"})
    assert isinstance(result.exception, SystemExit)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_bad_input_ends_a_process_with_2(make_config: MakeConfig, tmp_path: Path) -> None:
    """What the shell sees of it: status 2, one message on standard error, no traceback."""
    config = make_config(data={"source": "/no/such/data"})
    process = start("simulate", str(write(config, tmp_path / "c.toml")), cwd=tmp_path)
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (2, "")
    assert "no such file or directory" in err
    assert "Traceback" not in err
