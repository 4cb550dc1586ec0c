"""``fedslm doctor``: what this installation and this machine can do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from fedslm.cli.answers import print_facts
from fedslm.cli.console import ERRORS, FAILED, TRAIN, Json, clear_errors
from fedslm.storage import json_text

if TYPE_CHECKING:
    from fedslm.doctor import Finding

doctor_app = typer.Typer()
_SHOWN = ("fedslm", "python", "torch", "transformers", "peft", "opacus", "datasets", "flwr")
_SHOWN_TOO = ("dp-accounting", "cryptography")


@doctor_app.command("doctor", rich_help_panel=TRAIN)
def doctor(as_json: Json = False) -> None:
    """Check versions, devices, engines, permissions, memory, and what would use the network.

    Exits with 1, and says what to do, if fedslm cannot be used here. Nothing is written or sent.

    Example: `fedslm doctor`
    """
    with clear_errors():
        from fedslm.doctor import diagnosis

        found = list(diagnosis())
        broken = [each for each in found if not each.is_usable]
        if as_json:
            lines = [asdict(each) for each in found]
            typer.echo(json_text({"usable": not broken, "findings": lines}))
        else:
            _print(found)
        for each in broken:
            ERRORS.print(f"{each.name}: {each.text}; {each.remedy}", style="red")
        if broken:
            raise typer.Exit(FAILED)
        if not as_json:
            typer.echo("fedslm can be used here.")


def _print(found: Sequence[Finding]) -> None:
    """Prints the findings by area; of the packages those that matter, and those with a problem."""
    shown = [each for each in found if each.area != "versions" or each.remedy or _is_shown(each.name)]
    for area, part in groupby(shown, key=lambda each: each.area):
        Console().print(area, style="bold", highlight=False)
        print_facts([(each.name, _line(each)) for each in part], [])


def _is_shown(name: str) -> bool:
    """Whether a package is shown even if nothing is wrong."""
    return name in _SHOWN or name in _SHOWN_TOO


def _line(finding: Finding) -> str:
    """A finding with its remedy."""
    return f"{finding.text}; {finding.remedy}" if finding.remedy else finding.text
