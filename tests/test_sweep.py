"""A config at several values: every run is real, kept, and counted in one figure."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from support.commands import run

from fedslm import simulation
from fedslm.privacy import accounting
from fedslm.records import Event
from fedslm.sweep import _events, _together
from fedslm.workers import Pool

TINY = """
[model]
base = "demo"
device = "cpu"
[data]
source = "{notes}"
partition = "natural"
[task]
name = "classification"
max_length = 24
[privacy]
unit = "record"
epsilon = 8.0
[federation]
num_clients = 3
rounds = 1
[engine]
workers = 0
"""


@pytest.fixture
def config(notes: Path, tmp_path: Path) -> Path:
    """A config that a recipe completes."""
    path = tmp_path / "tiny.toml"
    path.write_text(TINY.format(notes=notes))
    return path


def test_it_runs_keeps_and_adds_up(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two values, two seeds: a table, a curve, ε of all four runs, which share their workers.

    A second call runs nothing, and starts no worker.
    """
    started: list[Pool] = []
    real = simulation.workers_for
    monkeypatch.setattr(simulation, "workers_for", lambda *a: started.append(real(*a)) or started[-1])
    place = tmp_path / "sweep"
    call = [
        "sweep",
        str(config),
        "--over",
        "privacy.epsilon=2,8",
        "--seeds",
        "2",
        "--directory",
        str(place),
    ]
    first = run(*call)
    assert first.exit_code == 0, first.output
    found = json.loads((place / "sweep.json").read_text())
    assert [point["value"] for point in found["points"]] == ["2", "8"]
    assert [len(point["scores"]) for point in found["points"]] == [2, 2]
    assert found["points"][0]["epsilon"] <= 2 < found["points"][1]["epsilon"] <= 8
    reports = [json.loads(file.read_text()) for file in place.glob("*/report.json")]
    assert len(reports) == 4
    plans = [report["plan"] for report in reports]
    events = [Event(plan["sample_rate"], plan["noise_multiplier"], plan["rounds"]) for plan in plans]
    assert math.isclose(found["together"], accounting.epsilon(events, found["delta"]), rel_tol=1e-9)
    assert found["together"] > found["points"][1]["epsilon"]
    assert "all 4 runs together cost" in first.stdout
    assert (place / "sweep.png").stat().st_size > 1000
    assert "| 8 |" in (place / "sweep.md").read_text()
    finished = {report["run_id"]: report["finished_at"] for report in reports}
    assert run(*call, "--json").exit_code == 0
    again = [json.loads(file.read_text()) for file in place.glob("*/report.json")]
    assert {report["run_id"]: report["finished_at"] for report in again} == finished
    assert len(started) == 1


@pytest.mark.parametrize(
    ("over", "told"),
    [
        ("privacy.epsilon", "KEY=A,B"),
        ("epsilon=1,2", "KEY=A,B"),
        ("privacy.epsilon=2,2", "each value once"),
        ("privacy.epsilon=2,zero", "privacy.epsilon"),
        ("lora.rnak=1,2", "lora.rnak"),
        ("run.seed=0,1", "names a run"),
        ("privacy.epsilon=8,-1", "privacy.epsilon"),
    ],
)
def test_nothing_starts_before_all_is_valid(config: Path, tmp_path: Path, over: str, told: str) -> None:
    """A wrong key or value is refused before the first run."""
    place = tmp_path / "sweep"
    result = run("sweep", str(config), "--over", over, "--directory", str(place))
    assert result.exit_code == 2
    assert told in result.output
    assert not place.exists()


def test_metrics_and_shared_units_cost_too() -> None:
    """A released metric and units at several clients are in the figure of all runs together."""
    plan = {
        "sample_rate": 1.0,
        "noise_multiplier": 5.0,
        "steps_per_round": 1,
        "rounds": 4,
        "metric_noise_multiplier": None,
    }
    report = {"plan": plan, "overlapping": False, "clients": ["a", "b"]}
    assert list(_events([report, {"plan": None}])) == [Event(1.0, 5.0, 4)]
    more = {**report, "overlapping": True, "plan": {**plan, "metric_noise_multiplier": 7.0}}
    assert list(_events([more])) == [Event(1.0, 5.0, 8), Event(1.0, 7.0, 8)]


def test_there_is_no_common_figure_of_different_promises() -> None:
    """With a run without privacy it is infinite; with different units there is none."""
    plan = {
        "unit": "record",
        "sample_rate": 1.0,
        "noise_multiplier": 5.0,
        "steps_per_round": 1,
        "rounds": 4,
        "metric_noise_multiplier": None,
    }
    record = {"plan": plan, "overlapping": False, "clients": ["a"], "delta": 1e-5}
    user = {**record, "plan": {**plan, "unit": "user", "unit_column": "who"}}
    none = {"plan": None, "delta": None}
    assert _together([none, none]) == (None, None)
    assert _together([record, none]) == ("infinite", 1e-5)
    assert _together([record, user]) == (None, 1e-5)
