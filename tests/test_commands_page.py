"""The site's list of commands holds every command, argument and option that the program has."""

from __future__ import annotations

import importlib.util
import re
from types import SimpleNamespace
from typing import Any

import click
from support.commands import ROOT
from typer.main import get_command

from fedslm.cli import app


def page() -> str:
    """docs/commands.md as the site has it."""
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    hooks: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    markdown = (ROOT / "docs" / "commands.md").read_text()
    return str(hooks.on_page_markdown(markdown, config=SimpleNamespace(repo_url="")))


def leaves(command: click.Command, *path: str) -> dict[str, click.Command]:
    """Each command that is no group, by its full name."""
    if not isinstance(command, click.Group):
        return {" ".join(path): command}
    return {
        name: each
        for part, below in command.commands.items()
        for name, each in leaves(below, *path, part).items()
    }


def test_every_command_has_its_section() -> None:
    """In each section: the help, one row for each argument and option with its text, and its values."""
    parts = re.split(r"(?m)^## (.+)$", page())
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    expected = leaves(get_command(app), "fedslm")
    assert list(sections) == list(expected)
    for name, command in expected.items():
        text = sections[name]
        assert (command.help or "").split("\n")[0] in text
        rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
        assert len(rows) == len(command.params), name
        for row, parameter in zip(rows, command.params, strict=True):
            cells = re.split(r"(?<!\\)\|", row)
            assert len(cells) == 5, row
            assert cells[2].strip() == getattr(parameter, "help", "").replace("|", r"\|"), name
            if isinstance(parameter, click.Option):
                assert all(f"`{option}`" in cells[1] for option in parameter.opts), name
            if parameter.required:
                assert cells[3].strip() == "required", name


def test_the_guide_links_to_it() -> None:
    """docs/cli.md explains, docs/commands.md lists."""
    assert "(commands.md)" in (ROOT / "docs" / "cli.md").read_text()
