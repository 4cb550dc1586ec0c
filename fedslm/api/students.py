"""Distillation of a run, for Python and for the command."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedslm.config import DistillConfig, section_from, with_overrides
from fedslm.distillation import run as distillation
from fedslm.distillation.estimate import estimate
from fedslm.distillation.pipeline import Watcher
from fedslm.distillation.proof import GROUP, ProofRequest
from fedslm.distillation.run import PreparedJob
from fedslm.errors import ConfigError, Problem, told_as
from fedslm.inference.evaluation import Elsewhere, other_rows
from fedslm.inference.inputs import Rows
from fedslm.inference.trained import FinishedRun


@dataclass(frozen=True)
class Proof:
    """How :meth:`fedslm.RunResult.distill` tests whether the clients' knowledge was transferred.

    Attributes:
        test: Test records, a path or a hub name; None: the run's evaluation split.
        test_split: Split of ``test``.
        probe: Records that only some clients could know; the column "group" separates them.
        probe_split: Split of ``probe``.
        seeds: Training runs of each arm, >= 1.
        resamples: Bootstrap resamples, >= 1000.
        ceiling: Also train on a simulation's pooled private records.

    >>> import fedslm
    >>> fedslm.Proof(probe="demo-facts", seeds=3).test_split
    'test'
    """

    test: Path | str | None = None
    test_split: str = "test"
    probe: Path | str | None = None
    probe_split: str = "probe"
    seeds: int = 1
    resamples: int = 2000
    ceiling: bool = True


def prepared(
    run: FinishedRun, settings: Mapping[str, Any], *, drop_overlap: bool = False
) -> PreparedJob:
    """Checks a distillation, and reads its public records.

    Args:
        run: The run whose model teaches.
        settings: Keys of ``[distill]`` to values; the run's own config has the others.
        drop_overlap: Leave out public records that contain test records.

    Raises:
        FedslmError: A setting, the student or the records cannot be used.
    """
    strangers = [key for key in settings if not str(key).startswith("distill.")]
    if strangers:
        raise ConfigError([Problem(str(strangers[0]), "only keys of [distill] can be set here")])
    own = {"distill": run.distill.model_dump(mode="json")}
    section = section_from(DistillConfig, "distill", with_overrides(own, settings)["distill"])
    return distillation.prepare(run, section, drop_overlap=drop_overlap)


def question(prepared: PreparedJob, proof: Proof) -> ProofRequest:
    """Reads the records of a proof: the run's own test records unless others are given.

    Raises:
        ConfigError: A number is too small, or there are no test records.
        DataError: The records cannot be read, or are the private ones.
    """
    tests, probed = prepared.tests, []
    if proof.test is not None:
        tests = _rows(prepared, Elsewhere(str(proof.test), proof.test_split), "test")
    if proof.probe is not None:
        place = Elsewhere(str(proof.probe), proof.probe_split, optional=frozenset({GROUP}))
        probed = _rows(prepared, place, "probe")
    return ProofRequest(tests, probed, prepared.general, proof.seeds, proof.resamples, proof.ceiling)


def _rows(prepared: PreparedJob, place: Elsewhere, key: str) -> Rows:
    """Reads records from elsewhere; errors name the argument."""
    names = {"data.evaluation_source": key, "data.evaluation_split": f"{key}_split"}
    with told_as(names):
        return other_rows(prepared.job.run, place)


def estimated(prepared: PreparedJob) -> dict[str, Any]:
    """Returns the memory and the time of a distillation as JSON values; nothing is trained or written.

    Raises:
        ModelError: A model cannot be found.
    """
    job, found = prepared.job, estimate(prepared.job)
    return {
        **vars(found),
        "total_bytes": found.total_bytes(two_passes=bool(job.settings.cached_samples)),
        "method": job.settings.method,
        "steps": job.settings.steps,
        "public_records": len(job.rows),
    }


class Silent(Watcher):
    """Shows no progress."""

    def on_progress(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Receives the progress of a stage."""


def taught(
    prepared: PreparedJob, directory: Path, proof: ProofRequest | None, watcher: Watcher
) -> dict[str, Any]:
    """Trains the student, and the controls of a proof; returns the content of ``distill.json``.

    Args:
        prepared: The distillation.
        directory: A new directory, or that of the same interrupted distillation.
        proof: As from :func:`question`; None: no proof.
        watcher: Receives progress.

    Raises:
        FedslmError: The directory cannot be used, or training failed.
    """
    return distillation.distill(prepared, directory, watcher, proof)
