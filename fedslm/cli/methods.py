"""``fedslm methods``: the aggregation methods, and which settings can be combined."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedslm.cli.console import TRAIN, Json, clear_errors
from fedslm.storage import json_text

methods_app = typer.Typer()


@methods_app.command("methods", rich_help_panel=TRAIN)
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
            typer.echo(json_text(as_data()))
        else:
            _print()


def _print() -> None:
    """Prints the tables for people."""
    from fedslm.reporting.methods import as_data

    data, console = as_data(), Console()
    for row in data["methods"]:
        exact = "exact" if row["exact"] else "not exact"
        refused = [column for column in data["columns"] if not row["valid"][column]]
        console.print(f"[bold]{row['name']}[/bold]  {row['title']}: {row['note']}", highlight=False)
        console.print(f"    {exact}; sends {row['up']} of a layer", highlight=False)
        if refused:
            console.print(f"    not with: {'; '.join(refused)}", highlight=False)
    console.print(
        "sends: values of one layer (out x in, rank r) that a client uploads in a round\n",
        highlight=False,
    )
    table = Table("refused", "reason", "alternative")
    for conflict in data["conflicts"]:
        table.add_row(conflict["combination"], conflict["reason"], conflict["nearest"])
    console.print(table)
