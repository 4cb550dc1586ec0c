"""Runs one distillation in its own directory; an interrupted one can be resumed.

asked.json                 the settings, models and data of the distillation
contexts.jsonl             the contexts that both models read
targets/ steps/            stored targets (two passes) and checkpoints; removed at the end
adapter/                   the student's adapter in PEFT's format, its tokenizer and its model card
distill.json .md .png      the report
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

import fedslm
from fedslm import layout
from fedslm.config import DistillConfig
from fedslm.distillation import public
from fedslm.distillation.controls import FEDERATED, ControlTrainer
from fedslm.distillation.evaluation import general_examples, general_task, measure, tests_of
from fedslm.distillation.models import (
    LANGUAGE,
    Student,
    Teacher,
    check_student,
    check_task,
    forget_models,
    load_kept,
    load_student,
    load_teacher,
    shared_vocabulary,
    student_reader,
    student_sections,
    warn_if_smaller,
)
from fedslm.distillation.objective import resolved_method
from fedslm.distillation.pipeline import DistillationJob, Watcher, prepare_contexts, train_student
from fedslm.distillation.proof import ProofRequest, prove
from fedslm.distillation.provenance import chain_of, ledgers_of
from fedslm.errors import DataError, RunError, Unusable
from fedslm.inference.bootstrap import Statistics
from fedslm.inference.evaluation import own_rows
from fedslm.inference.inputs import Rows
from fedslm.inference.trained import FinishedRun, TunedModel
from fedslm.models.base import base_sha256, resolve
from fedslm.models.peft_export import save_plain
from fedslm.records import AdapterState
from fedslm.reporting import distillation as reporting
from fedslm.storage import with_usual_modes, write_text
from fedslm.tasks.base import Example

_ASKED = "asked.json"
_PROOF = "proof"
_WORK = ("targets", "steps", "texts.jsonl", _PROOF)


@dataclass(frozen=True)
class PreparedJob:
    """A checked distillation that is ready to start.

    Attributes:
        run: The run whose federated model teaches.
        job: The distillation job.
        tests: Test records of the private distribution; empty if the run's split no longer exists.
        general: General text for measuring perplexity.
        overlap: Number of test records that the public records contain.
        student_sha256: Hash of the student's files.
    """

    run: FinishedRun
    job: DistillationJob
    tests: Rows
    general: tuple[Example, ...]
    overlap: public.Overlap
    student_sha256: str

    @property
    def identity(self) -> dict[str, Any]:
        """The values that must be equal for two distillations to be the same."""
        job, run = self.job, self.run
        rows = json.dumps(job.rows, sort_keys=True, default=str).encode()
        return {
            "fedslm_version": fedslm.__version__,
            "teacher_adapter_sha256": run.adapter.sha256(),
            "teacher_base_sha256": run.base_sha256,
            "student_sha256": self.student_sha256,
            "public_records": len(job.rows),
            "public_sha256": hashlib.sha256(rows).hexdigest(),
            "settings": job.settings.model_dump(mode="json"),
        }


def prepare(run: FinishedRun, settings: DistillConfig, *, drop_overlap: bool = False) -> PreparedJob:
    """Checks everything that can be checked before a model is loaded.

    Args:
        run: The run whose federated model teaches.
        settings: The ``[distill]`` section.
        drop_overlap: Drop public records that contain test records, instead of refusing.

    Raises:
        ConfigError: A setting is missing, or the method does not support the task or tokenizers.
        DataError: The public records are unusable, private, or contain the test records.
        ModelError: The student is the teacher's base model, or one of them cannot be found.
    """
    tests = tests_there(run)
    job, overlap = job_of(run, settings, tests, drop_overlap=drop_overlap)
    measured = _general(run, job.settings, settings.general_test_split)
    student, *_ = student_sections(settings, run.task)
    return PreparedJob(run, job, tests, measured, overlap, base_sha256(resolve(student)))


def job_of(
    teacher: TunedModel, settings: DistillConfig, tests: Rows, *, drop_overlap: bool = False
) -> tuple[DistillationJob, public.Overlap]:
    """Builds the distillation job, and reports which test records the public ones contain.

    Args:
        teacher: The federated model.
        settings: The ``[distill]`` section.
        tests: Test records of the private distribution.
        drop_overlap: As for :func:`prepare`.

    Raises:
        FedslmError: As :func:`prepare`.
    """
    check_task(teacher)
    check_student(teacher, settings)
    teacher.check_base()
    rows = public.public_rows(teacher, settings)
    columns = public.text_columns(teacher)
    rows, overlap = public.without_overlap(rows, tests, columns, drop=drop_overlap)
    language = teacher.task.name in LANGUAGE
    shared = shared_vocabulary(teacher, settings) if language else len(teacher.labels)
    method = resolved_method(settings, teacher.task.name, shared)
    settings = settings.model_copy(update={"method": method})
    general = _general(teacher, settings, settings.general_split)
    return DistillationJob(teacher, settings, shared or 0, rows, general), overlap


def distill(
    prepared: PreparedJob, directory: Path, watcher: Watcher, question: ProofRequest | None = None
) -> dict[str, Any]:
    """Trains the student and writes its adapter, its model card and the report.

    Formal guarantee: whatever is written is a function of the federated adapter, the public records,
    the student and seeds; no private record is read. If the adapter is (epsilon, delta)-differentially
    private, so is the student's, at no further cost (post-processing; Dwork and Roth 2014, Proposition
    2.1). Test records are read after training, for metrics that select nothing. A proof's ceiling reads
    the private records of a simulation; its adapter is not kept.

    Args:
        prepared: Result of :func:`prepare`.
        directory: A new directory, or that of the same interrupted distillation, which is resumed.
        watcher: Receives progress.
        question: Data and settings of a transfer proof; None: no proof.

    Returns:
        The content of ``distill.json``.

    Raises:
        RunError: The directory contains something else, or cannot be written.
    """
    began = time.monotonic()
    with working(directory, prepared.identity) as path:
        before = ledgers_of(prepared.run.directory)
        teacher, student, adapter, losses = _taught(prepared.job, path, watcher)
        report = {
            **_description(prepared),
            "warnings": [text for text in (warn_if_smaller(teacher, student),) if text],
            "losses": losses,
            **_figures(prepared, teacher, student, adapter),
            "proof": None,
            "directory": str(path),
        }
        if question is not None:
            trainer = ControlTrainer(
                prepared.run, prepared.job, teacher, student, path / _PROOF, watcher
            )
            trainer.keep(FEDERATED, prepared.run.seed, adapter)
            report["proof"] = prove(trainer, question)
        report["privacy"] = chain_of(prepared.run, adapter, before)
        report["adapter_sha256"] = adapter.sha256()
        report["seconds"] = time.monotonic() - began
        save_plain(student.model.adapter, adapter, student.lora, path / layout.ADAPTER)
        student.tokenizer.save_pretrained(path / layout.ADAPTER)
        with_usual_modes(path / layout.ADAPTER)
        reporting.write(path, report, reporting.Sections(student.config, prepared.run.task))
        _tidy(path)
        return report


def _taught(
    job: DistillationJob, path: Path, watcher: Watcher
) -> tuple[Teacher, Student, AdapterState, list[float]]:
    """Returns models, adapter and losses; with two passes, only one model is loaded at a time."""
    load_kept.cache_clear()  # a student that followed the rounds
    teacher = load_teacher(job.run, job.settings)
    prepare_contexts(job, teacher, student_reader(job.run, job.settings), path, watcher)
    if not job.settings.cached_samples:
        student = load_student(job.run, job.settings)
        return teacher, student, *train_student(job, student, teacher, path, watcher)
    del teacher
    forget_models()
    student = load_student(job.run, job.settings)
    adapter, losses = train_student(job, student, None, path, watcher)
    return load_teacher(job.run, job.settings), student, adapter, losses


def _tidy(path: Path) -> None:
    """Removes files that only an interrupted distillation needs."""
    for name in _WORK:
        shutil.rmtree(path / name, ignore_errors=True)
        (path / name).unlink(missing_ok=True)


@contextmanager
def working(directory: Path, identity: dict[str, Any]) -> Iterator[Path]:
    """Yields a directory for one piece of work, locked against other processes.

    Raises:
        RunError: The work is finished, or the directory belongs to other work, is in use, or cannot be
            created.
    """
    path = directory.expanduser().absolute()
    if (path / layout.DISTILL_REPORT).exists():
        raise Unusable(f"{path} contains a finished distillation; give another --out")
    if path.exists() and not (path / _ASKED).exists() and any(path.iterdir()):
        raise Unusable(f"{path} exists and contains something else; give another --out")
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / ".lock", timeout=1.0)
        with lock:
            _claim(path / _ASKED, identity)
            yield path
    except Timeout:
        raise RunError(f"{path} is in use by another process") from None
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error}") from error


def _claim(path: Path, identity: dict[str, Any]) -> None:
    """Writes the request, or checks that it equals the earlier one."""
    if not path.exists():
        write_text(path, json.dumps(identity, indent=2) + "\n")
        return
    try:
        before = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{path} is damaged: {error}; remove {path.parent}") from error
    changed = sorted(key for key in identity if before.get(key) != identity[key])
    if changed:
        raise Unusable(
            f"{path.parent} contains an interrupted distillation with different settings "
            f"({', '.join(changed)}); use the same settings to resume, or give another --out"
        )


def tests_there(run: TunedModel) -> Rows:
    """Returns the run's own evaluation split, if it still exists."""
    try:
        return own_rows(run)
    except DataError:
        return []


def _general(run: TunedModel, settings: DistillConfig, split: str) -> tuple[Example, ...]:
    """Returns general text in the student's tokens; empty without a source, or for classification."""
    if settings.general_source is None or run.task.name not in LANGUAGE:
        return ()
    reader = student_reader(run, settings)
    return general_examples(run, settings.general_source, split, reader)


def _description(prepared: PreparedJob) -> dict[str, Any]:
    """Describes the request, for the report."""
    job, run = prepared.job, prepared.run
    return {
        **prepared.identity,
        "run": str(run.directory),
        "name": run.report["name"],
        "task": run.task.name,
        "labels": list(run.labels),
        "teacher_base": run.model.base,
        "student_base": job.settings.student,
        "method": job.settings.method,
        "overlap": {
            "records": prepared.overlap.records,
            "found": prepared.overlap.found,
            "dropped": prepared.overlap.dropped,
        },
    }


def _figures(
    prepared: PreparedJob, teacher: Teacher, student: Student, adapter: AdapterState
) -> dict[str, Any]:
    """Returns metrics of teacher, student and distilled student on the run's evaluation split."""
    found: dict[str, Any] = {"headline": teacher.task.headline, "metrics": {}, "general": None}
    run = prepared.run
    if prepared.tests:
        tests = tests_of(prepared.tests, teacher.reader, student.reader)
        models = {
            "teacher": (teacher.trained.model, teacher.task, tests.teacher, teacher.tuned),
            "student before": (student.model, student.task, tests.student, student.initial),
            "student after": (student.model, student.task, tests.student, adapter),
        }
        for name, (model, task, examples, state) in models.items():
            found["metrics"][name] = task.metrics(_sums(measure(model, task, examples, state)))
    if prepared.general:
        task = general_task(run)
        for state in (student.initial, adapter):
            sums = _sums(measure(student.model, task, prepared.general, state))
            found["general"] = [*(found["general"] or []), task.metrics(sums)["perplexity"]]
    return found


def _sums(found: Statistics) -> dict[str, NDArray[np.float64]]:
    """Sums statistics over records."""
    return {name: values.sum(axis=0) for name, values in found.items()}
