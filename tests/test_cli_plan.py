"""``fedslm simulate --plan``: what will run where, without starting it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedslm.cli import app, model, plan
from fedslm.config import from_toml
from fedslm.engines import placement

CONFIG = """
[run]
name = "planned"
directory = "{directory}"
[model]
base = "demo"
device = "cpu"
[lora]
target_modules = ["3.output.dense"]
[data]
source = "demo"
[task]
name = "classification"
max_length = 32
[training]
local_steps = 5
batch_size = 4
[privacy]
unit = "{unit}"
{private}
[federation]
num_clients = 10
clients_per_round = 3
rounds = 7
[engine]
workers = 2
"""
PRIVATE = "epsilon = 8.0\ndelta = 1e-5\nclip_norm = 1.0\nsample_rate = 0.05\n"
RECORDS = 7 * 3 * 5 * 4


def planned(tmp_path: Path, *options: str, private: bool = False) -> str:
    """The output of the command."""
    text = CONFIG.format(
        directory=tmp_path / "run",
        unit="record" if private else "none",
        private=PRIVATE if private else "",
    )
    (tmp_path / "config.toml").write_text(text)
    done = CliRunner().invoke(app, ["simulate", str(tmp_path / "config.toml"), "--plan", *options])
    assert done.exit_code == 0, done.output
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"], "something was started"
    return done.stdout


def values(tmp_path: Path, *options: str, private: bool = False) -> dict[str, Any]:
    """The plan as JSON."""
    found: dict[str, Any] = json.loads(planned(tmp_path, "--json", *options, private=private))
    return found


def test_people_see_workers_memory_disk_and_time(tmp_path: Path) -> None:
    """One line for each, and nothing is started."""
    text = planned(tmp_path)
    for name in ("engine", "devices", "memory", "disk", "training", "time"):
        assert f"\n {name} " in f"\n{text}"
    assert "2 workers, 1 thread each (engine.workers=2)" in text
    assert "Nothing was started." in text


def test_figures_follow_from_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records by rounds, clients, steps and batch; the time by the pass that was timed, and by cores."""
    monkeypatch.setattr(placement, "cores", lambda: 2)
    plain, private = values(tmp_path), values(tmp_path, private=True)
    assert plain["records"] == private["records"] == RECORDS
    assert plain["memory_bytes"] == 2 * plain["worker_bytes"]
    assert plain["seconds"] == pytest.approx(plain["seconds_per_record"] * RECORDS / 2)
    assert private["disk_bytes"] > plain["disk_bytes"] > 0
    monkeypatch.setattr(placement, "cores", lambda: 8)
    four = values(tmp_path, "--set", "engine.workers=4")
    assert four["seconds"] == pytest.approx(four["seconds_per_record"] * RECORDS / 3)
    assert "engine.workers=4, and a round asks 3 clients" in four["warnings"]
    monkeypatch.setattr(placement, "cores", lambda: 1)
    one = values(tmp_path)
    assert one["seconds"] == pytest.approx(one["seconds_per_record"] * RECORDS)
    assert "the workers have 2 threads for 1 core" in one["warnings"]


@pytest.mark.parametrize("kept", [0.0, 0.75])
def test_the_estimate_follows_from_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: float
) -> None:
    """Records by steps, rounds, clients and sample rate; layers that are kept count once for a record."""
    monkeypatch.setattr(placement, "cores", lambda: 2)
    monkeypatch.setattr(model, "time_of_a_record", lambda _: (10.0, kept))
    for private, passed in ((False, RECORDS), (True, 7 * 3 * 5 * 0.05 * 400 / 10)):
        text = CONFIG.format(
            directory=tmp_path / "run",
            unit="record" if private else "none",
            private=PRIVATE if private else "",
        )
        (tmp_path / "config.toml").write_text(text)
        config = from_toml(tmp_path / "config.toml")
        expected = 10.0 * (1.15 if private else 1) * passed * (1 - kept)
        expected += 10.0 * (1.15 if private else 1) * kept * min(400, passed)
        assert f"about {plan._shown(expected / 2)} of training" in plan.estimate(config, 400)


def test_where_only_a_head_is_trained_all_layers_are_computed_once(tmp_path: Path) -> None:
    """The share of the time that is not repeated in later rounds: all of it, or less with LoRA."""
    text = CONFIG.format(directory=tmp_path / "run", unit="none", private="")
    (tmp_path / "config.toml").write_text(text)
    config = from_toml(tmp_path / "config.toml")
    head = config.model_copy(
        update={"aggregation": config.aggregation.model_copy(update={"method": "head"})}
    )
    assert model.time_of_a_record(head.resolved())[1] == 1.0
    assert model.time_of_a_record(config.resolved())[1] < 1.0


def test_data_on_this_machine_count_on_disk(tmp_path: Path) -> None:
    """A run keeps a copy of its records."""
    source = tmp_path / "data"
    source.mkdir()
    rows = [json.dumps({"text": "word " * 100, "label": "ab"[n % 2]}) + "\n" for n in range(2000)]
    for split in ("train", "test"):
        (source / f"{split}.jsonl").write_text("".join(rows))
    size = sum(path.stat().st_size for path in source.iterdir())
    text = CONFIG.format(directory=tmp_path / "run", unit="none", private="")
    (tmp_path / "config.toml").write_text(text.replace('source = "demo"', f'source = "{source}"'))
    done = CliRunner().invoke(app, ["simulate", str(tmp_path / "config.toml"), "--plan", "--json"])
    assert json.loads(done.stdout)["disk_bytes"] >= size


def test_too_little_memory_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says how much is needed, and what to lower."""
    monkeypatch.setattr(placement, "free_bytes", lambda: 100_000_000)
    text = " ".join(planned(tmp_path).split())
    assert "of memory are needed and 100.0 MB are free; lower engine.workers" in text


def test_a_plan_is_of_a_new_run(tmp_path: Path) -> None:
    """Neither of a run that is resumed, nor of nothing."""
    for arguments in (["simulate", "--plan", "--resume", str(tmp_path)], ["simulate", "--plan"]):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 2


def test_a_directory_that_is_taken_is_a_warning(tmp_path: Path) -> None:
    """The run itself would refuse it."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").touch()
    text = CONFIG.format(directory=tmp_path / "run", unit="none", private="")
    (tmp_path / "config.toml").write_text(text)
    done = CliRunner().invoke(app, ["simulate", str(tmp_path / "config.toml"), "--plan", "--json"])
    assert any("exists: set another run.name" in each for each in json.loads(done.stdout)["warnings"])
