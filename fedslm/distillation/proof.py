"""Proof of transfer: whether the student gains from client knowledge, not only from public records.

A gain is claimed only if the paired interval of the federated arm over *every* control is above 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from fedslm.distillation.controls import (
    BASE,
    CONTROLS,
    FEDERATED,
    POOLED,
    WHAT,
    ControlTrainer,
    LeftOut,
)
from fedslm.distillation.evaluation import (
    Tests,
    general_task,
    measure,
    measure_decoding,
    tests_of,
)
from fedslm.errors import ConfigError, Problem
from fedslm.inference.bootstrap import Draws, Estimate, Statistics, compare
from fedslm.inference.inputs import Rows
from fedslm.records import AdapterState
from fedslm.tasks.base import Example

TEACHER, DECODING = "federated small model", "decoding-time reference"
_WHAT = {
    **WHAT,
    TEACHER: "the teacher itself",
    DECODING: "proxy-tuning: nothing trained, three models at every token (reference)",
}
LOWER_IS_BETTER = ("loss",)
MOST_PERPLEXITY = 0.02
GROUP = "group"
_FEWEST_RESAMPLES = 1000


@dataclass(frozen=True)
class ProofRequest:
    """Data and settings of a transfer proof.

    Attributes:
        tests: Records of the private distribution that no model was trained on.
        probe: Records that only some clients could know; the column "group" separates them.
        general: General text in the student's tokens that was not used for regularization.
        seeds: Number of starting adapters and data orders used for each arm, >= 1.
        resamples: Number of bootstrap resamples, >= 1000.
        ceiling: Also train the student on all private records, if a simulation has them.

    Raises:
        ConfigError: A number is too small, or there are no test records.
    """

    tests: Rows
    probe: Rows = field(default_factory=list)
    general: tuple[Example, ...] = ()
    seeds: int = 1
    resamples: int = 2000
    ceiling: bool = True

    def __post_init__(self) -> None:
        if self.resamples < _FEWEST_RESAMPLES:
            message = f"value {self.resamples} must be at least {_FEWEST_RESAMPLES}"
            raise ConfigError([Problem("resamples", message)])
        if self.seeds < 1:
            raise ConfigError([Problem("seeds", f"value {self.seeds} must be at least 1")])
        if not self.tests:
            message = "is missing, and the run's evaluation split is gone: a proof needs test records"
            raise ConfigError([Problem("test", message)])


def prove(trainer: ControlTrainer, question: ProofRequest) -> dict[str, Any]:
    """Trains every arm and compares the arms.

    Args:
        trainer: Both models.
        question: Test data and number of seeds.

    Returns:
        The "proof" of ``distill.json``.

    Raises:
        DataError: No test record can be read by both models.
    """
    adapters, left_out = _trained(trainer, question)
    tests = tests_of(question.tests, trainer.teacher.reader, trainer.student.reader)
    found = _statistics(trainer, adapters, tests, left_out)
    draws = Draws(question.resamples, trainer.job.run.seed)
    headline = trainer.teacher.task.headline
    lower = headline in LOWER_IS_BETTER
    gains = {
        control: _gain(found[control], found[FEDERATED], trainer, draws)
        for control in CONTROLS
        if control in found
    }
    arms = {
        name: {
            "what": _WHAT[name],
            "headline": asdict(_estimate(each, trainer, draws)),
            "metrics": _metrics(each, trainer),
        }
        for name, each in found.items()
    }
    return {
        "headline": headline,
        "lower_is_better": lower,
        "records": len(tests.rows),
        "seeds": question.seeds,
        "resamples": question.resamples,
        "arms": arms,
        "left_out": left_out,
        "gains": {name: asdict(each) for name, each in gains.items()},
        "gain": all(each.low > 0 for each in gains.values()),
        "recovered": _recovered(arms, lower=lower),
        **_probe(trainer, adapters, question.probe, headline),
        "general": _general(trainer, adapters, question.general),
    }


Adapters = Mapping[str, Sequence[AdapterState]]


def _trained(
    trainer: ControlTrainer, question: ProofRequest
) -> tuple[dict[str, list[AdapterState]], dict[str, str]]:
    """Each arm's adapters, one per seed; and the arms that cannot be run, with reasons."""
    adapters: dict[str, list[AdapterState]] = {}
    left_out: dict[str, str] = {}
    seeds = range(trainer.job.run.seed, trainer.job.run.seed + question.seeds)
    for arm in WHAT:
        if arm == POOLED and not question.ceiling:
            left_out[arm] = "not asked for"
            continue
        try:
            adapters[arm] = [trainer.adapter(arm, seed) for seed in seeds]
        except LeftOut as error:
            left_out[arm] = str(error)
    return adapters, left_out


def _statistics(
    trainer: ControlTrainer, adapters: Adapters, tests: Tests, left_out: dict[str, str]
) -> dict[str, Statistics]:
    """Statistics of each test record under each arm, averaged over seeds; and the two references."""
    student, teacher = trainer.student, trainer.teacher
    found = {
        arm: _mean([measure(student.model, student.task, tests.student, each) for each in several])
        for arm, several in adapters.items()
    }
    small = teacher.trained.model
    found[TEACHER] = measure(small, teacher.task, tests.teacher, teacher.tuned)
    if trainer.job.is_language and trainer.job.vocabulary:
        settings = trainer.job.settings
        found[DECODING] = measure_decoding(
            teacher,
            student,
            tests.student,
            vocabulary=trainer.job.vocabulary,
            alpha=settings.alpha,
            clip=settings.clip,
        )
    else:
        why = "a new head has no base to shift" if not trainer.job.is_language else "other tokenizers"
        left_out[DECODING] = why
    return found


def _mean(several: Sequence[Statistics]) -> Statistics:
    """Averages the statistics of each record over seeds."""
    return {name: np.mean([each[name] for each in several], axis=0) for name in several[0]}


def _metrics(found: Statistics, trainer: ControlTrainer) -> dict[str, float]:
    """Returns the task's metrics."""
    return trainer.teacher.task.metrics({name: each.sum(axis=0) for name, each in found.items()})


def _estimate(found: Statistics, trainer: ControlTrainer, draws: Draws) -> Estimate:
    """Returns an arm's main metric with its interval."""
    task = trainer.teacher.task
    return compare((found, found), task.metrics, draws)[task.headline].tuned


def _gain(
    control: Statistics, federated: Statistics, trainer: ControlTrainer, draws: Draws
) -> Estimate:
    """Paired improvement of the federated arm over a control; positive is better."""
    task = trainer.teacher.task
    difference = compare((control, federated), task.metrics, draws)[task.headline].difference
    if task.headline not in LOWER_IS_BETTER:
        return difference
    return Estimate(-difference.value, -difference.high, -difference.low)


def _recovered(arms: Mapping[str, Any], *, lower: bool) -> float | None:
    """Share of the ceiling's gain over the plain student that was reached; None if it has no gain."""
    if POOLED not in arms:
        return None
    sign = -1.0 if lower else 1.0
    base, ceiling, reached = (
        sign * arms[name]["headline"]["value"] for name in (BASE, POOLED, FEDERATED)
    )
    return (reached - base) / (ceiling - base) if ceiling > base else None


def _probe(trainer: ControlTrainer, adapters: Adapters, rows: Rows, headline: str) -> dict[str, Any]:
    """Returns the main metric of each arm on each group of the probe."""
    if not rows:
        return {"probe": {}, "probe_groups": []}
    tests = tests_of(rows, trainer.teacher.reader, trainer.student.reader)
    groups = [str(row.get(GROUP) or "all") for row in tests.rows]
    names = sorted(set(groups))
    found = _statistics(trainer, adapters, tests, {})
    probe = {
        arm: {name: _metrics(_of_group(each, groups, name), trainer)[headline] for name in names}
        for arm, each in found.items()
    }
    return {"probe": probe, "probe_groups": names}


def _of_group(found: Statistics, groups: Sequence[str], name: str) -> Statistics:
    """Returns statistics of the records of one group."""
    chosen = np.array([group == name for group in groups])
    return {key: values[chosen] for key, values in found.items()}


def _general(
    trainer: ControlTrainer, adapters: Adapters, examples: Sequence[Example]
) -> dict[str, Any] | None:
    """Perplexity on general text before and after; None if there is no such text."""
    if not examples or not trainer.job.is_language:
        return None
    task, model = general_task(trainer.job.run), trainer.student.model

    def perplexities() -> Iterator[float]:
        for arm in (BASE, FEDERATED):
            found = _mean([measure(model, task, examples, each) for each in adapters[arm]])
            yield task.metrics({name: each.sum(axis=0) for name, each in found.items()})["perplexity"]

    before, after = perplexities()
    change = after / before - 1
    return {
        "records": len(examples),
        "before": before,
        "after": after,
        "change": change,
        "most": MOST_PERPLEXITY,
        "held": change <= MOST_PERPLEXITY,
    }
