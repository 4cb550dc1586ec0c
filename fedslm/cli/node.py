"""``fedslm node``: commands for a node's operator."""

from __future__ import annotations

import os
import sys
import threading
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fedslm import layout
from fedslm.cli.console import ERRORS, LogForm, LogFormat, clear_errors, keep_private
from fedslm.cli.examples import AnyProfile, Profile
from fedslm.errors import plural

_GRACE_SECONDS, _ASK_SECONDS = 5.0, 3.0


class StartUnit(StrEnum):
    """Units that a node's policy can start with."""

    record = "record"
    patient = "patient"
    user = "user"


node_app = typer.Typer(help="For node operators: enrol, check and run a node.", no_args_is_help=True)
Directory = Annotated[Path, typer.Argument(help="The node's own directory.", metavar="DIR")]


@node_app.command("example")
def example(profile: AnyProfile = Profile.hospital) -> None:
    """Print example settings of a node: its node.toml. `fedslm node enroll` writes them filled in.

    Example: `fedslm node example phone > node.toml`
    """
    from fedslm.deployment.settings import NODE_FILE
    from fedslm.deployment.starters import node_example

    typer.echo(node_example(profile.value, NODE_FILE), nl=False)


@node_app.command("enroll")
def enroll(
    directory: Directory,
    name: Annotated[str, typer.Option("--name", help="The node's name.")],
    profile: Annotated[
        Profile, typer.Option("--profile", help="What kind of machine this is.")
    ] = Profile.hospital,
    source: Annotated[
        str | None,
        typer.Option("--source", help="The records: a file, a directory or a database URL."),
    ] = None,
    unit: Annotated[
        StartUnit | None,
        typer.Option("--unit", help="Weakest unit that its policy allows; default: the profile's."),
    ] = None,
) -> None:
    """Create this node's keys, which never leave it, and a request for the server's operator.

    Also writes node.toml and policy.toml, unless they exist: no file is overwritten.

    Example: `fedslm node enroll north --name north --source /srv/north/notes.jsonl`
    """
    with clear_errors():
        from fedslm.deployment import enrolment
        from fedslm.deployment.starters import Start, write_node_files

        keep_private()
        request = enrolment.enroll(directory, name)
        start = Start(name, profile.value, source, None if unit is None else unit.value)
        for path, edit in write_node_files(directory, start).items():
            typer.echo(f"wrote {path}: {edit}")
        found = enrolment.fingerprint(enrolment.read_request(request)["node_key"])
        typer.echo(f"send to the server's operator: {request}")
        typer.echo(f"and give them the fingerprint over a separate channel: {found}")


@node_app.command("accept")
def accept(
    directory: Directory,
    admission: Annotated[
        Path, typer.Argument(help="The admission that the server's operator sent back.")
    ],
    expected: Annotated[
        str | None,
        typer.Option("--fingerprint", help="Refuse it unless the federation has this fingerprint."),
    ] = None,
    replaces: Annotated[
        bool,
        typer.Option("--replace", help="Accept a different authority or operator's key than before."),
    ] = False,
) -> None:
    """Accept the admission that the server's operator sent back.

    Compare the federation's fingerprint with the server's operator over a separate channel.

    Example: `fedslm node accept north north.admission.json --fingerprint 1a2b-3c4d-5e6f-7a8b`
    """
    with clear_errors():
        from fedslm.deployment.admission import accept as accepted

        found = accepted(directory, admission, expected=expected, replaces=replaces)
        typer.echo(f"admitted to {found.federation!r} at {found.address}")
        typer.echo(f"the federation's fingerprint: {found.fingerprint}")
        if replaces:
            typer.echo("restart `fedslm node up`: a running node keeps its earlier admission")


@node_app.command("check")
def check(directory: Directory) -> None:
    """Check everything that could stop this node later.

    Example: `fedslm node check north`
    """
    with clear_errors():
        from fedslm.deployment.node import open_node
        from fedslm.deployment.preflight import preflight

        keep_private()
        good = True
        for each in preflight(open_node(directory), _begins):
            good = good and each.is_good
            word = "NO" if not each.is_good else "warning" if each.warns else "ok"
            typer.echo(f"{word}: {each.detail}")
        raise typer.Exit(0 if good else 1)


@node_app.command("clock")
def clock(
    directory: Directory,
    reason: Annotated[str, typer.Option("--reason", help="What happened; kept for the audit.")],
) -> None:
    """Record that this machine's clock had jumped forwards and is correct now.

    Set the clock first. No charge is refunded: limits for a day, and on the time between two rounds,
    count charges dated ahead of the clock as of now. The ledger keeps the reason.

    Example: `fedslm node clock north --reason "NTP gave 2036; the clock was set by hand on May 2"`
    """
    with clear_errors():
        from fedslm.privacy.keys import PRIVATE_KEY, private_key
        from fedslm.privacy.ledger import Ledger

        keep_private()
        ledger = Ledger(directory / layout.LEDGER, private_key(directory / PRIVATE_KEY))
        ahead = ledger.correct_clock(reason)
        typer.echo(f"the ledger was {ahead} s ahead: charges dated ahead of the clock count as of now")


def _begins(name: str) -> None:
    """Prints the name of a check; the result follows on the same line."""
    typer.echo(f"checking {name} ... ", nl=False)
    sys.stdout.flush()


@node_app.command("up")
def up(
    directory: Directory,
    profile: Annotated[
        str | None,
        typer.Option("--profile", help="hospital or phone, instead of the one in node.toml."),
    ] = None,
    log_format: LogFormat = LogForm.auto,
) -> None:
    """Run this node until Ctrl-C.

    Exits with 1 and one line if the server does not know this node's key, or no longer does.

    Example: `fedslm node up north`
    """
    with clear_errors():
        from fedslm.cli.server import until_stopped
        from fedslm.deployment import node
        from fedslm.deployment.fleet import NotKnown
        from fedslm.deployment.journal import log_to_stderr

        keep_private()
        log_to_stderr(log_format)
        ready = node.open_node(directory, profile)
        typer.echo(f"{ready.file.name}: reading records ...")
        with node.alone(ready):
            count = node.import_records(ready)
        typer.echo(
            f"{ready.file.name}: {plural(count, 'record')}; connecting to {ready.admission.address}"
        )
        stop = until_stopped()
        threading.Thread(target=_leave, args=(stop,), daemon=True).start()
        try:
            node.run_node(ready, stop)
        except NotKnown as error:
            ERRORS.print(str(error), style="red")
            raise typer.Exit(1) from None


def _leave(stop: threading.Event) -> None:
    """Ends the process soon after ``stop`` is set, whatever it waits for: the ledger is on disk."""
    stop.wait()
    time.sleep(_GRACE_SECONDS)
    os._exit(0)
