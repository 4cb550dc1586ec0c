"""Reports of a distillation for people: the report, its figure and the student's model card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedslm import layout
from fedslm.config import ModelConfig, TaskConfig
from fedslm.config.tasks import TASKS
from fedslm.rendering import render
from fedslm.storage import expand, json_text, replacing, write_text

_MOST_POINTS = 400


@dataclass(frozen=True)
class Sections:
    """The settings that the code on the model card needs.

    Attributes:
        model: The student's model section.
        task: The student's task section.
    """

    model: ModelConfig
    task: TaskConfig


def write(directory: Path, report: dict[str, Any], sections: Sections) -> None:
    """Writes ``distill.json``, ``distill.md``, ``distill.png`` and the adapter's card.

    Args:
        directory: Directory that contains ``adapter/``.
        report: The content of ``distill.json``; a "proof" in it becomes a section.
        sections: The student and its task.
    """
    plot_losses(directory / "distill.png", report["losses"], report["method"])
    if report["proof"] is not None:
        plot_arms(directory / "proof.png", report["proof"])
    write_text(directory / layout.DISTILL_PAGE, render("distill.md.j2", report=report))
    shown = {**report, "base_model": expand(sections.model.base)}
    values = {"report": shown, "config": sections, "dtype": sections.model.dtype}
    card = render("student_card.md.j2", tasks=TASKS, **values)
    write_text(directory / layout.ADAPTER / "README.md", card)
    write_text(directory / layout.DISTILL_REPORT, json_text(report, indent=2) + "\n")


def plot_losses(path: Path, losses: list[float], method: str) -> None:
    """Plots the loss over the steps."""
    from matplotlib.figure import Figure

    stride = max(1, len(losses) // _MOST_POINTS)
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(range(1, len(losses) + 1, stride), losses[::stride], color="tab:blue", linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel("loss of a position (nats)")
    axes.set_title(f"distillation by {method}")
    axes.grid(alpha=0.3)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def plot_arms(path: Path, proof: dict[str, Any]) -> None:
    """Plots each arm's metric with its interval, and the gain over each control.

    Args:
        path: The PNG to write.
        proof: The "proof" of ``distill.json``.
    """
    from matplotlib.figure import Figure

    arms, gains = proof["arms"], proof["gains"]
    figure = Figure(figsize=(9, 0.9 + 0.4 * max(len(arms), len(gains))), layout="constrained")
    left, right = figure.subplots(1, 2)
    _bars(left, {name: arm["headline"] for name, arm in arms.items()}, "tab:blue")
    left.set_xlabel(f"{proof['headline']} on the private distribution")
    _bars(right, gains, "tab:green" if proof["gain"] else "tab:gray")
    right.axvline(0, color="black", linewidth=0.8)
    right.set_xlabel("gain over each control")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _bars(axes: Any, estimates: dict[str, dict[str, float]], color: str) -> None:
    """Draws points with 95 % intervals, the first on top."""
    names = list(estimates)[::-1]
    for position, name in enumerate(names):
        each = estimates[name]
        axes.plot([each["low"], each["high"]], [position, position], color=color, linewidth=2)
        axes.plot(each["value"], position, "o", color=color)
    axes.set_yticks(range(len(names)), names)
    axes.grid(alpha=0.3, axis="x")
