"""Shared code of all commands: options, error messages, reading a configuration."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from fedslm import config as configuration
from fedslm import validation
from fedslm.config import Config
from fedslm.errors import (
    ConfigError,
    DataError,
    FedslmError,
    LedgerError,
    MissingPackage,
    ModelError,
    OutOfRange,
    PrivacyError,
    Refused,
    Unusable,
    printable,
    told_as,
)
from fedslm.extras import explained

if TYPE_CHECKING:
    from fedslm.recipes import Completed

FINE, FAILED, INPUT, REFUSED, INTERRUPTED = 0, 1, 2, 3, 130  # see the table in docs/cli.md
ERRORS = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
TRAIN, USE, PRIVACY, DEPLOY = "Train", "Use", "Privacy", "Deploy"  # panels of `fedslm --help`


_OF_INPUT = (ConfigError, DataError, LedgerError, MissingPackage, ModelError, OutOfRange, Unusable)


class LogForm(StrEnum):
    """Log format of a long-running program."""

    auto = "auto"
    text = "text"
    json = "json"


ConfigPath = Annotated[Path, typer.Argument(help="A TOML file.", metavar="CONFIG")]
Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one value; may be repeated."),
]
LogFormat = Annotated[
    LogForm, typer.Option("--log-format", help="auto: text on a terminal, JSON lines elsewhere.")
]
Json = Annotated[
    bool, typer.Option("--json", help="Print the result as one JSON line on standard output.")
]


@contextmanager
def clear_errors(names: Mapping[str, str] = MappingProxyType({})) -> Iterator[None]:
    """Prints our own errors without a traceback, and ends with their exit code.

    The import error of an optional package is one of them (:mod:`fedslm.extras`).

    Args:
        names: Config keys and arguments of Python to the options that set them.
    """
    try:
        with explained(), told_as(names):
            yield
    except FedslmError as error:
        said = "\n".join(map(printable, str(error).split("\n")))
        text = Text.assemble(("error: ", "red bold"), said)
        ERRORS.print(text)
        raise typer.Exit(code_of(type(error))) from None


def code_of(kind: type[FedslmError]) -> int:
    """Returns the exit code of an error: invalid input, refusal, or failure."""
    if issubclass(kind, _OF_INPUT):
        return INPUT
    return REFUSED if issubclass(kind, PrivacyError | Refused) else FAILED


def keep_private() -> None:
    """Makes new files (records, ledgers, updates and logs) readable only by their owner."""
    os.umask(0o077)


def load_config(path: Path, overrides: list[str], *, deployed: bool = False) -> Config:
    """Reads a config and completes it as :func:`load_completed` does."""
    return load_completed(path, overrides, deployed=deployed).config


def load_completed(path: Path, overrides: list[str], *, deployed: bool = False) -> Completed:
    """Reads a config and completes it as :func:`complete` does."""
    return complete(configuration.from_toml(path, overrides), deployed=deployed)


def complete(config: Config, *, deployed: bool = False) -> Completed:
    """Completes a config from a recipe, refuses contradictions, and prints warnings."""
    from fedslm.recipes import completed

    made = completed(config, deployed=deployed)
    validation.check(made.config)
    for line in made.lines():
        ERRORS.print(line)
    for warning in validation.warnings(made.config):
        ERRORS.print(f"warning: {warning}", style="yellow")
    return made
