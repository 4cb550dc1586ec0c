"""A population of a hundred thousand clients, of which twenty are asked in a round."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fedslm
from fedslm.config import from_mapping

CLIENTS, COHORT, ROUNDS, RECORDS = 100_000, 20, 2, 3
PRIVATE = {"unit": "record", "epsilon": 8.0, "delta": 1e-5, "clip_norm": 1.0, "sample_rate": 0.5}


@pytest.mark.slow
def test_a_large_population_leaves_traces_only_of_those_who_took_part(tmp_path: Path) -> None:
    """Directories, ledgers, statements and the report grow with participants; the data are one file."""
    for split, count in (("train", RECORDS * CLIENTS), ("test", 50)):
        with (tmp_path / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for number in range(count):
                row = {"text": f"{split} note {number}", "label": "ab"[number % 2]}
                file.write(json.dumps(row) + "\n")
    config = from_mapping(
        {
            "run": {"name": "population", "directory": str(tmp_path / "run")},
            "model": {"base": "demo", "device": "cpu"},
            "lora": {"rank": 2, "alpha": 2.0, "target_modules": ["3.output.dense"]},
            "data": {"source": str(tmp_path), "partition": "iid"},
            "task": {"name": "classification", "pooling": "mean", "max_length": 24},
            "training": {"local_steps": 1, "batch_size": 2},
            "privacy": PRIVATE,
            "aggregation": {"method": "ffa"},
            "federation": {
                "num_clients": CLIENTS,
                "clients_per_round": COHORT,
                "rounds": ROUNDS,
                "evaluate_every": ROUNDS,
            },
            "engine": {"workers": 2},
        }
    )
    report = fedslm.simulate(config).report
    run = tmp_path / "run"
    took_part = [path for path in (run / "nodes").iterdir() if path.name.startswith("client-")]
    assert report["failures"] == []
    assert COHORT < len(took_part) <= COHORT * ROUNDS
    assert len(report["privacy"]) == len(took_part)
    statements = (run / "statements.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(statements) == COHORT * ROUNDS
    assert len(list((run / "data").iterdir())) < 10
    names = 25 * CLIENTS  # bytes: the report names the population, and says nothing else of it
    assert (run / "report.json").stat().st_size < names + 100_000
    assert (run / "checkpoint" / "state.json").stat().st_size < 100_000
