"""``fedslm data``: inspect data before anything is trained, and split one file in two."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedslm.cli.console import ConfigPath, Json, Overrides, clear_errors, load_config
from fedslm.config import Config
from fedslm.data.columns import needed
from fedslm.errors import plural
from fedslm.storage import json_text

if TYPE_CHECKING:
    from fedslm.data.federated import Shared
    from fedslm.data.preview import ClientView, Preview

data_app = typer.Typer(help="Inspect data before anything is trained.", no_args_is_help=True)

_LOOKED_AT = 5000
_MOST_CLIENTS = 30
_MOST_LABELS = 4


@data_app.command("preview")
def preview(
    config: ConfigPath,
    overrides: Overrides = [],  # noqa: B006  (typer copies it)
    plot: Annotated[Path | None, typer.Option(help="Plot clients and labels as PNG.")] = None,
    as_json: Json = False,
) -> None:
    """Show how the records are divided among the clients, before anything is trained or spent.

    The figures come from private records: they are only for the researcher who runs the simulation.

    Example: `fedslm data preview simulations/demo.toml --plot data.png`
    """
    with clear_errors():
        from fedslm.simulation import with_layout

        loaded = with_layout(load_config(config, overrides))
        found = seen(loaded)
        if plot is not None:
            from fedslm.reporting.preview import plot_preview

            kind = loaded.data.partition
            plot_preview(
                plot, found, f"{loaded.run.name}: {plural(len(found.clients), 'client')}, {kind}"
            )
        if as_json:
            typer.echo(json_text(found.to_json()))
        else:
            _print(found, loaded, plot)


@data_app.command("split")
def split(
    source: Annotated[str, typer.Argument(help="A file, a directory, a hub name or a database URL.")],
    out: Annotated[Path, typer.Option(help="Directory for train.parquet and test.parquet.")],
    unit: Annotated[
        str | None,
        typer.Option(help="Column that names the unit, such as the patient: none is in both files."),
    ] = None,
    fraction: Annotated[float, typer.Option(help="Share of the units for test.parquet.")] = 0.2,
    name: Annotated[str, typer.Option("--split", help="Split of a directory or hub name.")] = "train",
    query: Annotated[str | None, typer.Option(help="SQL, for a database.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the split.")] = 0,
    as_json: Json = False,
) -> None:
    """Split one file into train.parquet and test.parquet; with --unit, no unit is in both.

    The server evaluates on the test file: it must contain only records that may be public.

    Example: `fedslm data split notes.csv --unit patient --fraction 0.2 --out notes`
    """
    if not 0 < fraction < 1:
        raise typer.BadParameter(f"--fraction {fraction} must be in (0, 1)")
    with clear_errors({"data.source": "SOURCE", "data.train_query": "--query"}):
        from fedslm.data.database import refuse_password
        from fedslm.data.sources import load
        from fedslm.data.split import split_in_two

        refuse_password(source)
        dataset = load(source, name, query, seed=seed)
        sides = split_in_two(dataset, out, unit=unit, fraction=fraction, seed=seed)
        if as_json:
            typer.echo(json_text(asdict(sides)))
            return
        console = Console()
        for side, records, units in (
            ("train", sides.train_records, sides.train_units),
            ("test", sides.test_records, sides.test_units),
        ):
            text = f"{out / side}.parquet: {plural(records, 'record')}"
            text += "" if unit is None else f", {plural(units, 'value')} of {unit}"
            console.print(text, highlight=False, markup=False, soft_wrap=True)


def seen(config: Config) -> Preview:
    """Returns a preview of a config's data; fills in the column names first.

    Raises:
        DataError: The data has a defect that would stop a client later.
    """
    from fedslm.data.federated import share_out
    from fedslm.data.preview import look

    shared = share_out(
        config.data,
        config.task,
        config.privacy,
        num_clients=config.federation.num_clients,
        seed=config.run.seed,
    )
    return _with_lengths(look(shared, config.data, config.task, config.privacy), shared, config)


def _with_lengths(found: Preview, shared: Shared, config: Config) -> Preview:
    """Adds how many texts are truncated or unusable, if the base model's tokenizer is available."""
    from fedslm.data.tables import rows_in
    from fedslm.models.base import load_tokenizer, local
    from fedslm.tasks import build

    directory = local(config.model)
    if directory is None:
        return found
    tokenizer = load_tokenizer(directory)
    task = build(config.task, config.data, shared.labels)
    every = math.ceil(len(shared.train) / _LOOKED_AT)
    rows = rows_in(shared.train.select(range(0, len(shared.train), every)))
    prepared = task.prepare(rows, tokenizer)
    share = prepared.truncated / max(1, len(prepared.kept))
    unusable = len(rows) - len(prepared.kept)
    return replace(found, cut_share=share, unusable=unusable, looked_at=len(rows))


def _print(found: Preview, config: Config, plot: Path | None) -> None:
    """Prints a table of clients, and remarks."""
    console = Console()
    table = Table(title=f"{plural(len(found.clients), 'client')} ({config.data.partition})")
    longest = max(len(client.name) for client in found.clients[:_MOST_CLIENTS])
    width = min(24, max(6, longest))
    table.add_column("client", overflow="ellipsis", no_wrap=True, min_width=width, max_width=24)
    with_units = any(client.units is not None for client in found.clients)
    columns = ["records", "share", *(["users"] if with_units else [])]
    columns += ["labels"] if found.labels else []
    for column in columns:
        table.add_column(column, justify="right", min_width=len(column))
    if found.labels:
        room = console.width - width - sum(len(column) + 4 for column in columns) - 8
        table.add_column("most frequent", overflow="ellipsis", no_wrap=True, max_width=max(20, room))
    total = sum(client.records for client in found.clients)
    for client in found.clients[:_MOST_CLIENTS]:
        table.add_row(*map(Text, _cells(client, total, with_labels=bool(found.labels))))
    console.print(table)
    if len(found.clients) > _MOST_CLIENTS:
        console.print(
            f"… and {plural(len(found.clients) - _MOST_CLIENTS, 'more client')}", highlight=False
        )
    for line in remarks(found, config):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if plot is not None:
        console.print(f"  {plot}", highlight=False, markup=False, soft_wrap=True)


def _cells(client: ClientView, total: int, *, with_labels: bool) -> list[str]:
    """Returns one row of the table; a long label list is shortened."""
    cells = [client.name, str(client.records), f"{client.records / total:.1%}"]
    if client.units is not None:
        cells.append(str(client.units))
    if with_labels:
        shown = [f"{label} {count}" for label, count in list(client.labels.items())[:_MOST_LABELS]]
        more = ["…"] if len(client.labels) > _MOST_LABELS else []
        cells += [str(len(client.labels)), ", ".join(shown + more)]
    return cells


def remarks(found: Preview, config: Config) -> list[str]:
    """Returns remarks on sizes, dropped records, truncation and duplicates."""
    smallest = min(client.records for client in found.clients)
    columns = ", ".join(f"{key}={name}" for key, name in needed(config.data, config.task).items())
    lines = [
        f"columns: {columns}",
        f"training: {plural(found.records, 'record')}; the smallest client has {smallest}",
        f"public evaluation: {plural(found.evaluation_records, 'record')}",
    ]
    if found.left_out:
        lines.append(f"left out: {found.left_out} training records belong to no client")
    if found.duplicates:
        share = found.duplicates / found.records
        lines.append(f"duplicates: {found.duplicates} ({share:.1%}) are in the public split too")
    if found.cut_share is None:
        lines.append(f"lengths: not measured; {config.model.base} is not a local directory")
        return lines
    limit = f"task.max_length={config.task.max_length}"
    lines.append(
        f"longer than {limit}: {found.cut_share:.1%} of {plural(found.looked_at, 'record')} examined"
    )
    if found.unusable:
        lines.append(
            f"unusable: {found.unusable} of them give no tokens, or the chat template refuses them"
        )
    return lines
