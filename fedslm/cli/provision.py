"""``fedslm provision``: certificates, and admission of nodes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedslm.cli.console import ERRORS, Overrides, clear_errors, keep_private, load_config
from fedslm.errors import plural

if TYPE_CHECKING:
    from fedslm.deployment.control import Control

provision_app = typer.Typer(
    help="For server operators: certificates and node admission.", no_args_is_help=True
)
Server = Annotated[
    Path, typer.Option("--server", metavar="DIR", help="The server's directory (federation.toml).")
]
_WAIT_SECONDS = 60.0


@contextmanager
def reached(server: Path, seconds: float = _WAIT_SECONDS) -> Iterator[Control]:
    """A connection to the server; says once on standard error that it waits for one that is coming up.

    Raises:
        FederationError: The server is not there by then.
    """
    from fedslm.deployment.control import connected

    def say() -> None:
        text = f"waiting up to {seconds:g} s for the server in {server}"
        ERRORS.print(text)

    with connected(server) as control:
        control.wait(seconds, say)
        yield control


def warn_of_certificates(server: Path) -> None:
    """Warns on standard error about server certificates that expire soon."""
    from fedslm.deployment.certificates import server_warnings

    for warning in server_warnings(server):
        text = f"warning: {warning}"
        ERRORS.print(text, style="yellow")


@provision_app.command("init")
def init(
    file: Annotated[Path, typer.Argument(help="federation.toml.", metavar="FEDERATION")],
    name: Annotated[
        str | None, typer.Option("--name", help="Name of a new federation; default: federation.")
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(
            "--host",
            help="Name or address at which nodes reach the server; default: this machine's name.",
        ),
    ] = None,
) -> None:
    """Create the authority and the server's certificate, and federation.toml if there is none.

    Example: `fedslm provision init federation/federation.toml --name triage --host fed.example.org`
    """
    with clear_errors():
        from fedslm.deployment.authority import SERVER, certify, expires
        from fedslm.deployment.settings import FEDERATION_FILE
        from fedslm.deployment.starters import write_federation
        from fedslm.errors import ConfigError, Problem

        if file.name != FEDERATION_FILE:
            raise ConfigError([Problem(str(file), f"the file must be called {FEDERATION_FILE}")])
        keep_private()
        if write_federation(file, name, host):
            typer.echo(f"wrote {file}: check host and port; nodes must be able to reach them")
        certify(file.parent)
        end = expires(file.parent / SERVER)
        typer.echo(
            f"created authority.crt, server.crt (until {end:%Y-%m-%d}), their keys and operator.key in "
            f"{file.parent}"
        )
        typer.echo(
            "keep authority.key offline if you can: it is needed only by `fedslm provision renew`"
        )


@provision_app.command("renew")
def renew(server: Server = Path()) -> None:
    """Create a new server certificate; restart `fedslm server up` afterwards.

    Example: `fedslm provision renew --server federation`
    """
    with clear_errors():
        from fedslm.deployment import authority
        from fedslm.deployment.authority import SERVER, expires

        authority.renew(server)
        warn_of_certificates(server)
        typer.echo(f"{server / SERVER} is valid until {expires(server / SERVER):%Y-%m-%d}")


@provision_app.command("lab")
def lab(
    directory: Annotated[Path, typer.Argument(help="A new directory.", metavar="DIR")],
    config: Annotated[Path, typer.Option("--config", help="A simulation's config.")],
    overrides: Overrides = [],  # noqa: B006  (typer copies it)
    port: Annotated[int, typer.Option(help="Port that nodes connect to.")] = 8443,
    inner_port: Annotated[int, typer.Option(help="Loopback port of the SuperLink.")] = 9443,
) -> None:
    """Create a server and all nodes on this machine, with a simulation's data, to try a deployment.

    All keys are on one disk, so this protects no one.

    Example: `fedslm provision lab lab --config simulations/demo.toml --set federation.num_clients=3`
    """
    with clear_errors():
        from fedslm.deployment.lab import SERVER, make_lab

        keep_private()
        loaded = load_config(config, overrides)
        nodes = make_lab(directory, loaded, port=port, inner_port=inner_port)
        again = "".join(f" --set {each}" for each in overrides)
        typer.echo(f"created {plural(len(nodes), 'node')} and a server. Run each in its own terminal:")
        typer.echo(f"  fedslm server up {directory / SERVER}")
        for node in nodes:
            typer.echo(f"  fedslm node up {directory / node.name}")
        typer.echo(f"  fedslm server run {config} --server {directory / SERVER}{again}")


@provision_app.command("admit")
def admit(
    request: Annotated[Path, typer.Argument(help="The request that the node sent.", metavar="REQUEST")],
    server: Server = Path(),
    expected: Annotated[
        str | None,
        typer.Option("--fingerprint", help="Refuse the request unless its key has this fingerprint."),
    ] = None,
    reason: Annotated[
        str,
        typer.Option("--reason", help="Why a revoked node returns without its earlier ledger."),
    ] = "",
) -> None:
    """Admit a node, and write its admission file. Waits for a server that is starting.

    Compare the fingerprint with the node's operator over a separate channel, such as the telephone.

    Example: `fedslm provision admit north.request.json --server federation`
    """
    with clear_errors():
        from fedslm.deployment import admission, enrolment
        from fedslm.errors import Refused

        found = enrolment.fingerprint(enrolment.read_request(request)["node_key"])
        if expected is not None and expected != found:
            raise Refused(
                f"{request} is refused: its fingerprint is not {expected}; ask its sender again"
            )
        with reached(server) as control:
            node, told = admission.admit(server, request, control.register, reason=reason)
        _sign_again(server)
        typer.echo(f"admitted {node.name}; fingerprint {found}")
        typer.echo(f"send back (confidential): {told}")
        _say_fingerprint(server)


@provision_app.command("revoke")
def revoke(
    name: Annotated[str, typer.Argument(help="The node's name.", metavar="NAME")],
    server: Server = Path(),
) -> None:
    """Revoke a node. Waits for a server that is starting.

    A run in progress continues without it.

    Example: `fedslm provision revoke north --server federation`
    """
    with clear_errors():
        from fedslm.deployment import admission

        with reached(server) as control:
            node = admission.revoke(server, name, control.unregister)
        _sign_again(server)
        typer.echo(f"{node.name} is revoked: its key is never admitted again")


@provision_app.command("readmit")
def readmit(
    name: Annotated[str, typer.Argument(help="The node's name.", metavar="NAME")],
    reason: Annotated[str, typer.Option("--reason", help="Why it is readmitted; the audit shows it.")],
    server: Server = Path(),
) -> None:
    """Readmit a node whose ledger did not extend the one that the server had seen.

    First find out the cause with the node's operator: budget spent before still counts for the people
    in its data, whatever its ledger says now.

    Example: `fedslm provision readmit north --reason "disk lost, ledger restored from the backup of May
    2"`
    """
    with clear_errors():
        from fedslm.deployment import admission

        known = admission.readmit(server, name, reason)
        typer.echo(f"{name} is readmitted; it was excluded since {known.since}: {known.out}")
        if known.charges:
            typer.echo(
                f"before, its ledger had {plural(known.charges, 'charge')}, epsilon "
                f"{known.epsilon:.3f} at delta={known.delta:g}: the server no longer counts this, "
                f"but it was spent"
            )


@provision_app.command("rekey")
def rekey(server: Server = Path()) -> None:
    """Create a new operator's key, and new admissions for the nodes. Stop all runs first.

    Until a node has accepted its new admission (`fedslm node accept … --replace`), it refuses every
    request.

    Example: `fedslm provision rekey --server federation`
    """
    with clear_errors():
        from fedslm.deployment import admission

        keep_private()
        for path in admission.rekey(server):
            typer.echo(f"send (confidential): {path}")
        _say_fingerprint(server)
        typer.echo("each node runs `fedslm node accept … --replace --fingerprint …` and is restarted")


@provision_app.command("roster")
def roster(server: Server = Path()) -> None:
    """Sign the list of admitted nodes, with which nodes may share noise (secure aggregation).

    `fedslm provision admit` and `revoke` do it if authority.key is in the server's directory. If the
    key is kept offline, copy federation.toml, nodes.json and authority.crt there, run this, and copy
    signed-roster.json back. Nodes get the list from the server and check its signature.

    Example: `fedslm provision roster --server federation`
    """
    with clear_errors():
        from fedslm import layout
        from fedslm.deployment.rosters import sign_roster

        found = sign_roster(server)
        typer.echo(
            f"signed {server / layout.SIGNED_ROSTER}: list {found.serial} of "
            f"{plural(len(found.members), 'node')}"
        )


def _sign_again(server: Path) -> None:
    """Signs the roster after a change; says what to do if the key is not here."""
    from fedslm.deployment.authority import AUTHORITY_KEY
    from fedslm.deployment.rosters import sign_if_possible

    sign_if_possible(server)
    if not (server / AUTHORITY_KEY).exists():
        typer.echo("for secure aggregation: run `fedslm provision roster` where authority.key is")


def _say_fingerprint(server: Path) -> None:
    """Prints the fingerprint that operators compare over a separate channel."""
    from fedslm.deployment.admission import federation_fingerprint

    found = federation_fingerprint(server)
    typer.echo(f"and give them the federation's fingerprint over a separate channel: {found}")


@provision_app.command("list")
def list_nodes(server: Server = Path()) -> None:
    """List the admitted nodes.

    Example: `fedslm provision list --server federation`
    """
    with clear_errors():
        from fedslm.deployment.admission import admitted_nodes
        from fedslm.deployment.enrolment import fingerprint
        from fedslm.deployment.settings import read_federation

        read_federation(server)
        table = Table("name", "fingerprint", "admitted", "")
        for node in admitted_nodes(server):
            state = "revoked" if node.revoked else ""
            table.add_row(escape(node.name), fingerprint(node.node_key), node.admitted_at, state)
        Console().print(table)
