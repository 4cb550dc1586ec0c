"""Formats of an evaluation, for people and programs: table rows, Markdown, JSON."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from fedslm.errors import plural
from fedslm.inference.bootstrap import CONFIDENCE, Estimate
from fedslm.inference.evaluation import Evaluation
from fedslm.inference.trained import Trained

_STARTS = {
    "random": "is untrained",
    "labels": "starts from the names of the classes, without training",
    "public": "is fitted to public records; no private record was used",
}
COLUMNS = ("metric", "base", "tuned", "difference")


def rows_of(found: Evaluation) -> list[tuple[str, str, str, str]]:
    """Returns one row of ``COLUMNS`` for each metric."""
    return [
        (name, _shown(each.base), _shown(each.tuned), _shown(each.difference, "+"))
        for name, each in found.metrics.items()
    ]


def notes_of(trained: Trained, found: Evaluation, resamples: int) -> list[str]:
    """Returns the notes that are needed to read the table."""
    notes = [
        f"{plural(found.records, 'record')}; in brackets {CONFIDENCE:.0%} intervals from "
        f"{resamples} bootstrap resamples of them; differences are paired"
    ]
    if trained.has_new_head:
        notes.append(
            "the base has no classifier for this task: its figures are those of the run's starting "
            f"adapter, whose head {_STARTS[trained.run.task.head]}"
        )
    else:
        notes.append("base: the same model without the adapter")
    if found.written:
        notes.append(
            f"ROUGE (F, stemmed) and exact match: texts written for {plural(found.written, 'record')}"
        )
    if found.skipped:
        notes.append(
            f"{plural(found.skipped, 'record')} left out: no text, or a label unknown to the run"
        )
    if found.truncated:
        notes.append(f"{plural(found.truncated, 'record')} cut to {trained.run.task.max_length} tokens")
    return notes


def markdown_of(title: str, found: Evaluation, notes: list[str]) -> str:
    """Returns the table as Markdown, with its notes."""
    lines = [f"# {title}", "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in rows_of(found)]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes), ""])


def json_of(found: Evaluation) -> dict[str, Any]:
    """Returns the evaluation as plain values; an interval that no resample defines is null."""
    values = asdict(found)
    for comparison in values["metrics"].values():
        for estimate in comparison.values():
            for key, value in estimate.items():
                estimate[key] = value if value == value else None
    return {"confidence": CONFIDENCE, **values}


def _shown(estimate: Estimate, sign: str = "") -> str:
    """Formats a value with its interval."""
    value, low, high = (_number(x, sign) for x in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"


def _number(value: float, sign: str = "") -> str:
    """Formats a number with at least four digits, or with four decimals if it is below one.

    >>> [_number(value) for value in (0.5, 13.437, 17720.3)], _number(0.5, "+")
    (['0.5000', '13.44', '17720'], '+0.5000')
    """
    if not math.isfinite(value):
        return "–"
    whole = len(f"{abs(value):.0f}") if abs(value) >= 1 else 0
    return format(value, f"{sign}.{max(0, 4 - whole)}f")
