"""A proof of transfer: what its arms are, when it claims a gain, and what it says of planted facts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.finished import rows_of
from support.pairs import Told, public, settings, student
from support.tiny import write_rows

from fedslm.distillation import proof
from fedslm.distillation.controls import (
    BASE,
    CONTROLS,
    FEDERATED,
    LABELS,
    POOLED,
    PUBLIC,
    UNTUNED,
    ControlTrainer,
    LeftOut,
)
from fedslm.distillation.models import load_student, load_teacher
from fedslm.distillation.proof import DECODING, TEACHER, ProofRequest
from fedslm.distillation.run import distill, prepare
from fedslm.errors import ConfigError
from fedslm.inference.trained import open_run

Finished = Callable[[str], Path]


def trainer_of(finished_run: Finished, root: Path, kind: str, **changes: object) -> ControlTrainer:
    """Both models of a tiny pair."""
    values = {"student": str(student(root, kind)), "source": str(public(root)), **changes}
    run = open_run(finished_run(kind))
    job = prepare(run, settings(**values)).job
    models = load_teacher(job.run, job.settings), load_student(job.run, job.settings)
    return ControlTrainer(run, job, *models, root / "proof", Told())


@pytest.mark.parametrize("kind", ["causal-lm", "classification"])
def test_a_proof_has_every_arm(kind: str, finished_run: Finished, tmp_path: Path) -> None:
    """All controls, the ceiling and the references, in the report, the picture and the page."""
    values = {"student": str(student(tmp_path, kind)), "source": str(public(tmp_path))}
    asked = prepare(open_run(finished_run(kind)), settings(**values, steps=3))
    groups = [
        {**row, "group": "heard" if at % 2 else "unheard"} for at, row in enumerate(rows_of(20, 9))
    ]
    question = ProofRequest(asked.tests, groups, (), 2, 1000)
    found = distill(asked, tmp_path / "out", Told(), question)["proof"]
    arms = {FEDERATED, *CONTROLS, POOLED, TEACHER}
    assert set(found["arms"]) == (arms | {DECODING} if kind == "causal-lm" else arms)
    assert set(found["gains"]) == set(CONTROLS)
    assert found["gain"] == all(each["low"] > 0 for each in found["gains"].values())
    sign = -1 if kind == "causal-lm" else 1
    for control, gain in found["gains"].items():
        first, second = (found["arms"][name]["headline"]["value"] for name in (FEDERATED, control))
        assert gain["value"] == pytest.approx(sign * (first - second))
        assert gain["low"] <= gain["value"] <= gain["high"]
    assert found["probe_groups"] == ["heard", "unheard"]
    assert set(found["probe"]) == set(found["arms"])
    page = (tmp_path / "out" / "distill.md").read_text()
    assert "Knowledge probe" in page
    assert all(name in page for name in found["arms"])
    assert (tmp_path / "out" / "proof.png").stat().st_size > 10_000
    assert not (tmp_path / "out" / "proof").exists()


def test_arms_differ_in_their_teacher_alone(finished_run: Finished, tmp_path: Path) -> None:
    """Same start and order; a proxy of the untuned model is no teacher; an arm is trained once."""
    bench = trainer_of(finished_run, tmp_path, "causal-lm", sampled_fraction=0.0)
    start = bench.adapter(BASE, 0)
    moved = {
        arm: bench.adapter(arm, 0).minus(start).norm() for arm in (FEDERATED, UNTUNED, PUBLIC, LABELS)
    }
    assert moved[UNTUNED] == 0
    assert min(moved[FEDERATED], moved[PUBLIC], moved[LABELS]) > 0.1
    assert bench.adapter(BASE, 1).sha256() != start.sha256()
    told = Told()
    again = ControlTrainer(bench.run, bench.job, bench.teacher, bench.student, bench.directory, told)
    assert again.adapter(FEDERATED, 0).sha256() == bench.adapter(FEDERATED, 0).sha256()
    assert not told.stages


def test_arms_without_what_they_need_are_left_out(finished_run: Finished, tmp_path: Path) -> None:
    """Without public labels two controls are missing, and the report says so."""
    unlabelled = tmp_path / "unlabelled"
    unlabelled.mkdir()
    write_rows(unlabelled / "public.jsonl", [{"text": row["text"]} for row in rows_of(24, 5)])
    bench = trainer_of(
        finished_run, tmp_path, "classification", source=str(unlabelled / "public.jsonl")
    )
    for arm in (PUBLIC, LABELS):
        with pytest.raises(LeftOut, match="no public record has a known label"):
            bench.adapter(arm, 0)
    found = proof.prove(bench, ProofRequest(rows_of(30, 3), resamples=1000))
    assert set(found["left_out"]) == {PUBLIC, LABELS, DECODING}
    assert set(found["gains"]) == {BASE, UNTUNED}


def test_a_gain_is_claimed_over_every_control_or_not_at_all(
    finished_run: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One control whose interval holds 0 is enough: no gain."""
    bench = trainer_of(finished_run, tmp_path, "classification", steps=1)
    start = bench.adapter(BASE, 0)
    pooled = bench.adapter(POOLED, 0)
    given = {FEDERATED: pooled, BASE: start, UNTUNED: start, PUBLIC: start, LABELS: start}
    monkeypatch.setattr(ControlTrainer, "adapter", lambda self, arm, seed: given.get(arm, pooled))

    def spread(_: object, __: object, examples: list[object], adapter: object) -> dict[str, np.ndarray]:
        count = len(examples)
        right = np.ones(count) if adapter is pooled else np.arange(count) % 2
        ones = np.ones((count, 2))
        return {
            "records": np.ones(count),
            "correct": right.astype(float),
            "loss": 1 - right.astype(float),
            "actual": ones,
            "guessed": ones,
            "right": ones,
        }

    monkeypatch.setattr(proof, "measure", spread)
    question = ProofRequest(rows_of(40, 3), resamples=1000)
    assert proof.prove(bench, question)["gain"]
    given[LABELS] = pooled
    found = proof.prove(bench, question)
    assert not found["gain"]
    assert found["gains"][LABELS]["value"] == 0
    assert found["gains"][BASE]["low"] > 0.2


def test_a_question_that_cannot_be_answered() -> None:
    """No test records, too few resamples, no seed."""
    with pytest.raises(ConfigError, match="test: is missing"):
        ProofRequest([])
    with pytest.raises(ConfigError, match="resamples: value 10"):
        ProofRequest(rows_of(2, 0), resamples=10)
    with pytest.raises(ConfigError, match="seeds: value 0"):
        ProofRequest(rows_of(2, 0), seeds=0)
