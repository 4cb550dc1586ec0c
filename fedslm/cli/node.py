"""``fedslm node``: what a node's operator does."""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path
from typing import Annotated

import typer

from fedslm.cli.console import LogForm, LogFormat, clear_errors, keep_private

_GRACE_SECONDS = 5.0
node_app = typer.Typer(help="The node operator's: enrol, check, run.", no_args_is_help=True)
Directory = Annotated[Path, typer.Argument(help="The node's own directory.", metavar="DIR")]


@node_app.command("enroll")
def enroll(
    directory: Directory,
    name: Annotated[str, typer.Option("--name", help="The node's name.")],
) -> None:
    """Make this node's keys, which never leave it, and a request for the server's operator.

    Example: `fedslm node enroll north --name north`
    """
    with clear_errors():
        from fedslm.deployment import enrolment

        keep_private()
        request = enrolment.enroll(directory, name)
        found = enrolment.fingerprint(enrolment.read_request(request)["node_key"])
        typer.echo(f"send to the server's operator: {request}")
        typer.echo(f"and tell them, over another way, the fingerprint: {found}")


@node_app.command("accept")
def accept(
    directory: Directory,
    admission: Annotated[Path, typer.Argument(help="What the server's operator sent back.")],
    expected: Annotated[
        str | None,
        typer.Option("--fingerprint", help="Refuse it unless its authority has this fingerprint."),
    ] = None,
    replaces: Annotated[
        bool, typer.Option("--replace", help="Take another authority than before.")
    ] = False,
) -> None:
    """Take what the server's operator sent back.

    Compare the authority's fingerprint with the server's operator over another way.

    Example: `fedslm node accept north north.admission.json --fingerprint 1a2b-3c4d-5e6f-7a8b`
    """
    with clear_errors():
        from fedslm.deployment import enrolment

        found = enrolment.accept(directory, admission, expected=expected, replaces=replaces)
        typer.echo(f"client {found.client} of {found.federation!r} at {found.address}")
        typer.echo(f"the authority's fingerprint: {enrolment.fingerprint(found.authority)}")


@node_app.command("check")
def check(directory: Directory) -> None:
    """Look at everything that would stop this node later.

    Example: `fedslm node check north`
    """
    with clear_errors():
        from fedslm.deployment.node import open_node
        from fedslm.deployment.preflight import preflight

        good = True
        for each in preflight(open_node(directory)):
            good = good and each.is_good
            typer.echo(f"{'ok ' if each.is_good else 'NO '} {each.name}: {each.detail}")
        raise typer.Exit(0 if good else 1)


@node_app.command("up")
def up(
    directory: Directory,
    profile: Annotated[
        str | None,
        typer.Option("--profile", help="hospital or phone, in place of the one in node.toml."),
    ] = None,
    log_format: LogFormat = LogForm.auto,
) -> None:
    """Run this node until Ctrl-C.

    Example: `fedslm node up north`
    """
    with clear_errors():
        from fedslm.cli.server import until_stopped
        from fedslm.deployment import node
        from fedslm.deployment.journal import log_to_stderr

        keep_private()
        log_to_stderr(log_format)
        ready = node.open_node(directory, profile)
        count = node.import_records(ready)
        typer.echo(f"{ready.file.name}: {count} records; connecting to {ready.admission.address}")
        stop = until_stopped()
        threading.excepthook = _say_why
        threading.Thread(target=_leave, args=(stop,), daemon=True).start()
        node.run_node(ready, stop)


def _say_why(what: threading.ExceptHookArgs) -> None:
    """Says in a line why Flower's heartbeats ended."""
    text = str(what.exc_value)
    reason = "the server does not know this node's key: it was revoked" if "401" in text else text
    logging.getLogger(__name__).error("heartbeats ended: %s", reason)


def _leave(stop: threading.Event) -> None:
    """Ends the process soon after it is told to stop, whatever it waits for: the ledger is on disk."""
    stop.wait()
    time.sleep(_GRACE_SECONDS)
    os._exit(0)
