"""``fedslm sweep``: one config at several values of a key."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from fedslm import config as configuration
from fedslm import layout
from fedslm.cli.answers import print_table
from fedslm.cli.console import (
    ERRORS,
    INTERRUPTED,
    TRAIN,
    ConfigPath,
    Json,
    Overrides,
    clear_errors,
)
from fedslm.config import Config

sweep_app = typer.Typer()


@sweep_app.command("sweep", rich_help_panel=TRAIN)
def sweep(
    config: ConfigPath,
    over: Annotated[
        str, typer.Option(help="What to vary: a dotted key and its values.", metavar="KEY=A,B,…")
    ],
    seeds: Annotated[int, typer.Option(min=1, help="Runs at each value, with different seeds.")] = 1,
    directory: Annotated[
        Path | None,
        typer.Option(help="Place of the runs; default: runs/NAME-sweep-KEY.", metavar="DIR"),
    ] = None,
    overrides: Overrides = [],  # noqa: B006  (typer copies it)
    as_json: Json = False,
) -> None:
    """Simulate a config at several values of a key: a table, and a curve with its spread over seeds.

    All runs train on the same private records, so together they cost more than one: the table says how
    much. Ctrl-C keeps what is finished; the same command continues.

    Example: `fedslm sweep my.toml --over privacy.epsilon=1,2,4,8 --seeds 3`
    """
    with clear_errors():
        key, equals, values = over.partition("=")
        if not equals or "." not in key or not values:
            raise typer.BadParameter("--over needs KEY=A,B, such as privacy.epsilon=1,2,4,8")

        def load(more: Mapping[str, Any]) -> Config:
            texts = [f"{name}={value}" for name, value in more.items()]
            return configuration.from_toml(config, [*overrides, *texts])

        from fedslm.progress import Bar
        from fedslm.sweep import Question, sweep
        from fedslm.workers import preload

        preload(private=True)
        place = directory or Path("runs") / f"{load({}).run.name}-sweep-{key.strip()}"
        chosen = tuple(value.strip() for value in values.split(","))
        try:
            found = sweep(load, Question(key.strip(), chosen, seeds, place), [Bar()])
        except KeyboardInterrupt:
            ERRORS.print(f"interrupted; finished runs are kept in {place}; the same command continues")
            raise typer.Exit(INTERRUPTED) from None
        if as_json:
            typer.echo((place / layout.SWEEP).read_text(encoding="utf-8").replace("\n", ""))
            return
        print_table(f"{found.metric} over {found.key}", found.columns(), found.rows(), found.notes())
        for file in (layout.SWEEP_PAGE, layout.SWEEP_PLOT):
            typer.echo(f"  {place / file}")
