"""``fedslm server``: the server's processes, and runs on real nodes."""

from __future__ import annotations

import math
import os
import signal
import threading
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedslm import layout
from fedslm.cli.console import (
    ERRORS,
    ConfigPath,
    Json,
    LogForm,
    LogFormat,
    Overrides,
    clear_errors,
    keep_private,
    load_config,
)
from fedslm.cli.provision import Server, reached, warn_of_certificates
from fedslm.errors import plural
from fedslm.storage import json_text

_STATUS_SECONDS = 6.0
server_app = typer.Typer(
    help="For server operators: the server's processes, and runs on real nodes.", no_args_is_help=True
)


@server_app.command("up")
def up(
    directory: Annotated[
        Path, typer.Argument(help="The server's directory (federation.toml).", metavar="DIR")
    ],
    log_format: LogFormat = LogForm.auto,
) -> None:
    """Run the server until Ctrl-C: the SuperLink, its launcher, and the proxy that nodes connect to.

    Example: `fedslm server up federation`
    """
    with clear_errors():
        from fedslm.deployment.journal import log_to_stderr
        from fedslm.deployment.server import serve

        keep_private()
        log_to_stderr(log_format)
        warn_of_certificates(directory)
        serve(directory, until_stopped())


@server_app.command("run")
def run(
    config: ConfigPath,
    server: Server = Path(),
    overrides: Overrides = [],  # noqa: B006  (typer copies it)
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue a run that was stopped, or whose server failed."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Run a federation on the admitted nodes, with the config of a simulation.

    Exits with an error if the run fails. Ctrl-C stops watching, not the run.

    Example: `fedslm server run triage.toml --server federation`
    """
    with clear_errors():
        from fedslm.deployment import runs
        from fedslm.deployment.control import STOPPED

        loaded = load_config(config, overrides, deployed=True)
        shown = runs.last_round(runs.directory_of(server, loaded)) if resume else 0

        def tell(record: dict[str, Any]) -> None:
            if record["round"] > shown:  # earlier rounds were printed before the interruption
                _tell(record)

        with reached(server) as control:
            stop = until_stopped()  # until this point, Ctrl-C ends this command
            run_id, directory = runs.start(control, server, loaded, resume=resume)
            ERRORS.print(f"run {run_id}: {directory}")
            ERRORS.print("waiting for the nodes and the first round")
            status = runs.follow(control, run_id, directory, tell, stop)
        if not status.startswith("finished"):
            ERRORS.print(f"the run continues; watch it with: fedslm server status --server {server}")
            return
        if as_json:
            typer.echo(json_text({"run": run_id, "status": status, "directory": str(directory)}))
        if status == STOPPED:
            ERRORS.print("the run was stopped; continue it with --resume")
            raise typer.Exit(1)
        if not runs.is_good(status, directory):
            reason = runs.failure_of(directory) or "see `fedslm server logs`"
            text = f"the run failed ({status}): {reason}"
            ERRORS.print(text, style="red")
            raise typer.Exit(1)
        page = str(directory / layout.REPORT_PAGE)
        Console().print(page, highlight=False, markup=False, soft_wrap=True)


@server_app.command("status")
def status(server: Server = Path(), as_json: Json = False) -> None:
    """Show the nodes, their remaining budgets, and the runs.

    Example: `fedslm server status --server federation`
    """
    with clear_errors():
        from fedslm.deployment.status import status_of

        warn_of_certificates(server)
        with reached(server, _STATUS_SECONDS) as control:
            found = status_of(server, control.nodes())
        if as_json:
            typer.echo(json_text(found.as_json()))
            return
        nodes = Table("node", "status", "since (UTC)", "ε of run", "left", "ε of all runs")
        for node in found.nodes:
            budget = (node.epsilon_spent, node.epsilon_left, node.lifetime_epsilon)
            there = (node.name, "out" if node.out else node.status, _short(node.last_seen))
            nodes.add_row(*map(escape, there), *map(_number, budget))
        Console().print(nodes)
        for node in found.nodes:
            if node.out:
                command = f"fedslm provision readmit {node.name} --server {server} --reason …"
                text = f"{node.name} is excluded {node.out}; to readmit it: {command}"
                Console().print(text, style="red", highlight=False, markup=False, soft_wrap=True)
            if node.readmissions:
                again = f"readmitted {plural(node.readmissions, 'time')}"
                text = f"{node.name}: {again}; its ε before that is in the audit"
                Console().print(text, highlight=False, markup=False, soft_wrap=True)
            if node.reason:
                text = f"{node.name} was left out of run {found.runs[0].name} in {node.reason}"
                Console().print(text, highlight=False, markup=False, soft_wrap=True)
        runs = Table("run", "state", "round", "nodes", "refused", "failed", "late", "ε")
        for run in found.runs:
            counts = [str(number) for number in (run.refused, run.failed, run.late)]
            done, nodes_in = f"{run.round}/{run.rounds}", f"{run.completed}/{run.cohort}"
            runs.add_row(run.name, run.state, done, nodes_in, *counts, _number(run.epsilon))
        if found.runs:
            Console().print(runs)


@server_app.command("logs")
def logs(
    server: Server = Path(),
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="Last lines of each log.")] = 20,
) -> None:
    """Show the last lines of the server's logs.

    Example: `fedslm server logs --server federation -n 50`
    """
    with clear_errors():
        from fedslm.deployment.journal import last_lines
        from fedslm.deployment.server import LOGS
        from fedslm.errors import Unusable

        found = sorted((server / LOGS).glob("*.log"))
        if not found:
            raise Unusable(f"{server / LOGS} contains no logs: was `fedslm server up` ever run?")
        for path in found:
            typer.echo(f"== {path}")
            for line in last_lines(path, lines):
                typer.echo("".join(each if each.isprintable() else " " for each in line))


@server_app.command("stop")
def stop(
    name: Annotated[str, typer.Argument(help="The run's name.", metavar="RUN")],
    server: Server = Path(),
) -> None:
    """Stop a run; `fedslm server run … --resume` continues it.

    Example: `fedslm server stop triage --server federation`
    """
    with clear_errors():
        from fedslm.deployment import runs
        from fedslm.deployment.control import connected
        from fedslm.deployment.status import RUNS

        with connected(server) as control:
            runs.stop(control, server / RUNS / name)
        typer.echo(f"{name} is stopped")


def until_stopped() -> threading.Event:
    """Returns an event that Ctrl-C sets, or a service manager's SIGTERM.

    A handler runs between two steps of the main thread, which may hold the event's lock there: setting
    the event itself would then wait for ever. So a handler writes a byte, and a thread sets the event.
    """
    stop = threading.Event()
    read, write = os.pipe()
    os.set_blocking(write, False)

    def wait() -> None:
        os.read(read, 1)
        stop.set()

    def tell(*_: object) -> None:
        with suppress(BlockingIOError):  # so many signals that the pipe is full
            os.write(write, b"\0")

    threading.Thread(target=wait, daemon=True).start()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, tell)
    return stop


def _short(time: str) -> str:
    """Month, day and minute of an ISO time.

    >>> _short("2026-11-25T22:49:04.123456+00:00"), _short("")
    ('11-25 22:49', '')
    """
    return time[5:16].replace("T", " ")


def _number(value: float | None) -> str:
    """Formats a number for a table; empty for None."""
    return "" if value is None else "∞" if value == math.inf else f"{value:.3f}"


def _tell(record: dict[str, Any]) -> None:
    """Prints one line for each round."""
    from fedslm.federation.checkpoint import metrics_of

    found = metrics_of(record["metrics"])
    metrics = "  ".join(f"{name} {value:.4f}" for name, value in found.items())
    epsilon = record["epsilon"]
    spent = f"  ε {epsilon:.3f}" if isinstance(epsilon, float) else ""
    counts = f"{record['completed']}/{record['cohort']} nodes"
    ERRORS.print(f"round {record['round']}: {counts}{spent}  {metrics}")
    for reason in record["reasons"]:
        ERRORS.print(f"  {reason}", style="yellow")
