"""``fedslm tune``: better settings for a private config, from public records."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from fedslm.storage import json_text

if TYPE_CHECKING:
    from fedslm.tuning.search import Result, Trial

tune_app = typer.Typer()


@tune_app.command("tune", rich_help_panel=TRAIN)
def tune(
    config: ConfigPath,
    overrides: Overrides = [],  # noqa: B006  (typer copies it)
    public: Annotated[
        str | None,
        typer.Option(help="Public records to train on; default: data.public_source.", metavar="SOURCE"),
    ] = None,
    public_split: Annotated[
        str | None, typer.Option(help="Their split (or file stem); default: data.public_split.")
    ] = None,
    minutes: Annotated[float, typer.Option(min=0, help="Begin no trial that ends later.")] = 10.0,
    trials: Annotated[
        int, typer.Option(min=1, help="Most trials, those of earlier calls included.")
    ] = 30,
    directory: Annotated[
        Path | None, typer.Option(help="Where trials are kept; default: runs/NAME-tune.", metavar="DIR")
    ] = None,
    as_json: Json = False,
) -> None:
    """Search better settings for a private config on public records, without spending any budget.

    Neither the private training split nor the evaluation split is read. Trials have the noise of the
    real run, so the result is about noise; it is not a privacy promise, and public records need none.

    Ctrl-C keeps the finished trials; the same command continues.

    Example: `fedslm tune my.toml --public public.jsonl --minutes 20`
    """
    with clear_errors():
        given = {"data.public_source": public, "data.public_split": public_split}
        more = [f"{key}={json_text(value)}" for key, value in given.items() if value is not None]
        loaded = configuration.from_toml(config, [*overrides, *more])
        place = directory or Path("runs") / f"{loaded.run.name}-tune"

        from fedslm.tuning import outcome
        from fedslm.tuning.search import Options, search

        try:
            result = search(loaded, Options(place, minutes, trials, _tell))
        except KeyboardInterrupt:
            again = ["fedslm", "tune", str(config), "--directory", str(place)]
            again += [part for each in (*overrides, *more) for part in ("--set", each)]
            hint = f"interrupted; finished trials are kept; continue with: {shlex.join(again)}"
            ERRORS.print(hint)
            raise typer.Exit(INTERRUPTED) from None
        line = outcome.command(result, config, overrides)
        outcome.write(result, place, line)
        if as_json:
            typer.echo(json_text(outcome.as_json(result, place, line)))
        else:
            _show(result, place, line)


def _tell(trial: Trial) -> None:
    """Prints a trial as it ends; later trials would repeat the warnings of the first."""
    logging.getLogger("fedslm").setLevel(logging.ERROR)
    found = trial.error or ("no metric" if trial.value is None else f"{trial.value:.4f}")
    again = " again" if trial.again else ""
    ERRORS.print(f"trial {trial.number}{again}: {found} ({trial.seconds:.1f} s)")


def _show(result: Result, directory: Path, line: str) -> None:
    """Prints the table, what it says, and the command that uses it."""
    from fedslm.tuning import outcome

    notes = [outcome.verdict(result), *result.setting.notes()]
    print_table("trials, best first", outcome.columns(result), outcome.rows(result), notes)
    for file in (layout.TUNED, layout.TUNE_PAGE):
        typer.echo(f"  {directory / file}")
    typer.echo(line)
