"""One config at several values of a key and several seeds: a table and a curve with its spread.

Every run trains on the same private records, so all runs together cost more than each of them: their
composition is computed and said. A choice among them is covered only by that figure.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedslm import layout, simulation, validation
from fedslm.config import Config
from fedslm.engines.placement import placed
from fedslm.errors import OutOfRange
from fedslm.federation.observers import Observer
from fedslm.privacy import accounting
from fedslm.recipes import Completed, completed
from fedslm.records import Event, epsilon_as_json
from fedslm.reporting.plots import plot_spread
from fedslm.storage import json_text, write_text
from fedslm.workers import Pool

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
        learns: Whether the plan's signal-to-noise ratio is large enough; None without privacy, or if no
            bound was measured for the task.
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
        together: Epsilon of all runs together, for one client's unit; None if no run is private, or if
            they protect different units.
        delta: Its delta: the largest of the runs; None if no run is private.
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
        if self.together is None and self.delta is None:
            return []
        if self.together is None:
            return ["the runs protect different units, so there is no common ε of all of them"]
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
    if question.key.startswith("run."):
        raise OutOfRange(f"key={question.key!r} names a run; vary another key, and give --seeds")
    configs = {
        (value, number): _config(load, question, value, number)
        for number in range(question.seeds)
        for value in question.values
    }  # all are complete and valid before the first run starts
    if len({made.config.run.directory for made in configs.values()}) < runs:
        raise OutOfRange(
            f"values={','.join(question.values)} must differ in letters or digits, which name the runs"
        )
    with _workers([made.config for made in configs.values()], question.directory) as pool:
        reports = {key: _report(made, observers, pool) for key, made in configs.items()}
    found = _summary(question, reports)
    write(found, question.directory)
    return found


def _config(load: Load, question: Question, value: str, number: int) -> Completed:
    """The complete config of one run."""
    seed = load({}).run.seed + number
    place = question.directory / f"{re.sub(r'[^A-Za-z0-9.+-]', '_', value)}-seed{seed}"
    made = completed(load({question.key: value, "run.seed": seed, "run.directory": str(place)}))
    validation.check(made.config)
    return made


@contextmanager
def _workers(configs: Sequence[Config], directory: Path) -> Iterator[Pool | None]:
    """Workers of all runs, which find base and cached layers loaded; None if a run needs others."""
    left = [each for each in configs if not (simulation.run_path(each) / layout.REPORT).exists()]
    places = [placed(each) if each.engine.name == "local" else None for each in left]
    if len(left) < 2 or None in places or any(place != places[0] for place in places):
        yield None
        return
    private = [each for each in left if each.privacy.unit != "none"]
    directory.mkdir(parents=True, exist_ok=True)
    with closing(simulation.workers_for((private or left)[0], directory / layout.CLIENTS_LOG)) as pool:
        yield pool


def _report(made: Completed, observers: Sequence[Observer], pool: Pool | None) -> dict[str, Any]:
    """Runs, continues or reads one run."""
    path = simulation.run_path(made.config)
    if (path / layout.CONFIG_JSON).exists():
        return simulation.resume(path, observers, made.config, pool)
    return simulation.simulate(made, observers, pool)


def _summary(question: Question, reports: Mapping[tuple[str, int], dict[str, Any]]) -> Sweep:
    """Collects the results."""
    every = list(reports.values())
    metric = every[0]["headline"]
    points = []
    for value in question.values:
        mine = [report for (other, _), report in reports.items() if other == value]
        outlook = mine[0]["outlook"]  # a function of the config, which seeds do not change
        points.append(
            Point(
                value,
                mine[0]["metrics_before"][metric],
                tuple(report["metrics_after"][metric] for report in mine),
                max((report["epsilon"] for report in mine), key=lambda each: float(_number(each))),
                None if outlook is None else outlook["learns"],
            )
        )
    together, delta = _together(every)
    return Sweep(question.key, metric, tuple(points), len(every), together, delta)


def _together(reports: Sequence[dict[str, Any]]) -> tuple[float | str | None, float | None]:
    """Epsilon and delta of all runs; None if none is private, or if they protect different units."""
    plans = [report["plan"] for report in reports]
    units = {None if plan is None else (plan["unit"], plan.get("unit_column")) for plan in plans}
    if units == {None}:
        return None, None
    delta = max(report["delta"] for report in reports if report["plan"] is not None)
    if None in units:
        return epsilon_as_json(math.inf), delta
    if len(units) > 1:
        return None, delta
    return epsilon_as_json(accounting.epsilon(tuple(_events(reports)), delta)), delta


def _events(reports: Sequence[dict[str, Any]]) -> Iterator[Event]:
    """What one unit is charged at most in all private runs: spare rounds and metrics count too."""
    for report in reports:
        if (plan := report["plan"]) is None:
            continue
        clients = len(report["clients"]) if report["overlapping"] else 1
        steps = plan["steps_per_round"] * plan["rounds"] * clients
        shares = plan.get("shares")  # absent in reports of older versions
        honest = None if shares is None else shares["threshold"] - shares["max_colluding"]
        yield Event(plan["sample_rate"], plan["noise_multiplier"], steps, honest)
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
