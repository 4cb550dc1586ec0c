"""``fedslm server``: the server's processes, and runs on real nodes."""

from __future__ import annotations

import json
import logging
import signal
import threading
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fedslm.cli.console import ERRORS, ConfigPath, Json, Overrides, clear_errors, load_config
from fedslm.cli.provision import Server

server_app = typer.Typer(
    help="The server operator's: processes, and runs on real nodes.", no_args_is_help=True
)


@server_app.command("up")
def up(directory: Annotated[Path, typer.Argument(help="With federation.toml.", metavar="DIR")]) -> None:
    """Run the server until Ctrl-C: the SuperLink, its launcher, and the proxy that nodes reach.

    Example: `fedslm server up federation`
    """
    with clear_errors():
        from fedslm.deployment.server import serve

        logging.getLogger("fedslm").setLevel(logging.INFO)
        serve(directory, until_stopped())


@server_app.command("run")
def run(
    config: ConfigPath,
    server: Server = Path(),
    overrides: Overrides = [],  # noqa: B006  (typer copies it)
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run whose server was lost.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run a federation on the admitted nodes, with the config of a simulation.

    Ends with an error if the run fails. Ctrl-C stops watching, not the run.

    Example: `fedslm server run triage.toml --server federation`
    """
    with clear_errors():
        from fedslm.deployment import runs
        from fedslm.deployment.control import connected

        loaded = load_config(config, overrides)
        stop = until_stopped()
        with connected(server) as control:
            run_id, directory = runs.start(control, server, loaded, resume=resume)
            ERRORS.print(f"run {run_id}: {directory}", highlight=False, soft_wrap=True)
            status = runs.follow(control, run_id, directory, _tell, stop)
        if not status.startswith("finished"):
            ERRORS.print("the run goes on; watch it with: fedslm server status", highlight=False)
            return
        if as_json:
            typer.echo(json.dumps({"run": run_id, "status": status, "directory": str(directory)}))
        if not runs.is_good(status, directory):
            where = server / "logs" / "launcher.log"
            ERRORS.print(f"the run failed ({status}); see {where}", style="red", highlight=False)
            raise typer.Exit(1)
        Console().print(f"{directory / 'report.md'}", highlight=False, soft_wrap=True)


@server_app.command("status")
def status(server: Server = Path(), as_json: Json = False) -> None:
    """Say which nodes are there, and how the runs are.

    Example: `fedslm server status --server federation`
    """
    with clear_errors():
        from fedslm.deployment.control import connected
        from fedslm.deployment.enrolment import admitted_nodes

        with connected(server) as control:
            seen = {node.node_id: node for node in control.nodes()}
        rows = [
            {
                "name": node.name,
                "client": node.client,
                "status": seen[node.node_id].status if node.node_id in seen else "unknown",
                "last_seen": seen[node.node_id].last_seen if node.node_id in seen else "",
            }
            for node in admitted_nodes(server)
            if not node.revoked
        ]
        if as_json:
            typer.echo(json.dumps(rows))
            return
        table = Table("node", "client", "status", "last seen")
        for row in rows:
            table.add_row(*(str(value) for value in row.values()))
        Console().print(table)


def until_stopped() -> threading.Event:
    """Is set by Ctrl-C, or by a service manager's SIGTERM."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    return stop


def _tell(record: dict[str, Any]) -> None:
    """One line for each round."""
    metrics = "  ".join(f"{name} {value:.4f}" for name, value in record["metrics"].items())
    spent = "" if record["epsilon"] is None else f"  ε {record['epsilon']:.3f}"
    counts = f"{record['completed']}/{record['cohort']} nodes"
    ERRORS.print(f"round {record['round']}: {counts}{spent}  {metrics}", highlight=False)
    for reason in record["reasons"]:
        ERRORS.print(f"  {reason}", style="yellow", highlight=False, markup=False)
