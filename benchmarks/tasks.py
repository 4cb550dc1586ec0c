"""Every task without privacy, at epsilon = 8 and at epsilon = 3: writes docs/tasks.md.

FEDSLM_ASSETS=… FEDSLM_DERIVED=… python benchmarks/tasks.py

FEDSLM_DERIVED is what ``simulations/derive.py`` made. Runs that are complete under ``runs/tasks`` are
not repeated; an interrupted one is resumed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from arms import FEDSLM, ROOT, RUNS, finished_run

from fedslm.tasks.token_classification import entities

TASK_RUNS = RUNS / "tasks"
PAGE, TEMPLATE = ROOT / "docs" / "tasks.md", ROOT / "benchmarks" / "tasks.md.in"
EVALUATE_SECONDS = 900


@dataclass(frozen=True)
class Scenario:
    """One row of the table.

    Attributes:
        task: The task, for people.
        model: The base model, for people.
        metric: The metric that is shown.
        private: Overrides of the private arms.
        open: Overrides of the arm without privacy.
        written: Metric of written texts, if texts are written too.
    """

    task: str
    model: str
    metric: str
    private: tuple[str, ...] = ()
    open: tuple[str, ...] = ()
    written: str = ""


SCENARIOS: Mapping[str, Scenario] = {
    "banking77": Scenario("77 intents", "all-MiniLM-L6-v2", "accuracy"),
    "bc5cdr_kinds": Scenario("several labels", "minilm-l3-pruned", "f1_macro"),
    "bc5cdr": Scenario("named entities", "minilm-l3-pruned", "f1"),
    "shakespeare": Scenario(
        "next token",
        "stories260K",
        "loss",
        private=("privacy.unit=record", "aggregation.method=ffa"),
    ),
    "medquad": Scenario("instructions", "stories260K", "loss"),
    "e2e": Scenario("text from data", "tiny T5 (0.9 M)", "loss", written="rougeL"),
    "medquad_preference": Scenario("preference", "stories260K", "accuracy"),
}
ARMS: Mapping[str, float | None] = {"none": None, "epsilon-8": 8.0, "epsilon-3": 3.0}


@dataclass(frozen=True)
class Outcome:
    """One run and its evaluation."""

    report: dict[str, Any]
    metrics: dict[str, Any] = field(default_factory=dict)


def overrides_of(scenario: Scenario, arm: str) -> Iterator[str]:
    """What an arm changes in its scenario's file."""
    epsilon = ARMS[arm]
    if epsilon is None:
        yield from ("privacy.unit=none", *scenario.open)
    else:
        yield from (f"privacy.epsilon={epsilon}", *scenario.private)


def run(name: str, arm: str) -> Path:
    """Runs or resumes one arm; gives its directory."""
    config = ROOT / "simulations" / "local" / f"{name}.toml"
    return finished_run(config, TASK_RUNS / f"{name}-{arm}", overrides_of(SCENARIOS[name], arm))


def evaluation(name: str, directory: Path) -> dict[str, Any]:
    """Metrics with intervals, kept beside the run."""
    kept = directory / "evaluation.json"
    if not kept.exists():
        command = [FEDSLM, "evaluate", str(directory), "--json"]
        if SCENARIOS[name].written:
            command.append("--generate")
        done = subprocess.run(
            command, check=True, timeout=EVALUATE_SECONDS, stdout=subprocess.PIPE, text=True
        )
        kept.write_text(done.stdout.splitlines()[-1], encoding="utf-8")
    metrics: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))["metrics"]
    return metrics


def outcome_of(name: str, arm: str) -> Outcome | None:
    """What is there of one arm; None if nothing is complete."""
    directory = TASK_RUNS / f"{name}-{arm}"
    if not (directory / "evaluation.json").exists():
        return None
    report = json.loads((directory / "report.json").read_text(encoding="utf-8"))
    report["directory"] = str(directory)  # wherever it was made
    return Outcome(report, evaluation(name, directory))


def trivial(report: dict[str, Any]) -> str:
    """The metric of the best answer that needs no learning, on the same records."""
    rows = pq.read_table(Path(report["directory"]) / "data" / "evaluation.parquet").to_pylist()
    config = tomllib.loads((Path(report["directory"]) / "config.toml").read_text(encoding="utf-8"))
    column = config["data"]["label_column"]
    match report["task"]:
        case "classification":
            counts = Counter(row[column] for row in rows)
            return f"{max(counts.values()) / len(rows):.3f} (commonest class)"
        case "multi-label":
            shares = [np.mean([label in row[column] for row in rows]) for label in report["labels"]]
            return f"{np.mean([2 * share / (1 + share) for share in shares]):.3f} (all labels)"
        case "token-classification":
            best = max((_every_word(rows, column, tag), tag) for tag in report["labels"])
            return f"{best[0]:.3f} (every word {best[1]})"
        case "preference":
            return "0.500 (a guess)"
    return "–"


def _every_word(rows: list[dict[str, Any]], column: str, tag: str) -> float:
    """Entity F1 if every word had this tag."""
    actual = [entities(row[column]) for row in rows]
    guessed = [entities([tag] * len(row[column])) for row in rows]
    right = sum(len(a & g) for a, g in zip(actual, guessed, strict=True))
    return 2 * right / max(1, sum(map(len, actual)) + sum(map(len, guessed)))


def interval(value: dict[str, Any]) -> str:
    """A value and its interval."""
    return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def row(name: str, arm: str, outcome: Outcome) -> str:
    """One line of the table."""
    scenario, report = SCENARIOS[name], outcome.report
    shown = [scenario.metric, *([scenario.written] if scenario.written else [])]
    before = "<br>".join(f"{outcome.metrics[each]['base']['value']:.3f}" for each in shown)
    after = "<br>".join(interval(outcome.metrics[each]["tuned"]) for each in shown)
    epsilon = "∞" if report["plan"] is None else f"{report['epsilon']:.2f}"
    megabytes = (report["bytes_down"] + report["bytes_up"]) / 1e6
    cells = [
        f"`{name}`: {scenario.task}",
        scenario.model,
        str(len(report["clients"])),
        "<br>".join(shown),
        epsilon,
        trivial(report),
        before,
        after,
        f"{report['seconds']:.0f} s",
        f"{megabytes:.1f} MB",
    ]
    return f"| {' | '.join(cells)} |"


def write_table() -> None:
    """Writes docs/tasks.md from what is there."""
    found = [(name, arm, outcome_of(name, arm)) for name in SCENARIOS for arm in ARMS]
    rows = [row(name, arm, outcome) for name, arm, outcome in found if outcome is not None]
    missing = [f"`{name}` ({arm})" for name, arm, outcome in found if outcome is None]
    tail = f"Not run: {', '.join(missing)}." if missing else "Every row was run."
    page = TEMPLATE.read_text(encoding="utf-8").replace("TABLE", "\n".join(rows))
    PAGE.write_text(page.replace("MISSING", tail), encoding="utf-8")
    print(f"wrote {PAGE}: {len(rows)} rows, {len(missing)} missing")


def main() -> None:
    """Runs what is asked for, then writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(SCENARIOS)}; left out: all"
    )
    parser.add_argument("--table", action="store_true", help="run nothing, write what is there")
    asked = parser.parse_args()
    if unknown := set(asked.names) - set(SCENARIOS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if not asked.table:
        for name in asked.names or SCENARIOS:
            for arm in ARMS:
                evaluation(name, run(name, arm))
    write_table()


if __name__ == "__main__":
    main()
