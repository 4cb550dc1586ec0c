"""``fedslm demo``: run the main example on the embedded model and data, and compare the arms."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedslm import config as configuration
from fedslm import layout
from fedslm.config import Config
from fedslm.errors import Unusable
from fedslm.inference.prediction import predict
from fedslm.inference.trained import load_trained, open_run
from fedslm.progress import Bar
from fedslm.rendering import spent as shown
from fedslm.simulation import simulate, workers_for
from fedslm.storage import json_text

ARMS: dict[str, dict[str, Any]] = {
    "no-privacy": {"unit": "none"},
    "epsilon-8": {"unit": "record", "epsilon": 8.0},
    "epsilon-8-patient": {
        "unit": "user",
        "unit_column": "patient",
        "max_records_per_unit": 4,
        "epsilon": 8.0,
    },
    "epsilon-2": {"unit": "record", "epsilon": 2.0},
}
# All arms answer neurology (0.81 to 0.98); for a vaguer text, such as "chest pain", answers are random.
EXAMPLE = "slurred speech and facial droop"
_LAST_LAYERS = ["3.attention.self.query", "3.attention.self.value", "3.output.dense"]
_JSON_KEYS = ("metrics_before", "metrics_after", "privacy", "epsilon", "delta", "seconds", "directory")
_PUBLIC = {"delta": 1e-5, "clip_norm": 1.0, "sample_rate": 0.06}


def config_of(arm: str, directory: Path) -> Config:
    """Returns the config of one arm; the arms differ only in privacy.

    Args:
        arm: A key of ``ARMS``.
        directory: Parent of the arm's run directory.
    """
    privacy = ARMS[arm]
    if privacy["unit"] != "none":
        privacy = {**privacy, **_PUBLIC}
    return configuration.from_mapping(
        {
            "run": {"name": arm, "directory": str(directory / arm)},
            "model": {"base": "demo"},
            "data": {"source": "demo", "partition": "natural", "max_evaluation_records": 600},
            "task": {"name": "classification", "pooling": "mean", "max_length": 96},
            "lora": {"rank": 4, "alpha": 4.0, "target_modules": _LAST_LAYERS},
            "training": {"local_steps": 8, "batch_size": _batch_size(privacy), "learning_rate": 5e-3},
            "privacy": privacy,
            "aggregation": {"method": "ffa"},
            "federation": {"num_clients": 5, "rounds": 6, "evaluate_every": 3},
        }
    )


def _batch_size(privacy: dict[str, Any]) -> int:
    """Expected number of units in a step; there are about half as many patients as notes."""
    return 16 if privacy["unit"] == "user" else 32


def run(directory: Path, *, as_json: bool = False) -> list[dict[str, Any]]:
    """Runs all arms and prints the table.

    Args:
        directory: Parent of the run directories; must be empty or absent.
        as_json: Print JSON lines instead of the table.

    Raises:
        RunError: The directory is not empty.
    """
    if directory.exists() and any(directory.iterdir()):
        raise Unusable(f"{directory} is not empty; choose another with --directory")
    configs = [config_of(arm, directory) for arm in ARMS]
    directory.mkdir(parents=True, exist_ok=True)
    with closing(workers_for(configs[-1], directory / layout.CLIENTS_LOG)) as pool:
        reports = [simulate(config, [Bar()], pool) for config in configs]
    if as_json:
        for report in reports:
            print(json_text({key: report[key] for key in ("name", *_JSON_KEYS)}))
    else:
        _print(directory, reports)
    return reports


def _table(reports: list[dict[str, Any]]) -> Table:
    """The runs, one in each row; no name is cut, since it names a directory."""
    table = Table(title="Five hospitals, one adapter: accuracy on the public evaluation split")
    table.add_column("run", min_width=max(map(len, ARMS)), no_wrap=True)
    for column in ("before", "after", "ε of each hospital", "protected unit", "δ", "time"):
        table.add_column(column, justify="right")
    for report in reports:
        spent = sorted({shown(value["epsilon"], 2) for value in report["privacy"].values()})
        table.add_row(
            report["name"],
            f"{report['metrics_before']['accuracy']:.3f}",
            f"{report['metrics_after']['accuracy']:.3f}",
            " – ".join(spent) or "∞",
            _unit_of(report["plan"]),
            f"{report['delta']:g}" if report["delta"] is not None else "–",
            f"{report['seconds']:.0f} s",
        )
    return table


def _print(directory: Path, reports: list[dict[str, Any]]) -> None:
    """Prints the table and the location of the results."""
    console = Console()
    console.print(_table(reports))
    _print_answer(console, directory / "epsilon-8")
    console.print("Look at:")
    for report in reports:
        file = f"  {report['directory']}/report.md"
        console.print(file, highlight=False, markup=False, soft_wrap=True)
    audit = f"Audit: fedslm audit run {directory / 'epsilon-8-patient'}"
    console.print(audit, highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"Next: fedslm simulate {directory / 'epsilon-8' / 'config.toml'} "
        f"--set run.directory={directory / 'mine'} --set privacy.epsilon=4",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _unit_of(plan: dict[str, Any] | None) -> str:
    """Names the protected unit by its column."""
    return "–" if plan is None else str(plan.get("unit_column") or plan["unit"])


def _print_answer(console: Console, run: Path) -> None:
    """Prints a finished run's prediction for one text, and the command that produces it."""
    (answer,) = predict(load_trained(open_run(run)), [{"text": EXAMPLE}])
    share = answer["probabilities"][answer["label"]]
    console.print("Ask a model:")
    console.print(
        f'  fedslm predict {run} --text "{EXAMPLE}"', highlight=False, markup=False, soft_wrap=True
    )
    console.print(f"  {answer['label']} ({share:.2f})", highlight=False)
