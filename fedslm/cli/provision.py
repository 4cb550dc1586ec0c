"""``fedslm provision``: certificates, and which nodes are let in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedslm.cli.console import Overrides, clear_errors, keep_private, load_config

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
        from fedslm.deployment.authority import SERVER, certify, expires
        from fedslm.deployment.settings import FEDERATION_FILE
        from fedslm.errors import ConfigError, Problem

        if file.name != FEDERATION_FILE:
            raise ConfigError([Problem(str(file), f"the file must be called {FEDERATION_FILE}")])
        keep_private()
        certify(file.parent)
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
        from fedslm.deployment import authority
        from fedslm.deployment.authority import SERVER, expires

        authority.renew(server)
        typer.echo(f"{server / SERVER} is valid until {expires(server / SERVER):%Y-%m-%d}")


@provision_app.command("lab")
def lab(
    directory: Annotated[Path, typer.Argument(help="A new directory.", metavar="DIR")],
    config: Annotated[Path, typer.Option("--config", help="A simulation's config.")],
    overrides: Overrides = [],  # noqa: B006  (typer copies it)
    port: Annotated[int, typer.Option(help="Port that nodes reach.")] = 8443,
    inner_port: Annotated[int, typer.Option(help="Loopback port of the SuperLink.")] = 9443,
) -> None:
    """Make a server and all nodes on this machine, with a simulation's data: to try it out.

    Every key lies on one disk, so it protects nobody.

    Example: `fedslm provision lab lab --config simulations/demo.toml --set federation.num_clients=3`
    """
    with clear_errors():
        from fedslm.deployment.lab import SERVER, make_lab

        keep_private()
        loaded = load_config(config, overrides)
        nodes = make_lab(directory, loaded, port=port, inner_port=inner_port)
        again = "".join(f" --set {each}" for each in overrides)
        typer.echo(f"made {len(nodes)} nodes and a server. Now, each in a terminal of its own:")
        typer.echo(f"  fedslm server up {directory / SERVER}")
        for node in nodes:
            typer.echo(f"  fedslm node up {directory / node.name}")
        typer.echo(f"  fedslm server run {config} --server {directory / SERVER}{again}")


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
        from fedslm.deployment.authority import AUTHORITY
        from fedslm.deployment.control import connected
        from fedslm.errors import RunError

        found = enrolment.fingerprint(enrolment.read_request(request)["node_key"])
        if expected is not None and expected != found:
            raise RunError(f"{request} is refused: its fingerprint is {found}, not {expected}")
        with connected(server) as control:
            node, admission = enrolment.admit(server, request, control.register)
        typer.echo(f"admitted {node.name} as client {node.client}; fingerprint {found}")
        typer.echo(f"send back: {admission}")
        authority = enrolment.fingerprint((server / AUTHORITY).read_text(encoding="utf-8"))
        typer.echo(f"and tell them, over another way, the authority's fingerprint: {authority}")


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
                escape(node.name), str(node.client), fingerprint(node.node_key), node.admitted_at, state
            )
        Console().print(table)
