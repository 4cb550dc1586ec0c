"""Hooks of mkdocs: addresses of files outside docs/, and the list of all commands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import click

_COMMANDS = "<!-- commands -->"
_OUTSIDE = re.compile(r"\]\(\.\./([^)\s]+)\)")


def on_page_markdown(markdown: str, *, config: Any, **_: Any) -> str:
    """Replaces ``../FILE``, which the site does not have, by its address, and fills in the commands.

    Without a ``repo_url`` in mkdocs.yml the text of the link stays, as code, and names the file.
    """
    if _COMMANDS in markdown:
        markdown = markdown.replace(_COMMANDS, commands())
    if config.repo_url:
        return _OUTSIDE.sub(rf"]({config.repo_url.rstrip('/')}/blob/main/\1)", markdown)
    return re.sub(r"\[([^\]]*)\]\(\.\./([^)\s]+)\)", _named, markdown)


def _named(link: re.Match[str]) -> str:
    """The text of a link, and the file that it leads to in a checkout."""
    text, target = link[1].strip("`"), link[2].partition("#")[0]
    is_named = text.lower() == "log" or target.rstrip("/").endswith(text.rstrip("/"))
    return f"`{target}`" if is_named else f"{text}, `{target}`"


def commands() -> str:
    """Every command of the program as Markdown: its help, its arguments and its options."""
    from typer.main import get_command

    from fedslm.cli import app

    return "\n".join(_pages(get_command(app), ("fedslm",)))


def _pages(command: click.Command, path: tuple[str, ...]) -> Iterator[str]:
    """Yields the text of a command, or of each command of a group, in their order."""
    if isinstance(command, click.Group):
        for name, each in command.commands.items():
            yield from _pages(each, (*path, name))
        return
    yield f"## {' '.join(path)}\n\n{command.help}\n"
    if command.params:
        yield "| argument or option | meaning | default |\n|---|---|---|"
        yield "\n".join(map(_row, command.params)) + "\n"


def _row(parameter: click.Parameter) -> str:
    """The row of an argument or an option."""
    kind, given, names = (
        parameter.type,
        parameter.default,
        [parameter.metavar or str(parameter.name).upper()],
    )
    values = "|".join(map(str, kind.choices)) if isinstance(kind, click.Choice) else ""
    if isinstance(parameter, click.Option):
        names = [*parameter.opts, *parameter.secondary_opts]
        values = "" if parameter.is_flag else values or parameter.metavar or kind.name
    is_plain = given not in (None, False, ..., [], ()) and not callable(given)
    default = "required" if parameter.required else f"`{given}`" if is_plain else ""
    cells = (
        " ".join([*(f"`{name}`" for name in names), values]),
        getattr(parameter, "help", ""),
        default,
    )
    return "".join(f"| {str(cell).strip().replace('|', chr(92) + '|')} " for cell in cells) + "|"
