"""``fedslm policy``: a node's own policy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedslm import layout
from fedslm.cli.console import clear_errors
from fedslm.cli.examples import AnyProfile, Profile

policy_app = typer.Typer(
    help="A node's policy: the requests that it accepts from a server.", no_args_is_help=True
)


@policy_app.command("example")
def example(profile: AnyProfile = Profile.hospital) -> None:
    """Print an example policy.

    Example: `fedslm policy example > policy.toml`
    """
    from fedslm.deployment.starters import node_example

    typer.echo(node_example(profile.value, layout.POLICY), nl=False)


@policy_app.command("check")
def check(path: Annotated[Path, typer.Argument(help="A policy file.", metavar="POLICY")]) -> None:
    """Check a policy, and show the budget that it allows.

    Example: `fedslm policy check policy.toml`
    """
    with clear_errors():
        from fedslm.privacy.policy import open_policy

        words = open_policy(path).in_words()
        typer.echo(f"{path}: ok; over the lifetime of the data set {words}")
