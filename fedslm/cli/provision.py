"""``fedslm provision``: certificates, and which nodes are let in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedslm.cli.console import clear_errors

provision_app = typer.Typer(
    help="The server operator's: certificates, and which nodes are let in.", no_args_is_help=True
)
Server = Annotated[
    Path, typer.Option("--server", metavar="DIR", help="The server's directory (federation.toml).")
]


@provision_app.command("init")
def init(
    file: Annotated[Path, typer.Argument(help="federation.toml.", metavar="FEDERATION")],
) -> None:
    """Make the certificate authority and the server's certificate, beside federation.toml.

    Example: `fedslm provision init federation/federation.toml`
    """
    with clear_errors():
        from fedslm.deployment.authority import SERVER, create_authority, expires
        from fedslm.deployment.settings import FEDERATION_FILE, read_federation
        from fedslm.errors import ConfigError, Problem

        if file.name != FEDERATION_FILE:
            raise ConfigError([Problem(str(file), f"the file must be called {FEDERATION_FILE}")])
        federation = read_federation(file.parent)
        create_authority(file.parent, federation.name, federation.authority_days)
        _issue(file.parent)
        end = expires(file.parent / SERVER)
        typer.echo(
            f"made authority.crt, server.crt (until {end:%Y-%m-%d}) and their keys in {file.parent}"
        )
        typer.echo(
            "keep authority.key offline if you can: it is needed by `fedslm provision renew` alone"
        )


@provision_app.command("renew")
def renew(server: Server = Path()) -> None:
    """Make a new server certificate; restart `fedslm server up` afterwards.

    Example: `fedslm provision renew --server federation`
    """
    with clear_errors():
        from fedslm.deployment.authority import SERVER, expires

        _issue(server)
        typer.echo(f"{server / SERVER} is valid until {expires(server / SERVER):%Y-%m-%d}")


@provision_app.command("admit")
def admit(
    request: Annotated[Path, typer.Argument(help="What the node sent.", metavar="REQUEST")],
    server: Server = Path(),
    expected: Annotated[
        str | None,
        typer.Option("--fingerprint", help="Refuse the request unless its key has this fingerprint."),
    ] = None,
) -> None:
    """Let a node in, and write what it is to be told. The server must be up.

    Compare the fingerprint with the node's operator over another way, such as the telephone.

    Example: `fedslm provision admit north.request.json --server federation`
    """
    with clear_errors():
        from fedslm.deployment import enrolment
        from fedslm.deployment.control import connected
        from fedslm.errors import RunError

        found = enrolment.fingerprint(enrolment.read_request(request)["node_key"])
        if expected is not None and expected != found:
            raise RunError(f"{request} is refused: its fingerprint is {found}, not {expected}")
        with connected(server) as control:
            node, admission = enrolment.admit(server, request, control.register)
        typer.echo(f"admitted {node.name} as client {node.client}; fingerprint {found}")
        typer.echo(f"send back: {admission}")


@provision_app.command("revoke")
def revoke(
    name: Annotated[str, typer.Argument(help="The node's name.", metavar="NAME")],
    server: Server = Path(),
) -> None:
    """Shut a node out. The server must be up.

    Example: `fedslm provision revoke north --server federation`
    """
    with clear_errors():
        from fedslm.deployment import enrolment
        from fedslm.deployment.control import connected

        with connected(server) as control:
            node = enrolment.revoke(server, name, control.unregister)
        typer.echo(f"{node.name} is shut out; client {node.client} is free")


@provision_app.command("list")
def list_nodes(server: Server = Path()) -> None:
    """List the nodes that were admitted.

    Example: `fedslm provision list --server federation`
    """
    with clear_errors():
        from fedslm.deployment.enrolment import admitted_nodes, fingerprint

        table = Table("name", "client", "fingerprint", "admitted", "")
        for node in admitted_nodes(server):
            state = "revoked" if node.revoked else ""
            table.add_row(
                node.name, str(node.client), fingerprint(node.node_key), node.admitted_at, state
            )
        Console().print(table)


def _issue(directory: Path) -> None:
    """A certificate for all names of the server, and for its own loopback."""
    from fedslm.deployment.authority import issue_server
    from fedslm.deployment.settings import read_federation

    federation = read_federation(directory)
    names = [federation.host, *federation.also_known_as, "localhost", "127.0.0.1", "::1"]
    issue_server(directory, list(dict.fromkeys(names)), federation.certificate_days)
