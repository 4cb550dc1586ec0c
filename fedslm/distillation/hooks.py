"""Distillation as a part of a simulation: at the end, and between rounds if the student follows them.

Nothing here imports torch before it is needed: a simulation's server computes in its workers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedslm import layout
from fedslm.config import DistillConfig
from fedslm.federation.rounds import Follow
from fedslm.protocol.setup import Setup
from fedslm.records import AdapterState


class Printed:
    """A watcher that prints a line for each quarter of a stage."""

    def on_progress(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Prints it, on standard error."""
        if 4 * done // total > 4 * (done - 1) // total:
            sys.stderr.write(f"{stage}: {done}/{total} {note}\n")
            sys.stderr.flush()


def check_asked(settings: DistillConfig) -> None:
    """Refuses a student that cannot be found, before the first round.

    Raises:
        ConfigError: Something is missing.
        ModelError: There is no such student.
    """
    if settings.student is None:
        return
    from fedslm.config import ModelConfig
    from fedslm.distillation.models import find_student

    find_student(ModelConfig(base=settings.student))


def distill_if_asked(path: Path, settings: DistillConfig) -> None:
    """Distils a finished run into its own directory, unless nobody asked or that is done."""
    if is_distilled(path, settings):
        return
    from fedslm.distillation.run import distill, prepare
    from fedslm.inference.trained import open_run

    distill(prepare(open_run(path), settings), path / layout.DISTILLED, Printed())


def is_distilled(path: Path, settings: DistillConfig) -> bool:
    """Whether nobody asked for a student of a run, or it is there."""
    if settings.student is None:
        return True
    return (path / layout.DISTILLED / layout.DISTILL_REPORT).exists()


def follower(settings: DistillConfig, rounds: int, call: Callable[..., Any]) -> Follow | None:
    """What sees each round's adapter; None if nothing is distilled between rounds.

    Args:
        settings: The ``[distill]`` section.
        rounds: Number of the run's rounds: after the last the run itself is distilled.
        call: Runs a function where models are.
    """
    every = settings.every
    if settings.student is None or every is None:
        return None

    def follow(
        number: int, setup: Setup, adapter: AdapterState, trained: frozenset[str]
    ) -> AdapterState | None:
        if number % every or number == rounds:
            return None
        given: AdapterState | None = call(after_round, setup, settings, adapter, number, trained)
        return given

    return follow


def after_round(
    setup: Setup, settings: DistillConfig, adapter: AdapterState, number: int, trained: frozenset[str]
) -> AdapterState | None:
    """Runs :func:`fedslm.distillation.between_rounds.follow` on the adapter of a round."""
    from fedslm.distillation.between_rounds import follow
    from fedslm.inference.trained import TunedModel

    tuned = TunedModel(
        directory=Path(setup.directory),
        model=setup.model,
        lora=setup.lora,
        data=setup.data,
        task=setup.task,
        seed=setup.seed,
        adapter=adapter,
        labels=setup.labels,
        base_sha256=setup.base_sha256,
        method=setup.method,
    )
    return follow(tuned, settings, number, trained)
