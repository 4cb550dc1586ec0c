"""``fedslm methods``: what there is to choose from, and what goes with what."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedslm.cli.console import Json, clear_errors

methods_app = typer.Typer()


@methods_app.command("methods")
def methods(
    as_json: Json = False,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the page docs/aggregation.md.")
    ] = False,
) -> None:
    """Print the aggregation methods, and which combinations are refused and why.

    Example: `fedslm methods --json`
    """
    with clear_errors():
        from fedslm.reporting.methods import as_data, as_page

        if as_markdown:
            typer.echo(as_page(), nl=False)
        elif as_json:
            typer.echo(json.dumps(as_data()))
        else:
            _print()


def _print() -> None:
    """The same for people."""
    from fedslm.reporting.methods import as_data

    data, console = as_data(), Console()
    columns = list(data["columns"])
    table = Table("method", "exact", "up", *columns)
    for row in data["methods"]:
        cells = ["yes" if row["valid"][column] else "no" for column in columns]
        table.add_row(row["name"], "yes" if row["exact"] else "no", row["up"], *cells)
    console.print(table)
    console.print("up: values of one layer (out x in) at rank r that a client sends in a round\n")
    refused = Table("refused together", "why", "nearest")
    for conflict in data["conflicts"]:
        refused.add_row(conflict["combination"], conflict["reason"], conflict["nearest"])
    console.print(refused)
