"""Patients on real text: a speaker is a patient, treated in one of four hospitals."""

from __future__ import annotations

import gzip
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedslm import config as configuration
from fedslm import simulation
from fedslm.config import Config
from fedslm.models.initial import initial_state
from fedslm.models.loaded import LoadedModel, load
from fedslm.privacy.chain import read_chain
from fedslm.privacy.keys import PUBLIC_KEY, read_public_key
from fedslm.privacy.plan import UserPlan
from fedslm.progress import Bar
from fedslm.records import AdapterState
from fedslm.tasks import build
from fedslm.tasks.base import Task
from fedslm.training.batches import Unit
from fedslm.training.local import enter_training
from fedslm.training.steps import PrivateStep, stepping

pytestmark = pytest.mark.real
HOSPITALS, PATIENTS, CAP = 4, 240, 4


@pytest.fixture(scope="module")
def admitted(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The speakers with most speeches, dealt out to four hospitals; the public split as it is."""
    source = assets / "data" / "shakespeare_speakers"
    directory = tmp_path_factory.mktemp("hospitals")
    with gzip.open(source / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    chosen = [name for name, _ in Counter(row["client"] for row in rows).most_common(PATIENTS)]
    home = {name: f"hospital {index % HOSPITALS}" for index, name in enumerate(chosen)}
    admitted = [{**row, "hospital": home[row["client"]]} for row in rows if row["client"] in home]
    lines = "".join(json.dumps(row) + "\n" for row in admitted)
    (directory / "train.jsonl").write_text(lines, encoding="utf-8")
    (directory / "test.jsonl.gz").write_bytes((source / "test.jsonl.gz").read_bytes())
    return directory


def make_config(assets: Path, source: Path, directory: Path, **changes: dict[str, Any]) -> Config:
    """Patient-level epsilon = 8 on the real model."""
    values: dict[str, dict[str, Any]] = {
        "run": {"name": "patients", "directory": str(directory)},
        "model": {"base": str(assets / "models" / "stories260K")},
        "lora": {"rank": 8, "alpha": 16.0},
        "data": {
            "source": str(source),
            "label_column": "",
            "partition": "natural",
            "natural_column": "hospital",
            "max_evaluation_records": 300,
        },
        "task": {"name": "causal-lm", "max_length": 96},
        "training": {
            "local_steps": 4,
            "batch_size": 15,
            "micro_batch_size": 64,
            "learning_rate": 1e-2,
        },
        "privacy": {
            "unit": "patient",
            "unit_column": "client",
            "max_records_per_unit": CAP,
            "epsilon": 8.0,
            "delta": 1e-4,
            "clip_norm": 1.0,
            "sample_rate": 0.25,
        },
        "federation": {"num_clients": HOSPITALS, "rounds": 4, "evaluate_every": 4},
    }
    for section, part in changes.items():
        values[section] = {**values.get(section, {}), **part}
    return configuration.from_mapping(values)


def test_patients_in_four_hospitals_at_epsilon_8(assets: Path, admitted: Path, tmp_path: Path) -> None:
    """Patient-level epsilon = 8 trains: the public loss falls clearly, and every ledger counts patients."""
    began = time.monotonic()
    report = simulation.simulate(make_config(assets, admitted, tmp_path / "run"), [Bar()])
    before, after = (report[f"metrics_{when}"]["loss"] for when in ("before", "after"))
    print(
        f"{PATIENTS} patients in {HOSPITALS} hospitals: loss {before:.3f} -> {after:.3f} at epsilon "
        f"{report['epsilon']:.3f}, noise {report['plan']['noise_multiplier']}, "
        f"{time.monotonic() - began:.0f} s"
    )
    assert after <= before - 0.6
    assert report["plan"]["unit"] == "user"
    assert report["clients"] == [f"hospital {number}" for number in range(HOSPITALS)]
    assert 7.5 < report["epsilon"] <= 8.0
    assert report["failures"] == []
    for client in range(HOSPITALS):
        node = tmp_path / "run" / "nodes" / f"client-{client:05d}"
        chain = read_chain(node / "ledger.jsonl", read_public_key(node / PUBLIC_KEY))
        assert chain.opening is not None
        assert chain.opening.unit == "user"
        assert sum(event.steps for event in chain.events) == report["plan"]["steps_per_round"] * 4


def sum_of(
    model: LoadedModel, task: Task, plan: UserPlan, start: AdapterState, units: list[Unit]
) -> torch.Tensor:
    """The clipped sum of a step before the noise, as float64."""
    model.adapter.write(start)
    model.adapter.train_only(set(start))
    enter_training(model)
    optimizer = torch.optim.SGD(list(model.adapter.parameters.values()), lr=1.0)
    seen: list[torch.Tensor] = []

    def look(private: Any) -> None:
        seen.append(torch.cat([p.summed_grad.detach().double().flatten() for p in private.params]))

    with stepping(model, task, plan, optimizer, 64) as step:
        assert isinstance(step, PrivateStep)
        step.optimizer.attach_step_hook(look)
        step(units)
    (exact,) = seen
    return exact


@pytest.mark.parametrize("clip_norm", [1.0, 1e-2])
def test_a_whole_speaker_moves_the_sum_by_at_most_the_clip_norm(
    assets: Path, admitted: Path, tmp_path: Path, clip_norm: float
) -> None:
    """On the real model and text, removing all of a patient's records moves the sum by <= C(1 + 1e-4)."""
    config = make_config(assets, admitted, tmp_path / "run")
    model = load(config.model, config.lora, config.task, 0)
    task = build(config.task, config.data, ())
    plan = UserPlan(
        8.0, 1e-4, clip_norm, 1.0, 0.25, 15, 6, unit_column="client", max_records_per_unit=CAP
    )
    rows = [json.loads(line) for line in (admitted / "train.jsonl").read_text("utf-8").splitlines()]
    speakers = sorted({row["client"] for row in rows if row["hospital"] == "hospital 1"})[:12]
    units: list[Unit] = []
    for speaker in speakers:
        own = [row for row in rows if row["client"] == speaker]
        units.append(list(task.prepare(own, model.tokenizer).examples[:CAP]))
    assert {len(unit) for unit in units} >= {CAP}
    shapes = {key: tuple(each.shape) for key, each in model.adapter.parameters.items()}
    generator = np.random.default_rng(0)
    start = AdapterState(
        {
            key: (value + 0.05 * generator.standard_normal(value.shape)).astype(np.float32)
            for key, value in initial_state(shapes, 0).tensors.items()
        }
    )
    whole = sum_of(model, task, plan, start, units)
    moves = [
        float((whole - sum_of(model, task, plan, start, units[:n] + units[n + 1 :])).norm())
        for n in range(len(units))
    ]
    print(f"C = {clip_norm:g}: moves {min(moves) / clip_norm:.6f} to {max(moves) / clip_norm:.6f} C")
    assert max(moves) <= clip_norm * (1 + 1e-4)
    assert max(moves) >= 0.99 * clip_norm  # clipping took place: the bound is reached
    longest = max(units, key=len)
    alone = sum_of(model, task, plan, start, [longest])
    assert float(alone.norm()) <= clip_norm * (1 + 1e-4)
