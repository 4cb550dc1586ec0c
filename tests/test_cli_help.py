"""Tests of what ``--help`` shows, over every command."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner
from typer.main import get_command
from typer.models import ParameterInfo

from fedslm.cli import app

ROOT = get_command(app)
PANELS = {
    "Train": {
        *(
            "simulate",
            "train",
            "demo",
            "distill",
            "config",
            "data",
            "model",
            "methods",
            "sweep",
            "tune",
        ),
        *("init", "doctor"),
    },
    "Use": {"predict", "generate", "evaluate", "export"},
    "Privacy": {"budget", "policy", "audit"},
    "Deploy": {"provision", "server", "node"},
}


def commands(group: click.Command = ROOT, *path: str) -> Iterator[tuple[str, ...]]:
    """The path of every command and group."""
    yield path
    if isinstance(group, click.Group):
        for name, command in group.commands.items():
            yield from commands(command, *path, name)


def words(text: str) -> str:
    """A text without boxes and markup."""
    return " ".join(re.findall(r"\w+", text))


def shown(*arguments: str) -> str:
    """What a call prints on a wide terminal."""
    result = CliRunner().invoke(ROOT, arguments, env={"COLUMNS": "500", "TERM": "dumb"})
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("path", commands(), ids=" ".join)
def test_every_argument_and_option_is_explained(path: tuple[str, ...]) -> None:
    """``-h`` works everywhere, and shows the help of each argument and option as it is declared."""
    command = ROOT
    for name in path:
        assert isinstance(command, click.Group)
        command = command.commands[name]
    page = words(shown(*path, "-h"))
    assert page.startswith("Usage")
    if command.callback is None:
        return
    for name, parameter in inspect.signature(command.callback, eval_str=True).parameters.items():
        (declared,) = (e for e in parameter.annotation.__metadata__ if isinstance(e, ParameterInfo))
        assert declared.help, name
        assert words(declared.help) in page, name


def test_commands_stand_in_panels() -> None:
    """The root's help groups every command by what it is for."""
    parts = re.split(r"─ (Options|Train|Use|Privacy|Deploy) ─", shown("--help"))
    page = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert parts[1::2] == ["Options", *PANELS]
    for panel, names in PANELS.items():
        assert set(re.findall(r"^│ (\w+) ", page[panel], re.MULTILINE)) == names
    assert "Commands" not in "".join(parts)


@pytest.mark.parametrize(
    ("typed", "meant"), [(("simulat",), "simulate"), (("config", "chek"), "check")], ids=" ".join
)
def test_a_misspelt_command_is_suggested_once(typed: tuple[str, ...], meant: str) -> None:
    """A command that there is not is answered with the nearest, once."""
    result = CliRunner().invoke(ROOT, typed, env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 2
    assert result.stderr.lower().count("did you mean") == 1
    assert f"'{meant}'" in result.stderr
