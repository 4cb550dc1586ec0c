"""``fedslm train``: private fine-tuning on one data set, without a federation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from fedslm.cli.console import (
    ERRORS,
    INTERRUPTED,
    TRAIN,
    Json,
    Overrides,
    clear_errors,
    complete,
)
from fedslm.cli.outcome import fail_if_stopped, finish
from fedslm.config import values_of
from fedslm.errors import ConfigError, Problem

if TYPE_CHECKING:
    from fedslm.api.single import Wish
    from fedslm.config import TaskName

train_app = typer.Typer()
_CHOOSE = (
    "is required: how much privacy the records get is your choice, so there is no default; smaller is "
    "more private, and 1 to 8 is common"
)

# Arguments of `fedslm.train` and keys of its config, and the options that set them.
OPTIONS = {
    "train": "FILE",
    "data.source": "FILE",
    "directory": "--output",
    "run.directory": "--output",
    "data.evaluation_source": "--evaluation",
    "data.text_column": "--text",
    "data.label_column": "--label",
    "model.base": "--base",
    "task.name": "--task",
    "privacy.unit": "--unit",
    "privacy.unit_column": "--unit",
    "privacy.epsilon": "--epsilon",
    "privacy.delta": "--delta",
    **{
        argument: f"--{argument}"
        for argument in ("base", "text", "label", "task", "unit", "delta", "evaluation", "holdout")
    },
}


@train_app.command(rich_help_panel=TRAIN)
def train(
    file: Annotated[
        str, typer.Argument(help="The private records: a file, a directory or a hub name.")
    ],
    base: Annotated[str, typer.Option(help="The base model: a hub name, a directory, or demo.")],
    epsilon: Annotated[
        float | None, typer.Option(help="The privacy budget, which you must choose.")
    ] = None,
    text: Annotated[str, typer.Option(help="Column with the input.")] = "text",
    label: Annotated[
        str, typer.Option(help='Column with the target; "" for a task without one.')
    ] = "label",
    task: Annotated[str, typer.Option(help="What is learned; see docs/configuration.md.")] = (
        "classification"
    ),
    unit: Annotated[
        str,
        typer.Option(
            help="What epsilon covers: record, or the column that names a record's person.",
            metavar="record|COLUMN",
        ),
    ] = "record",
    delta: Annotated[
        float | None, typer.Option(help="Failure probability; default: the recipe's.")
    ] = None,
    evaluation: Annotated[
        str | None, typer.Option(help="Public records to evaluate on: a source as FILE.")
    ] = None,
    holdout: Annotated[
        float | None,
        typer.Option(help="Instead: share of FILE to evaluate on, which is then treated as public."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="A new run directory; default: runs/NAME.", metavar="DIR")
    ] = None,
    overrides: Overrides = [],  # noqa: B006  (typer copies it)
    as_json: Json = False,
) -> None:
    """Fine-tune a model on one private data set, with differential privacy and without a federation.

    It is a run with one client: report, model card, ledger and audit are as in a federation. A recipe
    sets what is not given. The config is written into the run directory as train.toml.

    Example: `fedslm train notes.csv --unit patient --epsilon 3 --base demo --evaluation public.csv`
    """
    with clear_errors(OPTIONS):
        if epsilon is None:
            raise ConfigError([Problem("--epsilon", _CHOOSE)])
        changes = values_of(overrides)
        _check_set(changes)
        from fedslm.workers import preload

        preload(private=True)
        from fedslm.api.single import Wish

        wish = Wish(
            train=file,
            base=base,
            epsilon=epsilon,
            text=text,
            label=label or None,
            task=cast("TaskName", task),  # checked with the config
            unit=unit,
            delta=delta,
            evaluation=evaluation,
            holdout=holdout,
            directory=output,
            overrides=changes,
        )
        report = _run(wish)
        finish(report, as_json=as_json)
        fail_if_stopped(report)


def _check_set(changes: Mapping[str, Any]) -> None:
    """Refuses keys that an option sets.

    Raises:
        ConfigError: Names the options.
    """
    problems = [Problem(f"--set {key}", f"use {OPTIONS[key]}") for key in changes if key in OPTIONS]
    if problems:
        raise ConfigError(problems)


def _run(wish: Wish) -> dict[str, Any]:
    """Runs with a progress bar; Ctrl-C says how to continue."""
    from fedslm import simulation
    from fedslm.api.single import prepared
    from fedslm.progress import Bar

    place = None
    try:
        with prepared(wish) as config:
            place = simulation.run_path(config)
            return simulation.simulate(complete(config), [Bar()])
    except KeyboardInterrupt:
        hint = f"; continue with: fedslm simulate --resume {place}" if place and place.exists() else ""
        ERRORS.print(f"interrupted{hint}")
        raise typer.Exit(INTERRUPTED) from None
