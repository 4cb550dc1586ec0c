"""What a search leaves: ``recipe.toml``, ``tune.md``, and the command that uses it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedslm import layout
from fedslm.inference.bootstrap import Estimate
from fedslm.recipes.choice import shown
from fedslm.rendering import cell
from fedslm.storage import json_text, write_text
from fedslm.tuning.search import LOWER_IS_BETTER, Result, Trial

_NOT_FINITE = float("inf")


def columns(result: Result) -> tuple[str, ...]:
    """Returns the heads of the table."""
    keys = (key.partition(".")[2] for key in result.own.values)
    return "trial", result.headline, "again", *keys, "noise"


def rows(result: Result) -> list[tuple[str, ...]]:
    """Returns one row for each trial, best first."""
    again = {each.number: each for each in result.trials if each.again}
    sign = 1 if result.headline in LOWER_IS_BETTER else -1

    def order(trial: Trial) -> tuple[float, int]:
        value = _NOT_FINITE if trial.value is None else sign * trial.value
        return value, trial.number

    first = sorted((each for each in result.trials if not each.again), key=order)
    return [
        (
            str(each.number),
            _figure(each.value),
            _figure(again[each.number].value) if each.number in again else "",
            *(shown(value) for value in each.values.values()),
            f"{each.noise_multiplier:.3g}",
        )
        for each in first
    ]


def _figure(value: float | None) -> str:
    """Writes a metric."""
    return "–" if value is None else f"{value:.4f}"


def verdict(result: Result) -> str:
    """Says in a sentence what is better, and by how much."""
    own, best, name = result.setting.own, result.best, result.headline
    if len([each for each in result.trials if not each.again]) == 1:
        return f"only trial 0 ran: {own} stay; raise --minutes or --trials"
    if best.number == 0:
        return f"no trial is better than trial 0: {own} stay"
    if result.difference is None:
        return f"trial {best.number} did not end when it ran again: {own} stay"
    margin = f"a difference of {_interval(result.difference)} in {name} when both ran again"
    if result.is_better:
        return f"trial {best.number} is better than {own}: {margin}"
    return f"trial {best.number} is not clearly better than trial 0: {margin}; {own} stay"


def _interval(estimate: Estimate) -> str:
    """Writes an estimate with its interval."""
    return f"{estimate.value:+.4f} (95 % interval {estimate.low:+.4f} to {estimate.high:+.4f})"


def command(result: Result, config: Path, overrides: Sequence[str]) -> str:
    """Returns the command of the run with the best settings.

    Args:
        result: The result.
        config: The config file.
        overrides: Those that the search was called with.
    """
    chosen = _chosen(result)
    kept = [each for each in overrides if each.partition("=")[0].strip() not in chosen]
    settings = [f"{key}={json_text(value)}" for key, value in chosen.items()]
    given = [part for each in (*kept, *settings) for part in ("--set", each)]
    return shlex.join(["fedslm", "simulate", str(config), *given])


def _chosen(result: Result) -> dict[str, Any]:
    """Returns the overrides to use: none if trial 0 stays."""
    return dict(result.best.values) if result.is_better else {}


def write(result: Result, directory: Path, line: str) -> None:
    """Writes ``recipe.toml`` and ``tune.md``.

    Args:
        result: The result.
        directory: The directory of the search.
        line: The command that uses it.
    """
    write_text(directory / layout.TUNED, _recipe(result))
    heads = columns(result)
    table = [heads, tuple("---" for _ in heads), *(tuple(map(cell, row)) for row in rows(result))]
    parts = [
        f"# Trials on public records ({datetime.now(UTC).date()})",
        _sentence(verdict(result)),
        "\n".join(f"| {' | '.join(row)} |" for row in table),
        "\n".join(f"- {_sentence(each)}" for each in (*result.setting.notes(), *_failures(result))),
        f"```\n{line}\n```",
    ]
    write_text(directory / layout.TUNE_PAGE, "\n\n".join(parts) + "\n")


def _failures(result: Result) -> list[str]:
    """Returns why trials gave no metric."""
    return [f"trial {each.number}: {each.error}" for each in result.trials if each.error]


def _sentence(text: str) -> str:
    """Begins a text with a capital and ends it with a full stop."""
    return f"{text[:1].upper()}{text[1:]}."


def _recipe(result: Result) -> str:
    """Returns the best overrides as a TOML fragment, with their evidence in comments."""
    own, best = result.own, result.best
    searched = len([each for each in result.trials if not each.again])
    facts = [
        f"fedslm tune, {datetime.now(UTC).date()}, {searched} trials (recipe {result.setting.recipe})",
        *result.setting.notes(),
        f"{result.headline}: {_figure(own.value)} in trial 0, {_figure(best.value)} in trial "
        f"{best.number}, the best",
        verdict(result),
    ]
    sections: dict[str, list[str]] = {}
    for key, value in _chosen(result).items():
        section, _, name = key.partition(".")
        sections.setdefault(section, []).append(f"{name} = {json_text(value)}")
    parts = [f"[{name}]\n" + "\n".join(lines) for name, lines in sections.items()]
    return "\n\n".join(["\n".join(f"# {fact}" for fact in facts), *parts]) + "\n"


def as_json(result: Result, directory: Path, line: str) -> dict[str, Any]:
    """Returns the result as JSON values."""
    difference = result.difference
    interval = None if difference is None else [difference.low, difference.high]
    return {
        "directory": str(directory),
        "recipe": result.setting.recipe,
        "metric": result.headline,
        "trials": len([each for each in result.trials if not each.again]),
        "own": result.own.value,
        "best": result.best.value,
        "best_trial": result.best.number,
        "is_better": result.is_better,
        "difference": None if difference is None else difference.value,
        "interval": interval,
        "overrides": _chosen(result),
        "verdict": verdict(result),
        "notes": result.setting.notes(),
        "command": line,
    }
