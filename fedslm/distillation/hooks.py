"""Distillation as a part of a simulation: after the last round, and optionally between rounds.

torch is imported only when it is needed: a simulation's server runs model computations in its workers.
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
        """Prints progress on standard error."""
        if 4 * done // total > 4 * (done - 1) // total:
            sys.stderr.write(f"{stage}: {done}/{total} {note}\n")
            sys.stderr.flush()


def check_asked(settings: DistillConfig) -> None:
    """Checks that the student and its settings exist, before the first round.

    Raises:
        ConfigError: A setting is missing.
        ModelError: The student does not exist.
    """
    if settings.student is None:
        return
    from fedslm.config import ModelConfig
    from fedslm.distillation.models import find_student

    find_student(ModelConfig(base=settings.student))


def distill_if_asked(path: Path, settings: DistillConfig) -> None:
    """Distills a finished run into its own directory, if configured and not done yet."""
    if is_distilled(path, settings):
        return
    from fedslm.distillation.run import distill, prepare
    from fedslm.inference.trained import open_run

    distill(prepare(open_run(path), settings), path / layout.DISTILLED, Printed())


def is_distilled(path: Path, settings: DistillConfig) -> bool:
    """Whether a run needs no student, or its student is finished."""
    if settings.student is None:
        return True
    return (path / layout.DISTILLED / layout.DISTILL_REPORT).exists()


def follower(settings: DistillConfig, rounds: int, call: Callable[..., Any]) -> Follow | None:
    """Returns a callback for each round's adapter; None if there is no distillation between rounds.

    Args:
        settings: The ``[distill]`` section.
        rounds: Number of rounds of the run: after the last, the run itself is distilled.
        call: Runs a function where the models are loaded.
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
