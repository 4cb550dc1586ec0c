"""What a command prints when a run is over, and how it exits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from fedslm import layout
from fedslm.cli.console import ERRORS
from fedslm.storage import json_text


def finish(report: dict[str, Any], *, as_json: bool) -> None:
    """Prints the result and the location of the files."""
    from fedslm.progress import readable
    from fedslm.rendering import spent as shown

    if as_json:
        keys = (
            "directory metrics_before metrics_after privacy epsilon delta rounds stopped seconds "
            "bytes_down bytes_up adapter_sha256"
        )
        typer.echo(json_text({key: report[key] for key in keys.split()}))
        return
    console = Console()
    name = report["headline"]
    before, after = report["metrics_before"][name], report["metrics_after"][name]
    console.print(f"{name}: {before:.4f} before, [bold]{after:.4f}[/bold] after", highlight=False)
    if report["plan"] is not None:
        spent = f"ε = {shown(report['epsilon'])} at δ = {report['delta']:g}"
        of = "all clients composed" if report["overlapping"] else "largest over clients"
        console.print(f"privacy: {spent} for one {report['plan']['unit']} ({of})", highlight=False)
    sent = f"{readable(report['bytes_down'])} down, {readable(report['bytes_up'])} up"
    console.print(f"sent: {sent}; {report['seconds']:.1f} s", highlight=False)
    if report.get("evaluations"):  # reports of earlier versions do not say
        share = report["seconds_in_evaluations"] / report["seconds_in_rounds"]
        console.print(f"evaluation took {100 * share:.0f} % of the time in rounds", highlight=False)
    student = f"{layout.DISTILLED}/{layout.DISTILL_PAGE}"
    for file in (student, layout.REPORT_PAGE, layout.ADAPTER, layout.NODES):
        path = Path(report["directory"]) / file
        if path.exists():
            console.print(f"  {path}", highlight=False, markup=False, soft_wrap=True)


def fail_if_stopped(*reports: dict[str, Any]) -> None:
    """Exits with code 1 if a run stopped early or had no result."""
    bad = [report for report in reports if report["stopped"]]
    for report in bad:
        how = "stopped early" if report["rounds"] < report["rounds_planned"] else "failed"
        text = f"{report['name']} {how}: {report['stopped']}"
        ERRORS.print(text, style="red")
    if bad:
        raise typer.Exit(1)
