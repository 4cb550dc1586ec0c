"""Facts that only some hospitals know arrive at the larger model; controls do not have them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pairs import Told, settings
from tiny import write_rows

from fedslm import simulation
from fedslm.config import Config
from fedslm.data.facts import Counts, generate_facts
from fedslm.distillation.arms import BASE, FEDERATED, LABELS, PUBLIC, UNTUNED
from fedslm.distillation.distil import distil, prepare
from fedslm.distillation.proof import Question
from fedslm.inference.trained import open_run
from fedslm.progress import Silent
from fedslm.rng import stream

COUNTS = Counts(ordinary=16, signs=24, public=60, mentions=40, test=10, probe=8)


@pytest.mark.timeout(240)
def test_planted_facts_arrive_and_controls_do_not_have_them(
    config_in: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five hospitals, twelve signs: the student learns those that its public records mention."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # where the larger model is made
    parts = generate_facts(stream(0, "test-facts"), COUNTS)
    for name, rows in parts.items():
        write_rows(tmp_path / f"{name}.jsonl", rows)
    config = config_in(
        tmp_path / "run",
        data={"source": str(tmp_path), "partition": "natural"},
        task={"name": "classification", "pooling": "mean", "max_length": 40},
        lora={"rank": 8, "alpha": 8.0, "target_modules": ["all-linear"]},
        training={"local_steps": 6, "batch_size": 16, "learning_rate": 0.02},
        federation={"num_clients": 5, "rounds": 7, "evaluate_every": 7},
    )
    simulation.simulate(config, Silent())
    asked = prepare(
        open_run(tmp_path / "run"),
        settings(
            student="demo-large",
            source=str(tmp_path),
            split="public",
            steps=36,
            batch_size=16,
            micro_batch_size=16,
            learning_rate=5e-3,
            rank=8,
        ),
    )
    signs = [row for row in parts["test"] if " sign" in row["text"]]
    question = Question(signs, parts["probe"], resamples=1000, ceiling=False)
    found = distil(asked, tmp_path / "out", Told(), question)["proof"]
    known = {arm: found["probe"][arm]["mentioned"] for arm in found["probe"]}
    unheard = {arm: found["probe"][arm]["not mentioned"] for arm in found["probe"]}
    controls = [known[arm] for arm in (BASE, UNTUNED, PUBLIC, LABELS)]
    assert known[FEDERATED] > 0.6
    assert max(controls) < 0.4  # chance is 0.17
    assert unheard[FEDERATED] < 0.4  # what no prompt elicits is not passed on
    assert found["gain"]
