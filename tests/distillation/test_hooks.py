"""Distillation as a part of a run: at the end, after every k rounds, with the student teaching back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.pairs import FEW, public, student
from support.tiny import PRIVATE, changed, problems

from fedslm import simulation
from fedslm.audit.distilled import distillations
from fedslm.audit.runs import audit_run
from fedslm.config import Config
from fedslm.distillation import models
from fedslm.federation.checkpoint import RunDirectory
from fedslm.federation.observers import Observer
from fedslm.records import RoundRecord
from fedslm.storage import load_adapter, save_adapter

MakeConfig = Callable[..., Config]


def config_with(config_in: MakeConfig, root: Path, name: str, **distill: Any) -> Config:
    """A private run of three rounds with a student; without privacy if rounds are followed."""
    values = {"student": str(student(root, "classification")), "source": str(public(root)), **FEW}
    privacy = {"unit": "none"} if "every" in distill else {**PRIVATE, "sample_rate": 0.1}
    return config_in(root / name, privacy=privacy, distill={**values, "steps": 2, **distill})


def findings_of(path: Path) -> list[str]:
    """What is wrong with a run's distillations."""
    return distillations(RunDirectory.open(path)[0])[1]


def adapter_of(path: Path) -> str:
    """Hash of a run's adapter."""
    return load_adapter(path / "adapter" / "adapter_model.safetensors").sha256()


def test_a_run_ends_with_its_student_and_the_audit_sees_the_chain(
    config_in: MakeConfig, tmp_path: Path
) -> None:
    """The student has the run's epsilon, nothing was spent, and whoever changes a link is found."""
    config = config_with(config_in, tmp_path, "run")
    report = simulation.simulate(config)
    path = tmp_path / "run"
    written = json.loads((path / "distilled" / "distill.json").read_text())
    assert written["privacy"]["epsilon"] == report["epsilon"]
    assert written["privacy"]["spent_here"] == 0
    assert len(written["privacy"]["ledgers"]) == 3
    for page in ("distill.md", "adapter/README.md"):
        assert f"ε = {report['epsilon']:.3f}" in (path / "distilled" / page).read_text()
    audit = audit_run(path, group_sizes=(), empirical=False)
    assert not audit["findings"]
    (chain,) = audit["distillations"]
    assert chain["sound"]
    assert chain["teacher_adapter_sha256"] == report["adapter_sha256"]
    assert "## Distillations" in (path / "audit.md").read_text()
    weights = path / "distilled" / "adapter" / "adapter_model.safetensors"
    adapter = load_adapter(weights)
    save_adapter(weights, adapter.plus(adapter))
    assert findings_of(path) == ["distilled: the student's adapter is not the one that was written"]


def test_a_false_statement_is_found(config_in: MakeConfig, tmp_path: Path) -> None:
    """Another epsilon, another teacher, more charges than there are, or a line that is not there: each is a finding."""
    simulation.simulate(config_with(config_in, tmp_path, "run"))
    record = tmp_path / "run" / "distilled" / "distill.json"
    honest = json.loads(record.read_text())
    for key, value, finding in [
        ("epsilon", 0.1, "its privacy statement is not the run's"),
        ("teacher_adapter_sha256", "0" * 64, "the teacher is not the adapter that the run released"),
        ("ledgers", {"client-00000": {"charges": 99, "head": ""}}, "a ledger does not hold"),
        ("ledgers", {"client-00000": {"charges": 0, "head": "ab" * 32}}, "a ledger does not hold"),
    ]:
        record.write_text(json.dumps({**honest, "privacy": {**honest["privacy"], key: value}}))
        (found,) = findings_of(tmp_path / "run")
        assert finding in found
    record.write_text("{")
    assert "damaged" in findings_of(tmp_path / "run")[0]


@dataclass
class Stops(Observer):
    """An observer that stops a run after a round."""

    after: int

    def on_round(self, record: RoundRecord) -> None:
        """Stops."""
        if record.round == self.after:
            raise KeyboardInterrupt


def test_the_small_model_learns_back_and_a_crash_changes_nothing(
    config_in: MakeConfig, tmp_path: Path
) -> None:
    """The mutual leg moves what is broadcast; an interrupted run ends with the same adapter."""
    mutual = {"every": 1, "mutual_steps": 2}
    hashes = {}
    for name, distill in [("plain", {"every": 1}), ("mutual", mutual), ("broken", mutual)]:
        config = config_with(config_in, tmp_path, name, **distill)
        if name == "broken":
            with pytest.raises(KeyboardInterrupt):
                simulation.simulate(config, [Stops(1)])
            simulation.resume(tmp_path / name)
        else:
            simulation.simulate(config)
        hashes[name] = adapter_of(tmp_path / name)
    assert hashes["mutual"] != hashes["plain"]
    assert hashes["mutual"] == hashes["broken"]
    students = sorted(path.name for path in (tmp_path / "mutual" / "distilling").glob("student-*"))
    assert students == ["student-00001.safetensors", "student-00002.safetensors"]


def test_what_a_config_may_ask() -> None:
    """A student needs public records, a task that is taught, and rounds that it can follow."""
    student = ("distill.student", "demo-large")
    source = ("distill.source", "demo")
    assert "name the public records" in problems(changed(student))["distill.source"]
    assert (
        "set the rounds between"
        in problems(changed(("distill.mutual_steps", 2)))["distill.mutual_steps"]
    )
    assert "name the larger" in problems(changed(("distill.every", 2)))["distill.every"]
    tagging = ("task.name", "token-classification")
    labels = ("task.labels", ["O", "B-x", "I-x"])
    assert "needs task.name" in problems(changed(student, source, tagging, labels))["distill.student"]
    stack = [("distill.every", 2), ("aggregation.method", "stack")]
    assert "is not supported with" in problems(changed(student, source, *stack))["distill.every"]


def test_a_student_that_followed_the_rounds_is_freed(config_in: MakeConfig, tmp_path: Path) -> None:
    """Between rounds a process keeps the student; when the run itself is distilled, no second one stays."""
    models.load_kept.cache_clear()
    kept = []

    class Looks(Observer):
        def on_round(self, record: RoundRecord) -> None:
            kept.append(models.load_kept.cache_info().currsize)

    simulation.simulate(config_with(config_in, tmp_path, "run", every=1), [Looks()])
    assert kept[0] == 1
    assert models.load_kept.cache_info().currsize == 0
