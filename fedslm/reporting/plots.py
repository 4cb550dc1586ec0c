"""Figures of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedslm.privacy.planning import BudgetPlan
from fedslm.records import RoundRecord
from fedslm.storage import replacing

# Fixed: a layout engine nearly doubles the plotting time.
_MARGINS = {"left": 0.1, "right": 0.9, "bottom": 0.15, "top": 0.9}


def _figure() -> Any:
    """Creates an empty figure with room for labels on both sides."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5))
    figure.subplots_adjust(**_MARGINS)
    return figure


def plot_rounds(path: Path, records: list[RoundRecord], report: dict[str, Any]) -> None:
    """Plots the public metric over the rounds and, under privacy, epsilon on a second axis.

    Args:
        path: The PNG to write.
        records: Records of the rounds.
        report: The content of ``report.json``.
    """
    headline = report["headline"]
    evaluated = [(r.round, r.metrics[headline]) for r in records if r.metrics]
    points = [(0, report["metrics_before"][headline]), *evaluated]
    figure = _figure()
    axes = figure.add_subplot()
    axes.plot(*zip(*points, strict=True), color="tab:blue", marker="o", markersize=3)
    axes.set_xlabel("round")
    axes.set_ylabel(f"{headline} (public split)", color="tab:blue")
    axes.set_title(report["name"])
    axes.grid(alpha=0.3)
    if report["plan"] is not None:
        spent = [0.0, *(record.epsilon for record in records)]
        right = axes.twinx()
        rounds = [0, *(record.round for record in records)]
        right.plot(rounds, spent, color="tab:red", linestyle="--")
        right.set_ylabel(f"ε spent (δ = {report['delta']:g})", color="tab:red")
        right.set_ylim(bottom=0)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def plot_budget(path: Path, answer: BudgetPlan) -> None:
    """Plots epsilon over the rounds at several deltas.

    Args:
        path: The PNG to write.
        answer: A planned run.
    """
    figure = _figure()
    axes = figure.add_subplot()
    rounds = [0, *(point.round for point in answer.curve)]
    for index, delta in enumerate(answer.deltas):
        epsilons = [0.0, *(point.epsilons[index] for point in answer.curve)]
        axes.plot(rounds, epsilons, marker="o", markersize=3, label=f"δ = {delta:g}")
    axes.set_xlabel("round")
    axes.set_ylabel(f"ε of one {answer.unit}")
    axes.set_title(
        f"noise multiplier {answer.noise_multiplier:g}, sample rate {answer.sample_rate:g}, "
        f"{answer.steps} steps"
    )
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def plot_spread(path: Path, scores: Mapping[str, Sequence[float]], *, axes: tuple[str, str]) -> None:
    """Plots the mean at several values, and the range over seeds.

    Args:
        path: The PNG to write.
        scores: Value to its scores.
        axes: Names of the value and of the score.
    """
    figure = _figure()
    panel = figure.add_subplot()
    places = list(range(len(scores)))
    means = [sum(each) / len(each) for each in scores.values()]
    below = [mean - min(each) for mean, each in zip(means, scores.values(), strict=True)]
    above = [max(each) - mean for mean, each in zip(means, scores.values(), strict=True)]
    panel.errorbar(places, means, yerr=[below, above], marker="o", markersize=4, capsize=4)
    panel.set_xticks(places, list(scores))
    panel.set_xlabel(axes[0])
    panel.set_ylabel(f"{axes[1]} (public split)")
    panel.grid(alpha=0.3)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
