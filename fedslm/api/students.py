"""Distillation of a run by one call."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedslm.config import DistillConfig, section_from, with_overrides
from fedslm.distillation.proof import ProofRequest
from fedslm.distillation.run import distill as taught
from fedslm.distillation.run import prepare
from fedslm.errors import ConfigError, Problem
from fedslm.inference.trained import FinishedRun


class _Silent:
    """Shows no progress."""

    def on_progress(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Receives the progress of a stage."""


def distill(
    run: FinishedRun,
    directory: Path,
    settings: Mapping[str, Any],
    *,
    drop_overlap: bool = False,
    prove: bool = False,
) -> dict[str, Any]:
    """Distills a run.

    Args:
        run: The run whose model teaches.
        directory: A new directory, or that of the same interrupted distillation.
        settings: Keys of ``[distill]`` to values; the run's own config has the others.
        drop_overlap: Leave out public records that contain test records.
        prove: Train controls too.

    Raises:
        FedslmError: A setting, the student, the records or the directory cannot be used.
    """
    strangers = [key for key in settings if not str(key).startswith("distill.")]
    if strangers:
        raise ConfigError([Problem(str(strangers[0]), "only keys of [distill] can be set here")])
    own = {"distill": run.distill.model_dump(mode="json")}
    section = section_from(DistillConfig, "distill", with_overrides(own, settings)["distill"])
    prepared = prepare(run, section, drop_overlap=drop_overlap)
    question = ProofRequest(prepared.tests, general=prepared.general) if prove else None
    return taught(prepared, directory, _Silent(), question)
