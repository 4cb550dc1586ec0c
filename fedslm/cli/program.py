"""The root of all commands: checks that apply before a command reads its arguments."""

from __future__ import annotations

import inspect
import io
import sys
from collections.abc import Iterator
from typing import Any

import click
from typer.core import TyperArgument, TyperGroup
from typer.models import ArgumentInfo

from fedslm.storage import is_text


class Program(TyperGroup):
    """The root group.

    click 8.5 added help texts for arguments, and overwrites with nothing those that typer 0.20 sets:
    this class restores every argument's help from its declaration.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for command in _commands(self):
            _restore_help(command)

    def main(self, *arguments: Any, **settings: Any) -> Any:
        """Runs a command; characters that the console cannot show are escaped, as on standard error."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        return super().main(*arguments, **settings)

    def parse_args(self, context: click.Context, arguments: list[str]) -> list[str]:
        """Refuses arguments that are not valid text: fedslm cannot write them to its files."""
        for each in arguments:
            if not is_text(each):
                message = f"{each!a} is not text in this console's encoding; write it in UTF-8"
                raise click.UsageError(f"{message}, and rename a file whose name is not", context)
        return super().parse_args(context, arguments)


def _commands(group: click.Group) -> Iterator[click.Command]:
    """All commands, at any depth."""
    for command in group.commands.values():
        if isinstance(command, click.Group):
            yield from _commands(command)
        else:
            yield command


def _restore_help(command: click.Command) -> None:
    """Restores the declared help of arguments that have none."""
    lost = [each for each in command.params if isinstance(each, TyperArgument) and not each.help]
    if not lost or command.callback is None:
        return
    declared = inspect.signature(command.callback, eval_str=True).parameters
    for argument in lost:
        for each in getattr(declared[argument.name].annotation, "__metadata__", ()):
            if isinstance(each, ArgumentInfo):
                argument.help = each.help
