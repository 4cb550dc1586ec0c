"""Facts that only some hospitals know arrive at the larger model; controls do not have them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.pairs import Told, settings
from support.tiny import write_rows

from fedslm import simulation
from fedslm.config import Config
from fedslm.data.facts import SIGNS, Counts, generate_facts
from fedslm.distillation.controls import BASE, FEDERATED, LABELS, PUBLIC, UNTUNED
from fedslm.distillation.proof import ProofRequest
from fedslm.distillation.run import distill, prepare
from fedslm.inference.trained import open_run
from fedslm.rng import stream

COUNTS = Counts(ordinary=4, signs=24, public=36, mentions=40, test=5, probe=8)
SEED = 0


def about_signs(parts: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Test notes about signs, in the hospitals' own words; the group says whether public notes mention it."""
    group = {
        sign: row["group"] for row in parts["probe"] for sign in SIGNS if f"{sign} sign" in row["text"]
    }
    return [
        {**row, "group": group[sign]}
        for row in parts["test"]
        for sign in SIGNS
        if f"{sign} sign" in row["text"]
    ]


def proof_of(config_in: Callable[..., Config], directory: Path, seed: int) -> dict[str, Any]:
    """Five hospitals, twelve signs: federated, then distilled into the larger model, with all controls."""
    parts = generate_facts(stream(seed, "test-facts"), COUNTS)
    for name, rows in parts.items():
        write_rows(directory / f"{name}.jsonl", rows)
    config = config_in(
        directory / "run",
        run={"seed": seed},
        data={"source": str(directory), "partition": "natural"},
        task={"name": "classification", "pooling": "mean", "max_length": 36},
        lora={"rank": 8, "alpha": 8.0, "target_modules": ["all-linear"]},
        training={"local_steps": 6, "batch_size": 8, "learning_rate": 0.01},
        federation={"num_clients": 5, "rounds": 10, "evaluate_every": 10},
    )
    simulation.simulate(config)
    training_set = settings(
        student="demo-large",
        source=str(directory),
        split="public",
        method="forward-kl",
        steps=40,
        learning_rate=5e-3,
        rank=8,
    )
    signs = about_signs(parts)
    heard = [row for row in signs if row["group"] == "mentioned"]
    question = ProofRequest(heard, signs + parts["probe"], resamples=1000, ceiling=False)
    asked = prepare(open_run(directory / "run"), training_set)
    return dict(distill(asked, directory / "out", Told(), question)["proof"])


def test_planted_facts_arrive_and_controls_do_not_have_them(
    config_in: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student learns the signs that public records mention: no control does, nor it the others."""
    monkeypatch.setenv("FEDSLM_CACHE", str(tmp_path / "cache"))  # where the larger model is made
    found = proof_of(config_in, tmp_path, SEED)
    known = {arm: found["probe"][arm]["mentioned"] for arm in found["probe"]}
    unheard = {arm: found["probe"][arm]["not mentioned"] for arm in found["probe"]}
    controls = [known[arm] for arm in (BASE, UNTUNED, PUBLIC, LABELS)]
    assert known[FEDERATED] > max(controls) + 0.25
    assert known[FEDERATED] > unheard[FEDERATED] + 0.25  # what no prompt elicits is not passed on
    assert found["gain"]
