"""One config at several values of a key and several seeds: a table and a curve with its spread.

Every run trains on the same private records, so all runs together cost more than each of them: their
composition is computed and said. A choice among them is covered only by that figure.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedslm import layout, simulation
from fedslm.config import Config
from fedslm.errors import OutOfRange
from fedslm.federation.observers import Observer
from fedslm.privacy import accounting
from fedslm.records import Event, epsilon_as_json
from fedslm.reporting.plots import plot_spread
from fedslm.storage import json_text, write_text

MOST_RUNS = 200
Load = Callable[[Mapping[str, Any]], Config]


@dataclass(frozen=True)
class Question:
    """What is varied.

    Attributes:
        key: A dotted key, such as ``privacy.epsilon``.
        values: Its values, as text.
        seeds: Number of seeds, >= 1: run.seed, run.seed + 1, …
        directory: Where the runs are.
    """

    key: str
    values: tuple[str, ...]
    seeds: int
    directory: Path


@dataclass(frozen=True)
class Point:
    """Result at one value.

    Attributes:
        value: The value, as text.
        before: The metric before training.
        scores: The metric after training, one for each seed.
        epsilon: Largest epsilon of a run; "infinite" without privacy.
        learns: Whether the plan's signal-to-noise ratio is large enough; None without privacy.
    """

    value: str
    before: float
    scores: tuple[float, ...]
    epsilon: float | str
    learns: bool | None

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.scores)


@dataclass(frozen=True)
class Sweep:
    """All results.

    Attributes:
        key: The varied key.
        metric: The task's main metric.
        points: One for each value.
        runs: Number of runs.
        together: Epsilon of all runs together, for one client's unit; None without privacy.
        delta: Its delta: the largest of the runs.
    """

    key: str
    metric: str
    points: tuple[Point, ...]
    runs: int
    together: float | str | None
    delta: float | None

    def columns(self) -> tuple[str, ...]:
        """Heads of the table."""
        return self.key, "ε", f"{self.metric} before", "mean", "range over seeds", "learns"

    def rows(self) -> list[tuple[str, ...]]:
        """One row for each value."""
        return [
            (
                point.value,
                _figure(point.epsilon),
                f"{point.before:.4f}",
                f"{point.mean:.4f}",
                f"{min(point.scores):.4f} to {max(point.scores):.4f}",
                {None: "–", True: "yes", False: "no"}[point.learns],
            )
            for point in self.points
        ]

    def notes(self) -> list[str]:
        """What must be known about the table."""
        if self.together is None:
            return []
        return [
            f"all {self.runs} runs together cost ε = {_figure(self.together)} at δ = {self.delta:g}: a "
            f"choice among them is covered by this figure, not by that of one run"
        ]


def sweep(load: Load, question: Question, observers: Sequence[Observer] = ()) -> Sweep:
    """Runs all values and seeds; finished runs are kept, an interrupted one continues.

    Args:
        load: Reads the config with further overrides.
        question: What is varied.
        observers: Receive the progress of each run.

    Raises:
        OutOfRange: There is nothing to vary, or there are too many runs.
        FedslmError: A run fails, or a directory contains a run of another config.
    """
    runs = len(question.values) * question.seeds
    once = len(set(question.values)) == len(question.values)
    if question.seeds < 1 or not 1 <= runs <= MOST_RUNS or not once:
        raise OutOfRange(
            f"values={','.join(question.values)} and seeds={question.seeds} give {runs} runs; give "
            f"1 to {MOST_RUNS} runs, and each value once"
        )
    configs = {
        (value, number): _config(load, question, value, number)
        for value in question.values
        for number in range(question.seeds)
    }  # all are read before the first run starts
    reports = {key: _report(config, observers) for key, config in configs.items()}
    found = _summary(question, reports)
    write(found, question.directory)
    return found


def _config(load: Load, question: Question, value: str, number: int) -> Config:
    """The config of one run."""
    seed = load({}).run.seed + number
    name = f"{value.replace('/', '_')}-seed{seed}"
    return load(
        {
            question.key: value,
            "run.seed": seed,
            "run.directory": str(question.directory / name),
        }
    )


def _report(config: Config, observers: Sequence[Observer]) -> dict[str, Any]:
    """Runs, continues or reads one run."""
    path = Path(str(config.run.directory))
    if (path / layout.CONFIG_JSON).exists():
        return simulation.resume(path, observers, config)
    return simulation.simulate(config, observers)


def _summary(question: Question, reports: Mapping[tuple[str, int], dict[str, Any]]) -> Sweep:
    """Collects the results."""
    every = list(reports.values())
    metric = every[0]["headline"]
    points = []
    for value in question.values:
        mine = [report for (other, _), report in reports.items() if other == value]
        outlook = mine[0]["outlook"]
        points.append(
            Point(
                value,
                mine[0]["metrics_before"][metric],
                tuple(report["metrics_after"][metric] for report in mine),
                max((report["epsilon"] for report in mine), key=lambda each: float(_number(each))),
                None if outlook is None else all(report["outlook"]["learns"] for report in mine),
            )
        )
    events = tuple(_events(every))
    private = all(report["plan"] is not None for report in every)
    delta = max(report["delta"] for report in every) if private else None
    together = epsilon_as_json(accounting.epsilon(events, delta)) if delta is not None else None
    return Sweep(question.key, metric, tuple(points), len(every), together, delta)


def _events(reports: Sequence[dict[str, Any]]) -> Iterator[Event]:
    """What one unit is charged at most in all private runs: spare rounds and metrics count too."""
    for report in reports:
        if (plan := report["plan"]) is None:
            continue
        clients = len(report["clients"]) if report["overlapping"] else 1
        steps = plan["steps_per_round"] * plan["rounds"] * clients
        yield Event(plan["sample_rate"], plan["noise_multiplier"], steps)
        if (metric := plan["metric_noise_multiplier"]) is not None:
            yield Event(1.0, metric, plan["rounds"] * clients)


def _number(epsilon: float | str) -> float:
    """Epsilon of a report as a number."""
    return float("inf") if isinstance(epsilon, str) else epsilon


def _figure(epsilon: float | str) -> str:
    """Writes an epsilon."""
    return "∞" if isinstance(epsilon, str) else f"{epsilon:.2f}"


def write(found: Sweep, directory: Path) -> None:
    """Writes ``sweep.json``, ``sweep.md`` and ``sweep.png``."""
    lines = [found.columns(), tuple("---" for _ in found.columns()), *found.rows()]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    notes = "".join(f"\n{note[:1].upper()}{note[1:]}.\n" for note in found.notes())
    picture = f"![{found.metric}]({layout.SWEEP_PLOT})"
    text = f"# {found.metric} over {found.key}\n\n{table}\n{notes}\n{picture}\n"
    write_text(directory / layout.SWEEP_PAGE, text)
    values = {
        "key": found.key,
        "metric": found.metric,
        "runs": found.runs,
        "together": found.together,
        "delta": found.delta,
        "points": [
            {
                "value": point.value,
                "epsilon": point.epsilon,
                "before": point.before,
                "mean": point.mean,
                "scores": list(point.scores),
                "learns": point.learns,
            }
            for point in found.points
        ],
    }
    write_text(directory / layout.SWEEP, json_text(values, indent=2) + "\n")
    plot_spread(
        directory / layout.SWEEP_PLOT,
        {point.value: point.scores for point in found.points},
        axes=(found.key, found.metric),
    )
