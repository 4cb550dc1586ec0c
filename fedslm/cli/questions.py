"""What ``fedslm init`` needs to know: from its options, from a person at a terminal, or by a guess."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
import typer

from fedslm.cli.console import ERRORS
from fedslm.config import ModelConfig
from fedslm.config.base import TaskName
from fedslm.config.tasks import TASKS
from fedslm.data.database import is_url, refuse_password
from fedslm.errors import DataError, Unusable
from fedslm.storage import expand

if TYPE_CHECKING:
    from fedslm.drafting.guess import Guess
    from fedslm.drafting.survey import Column

NEEDED = {
    "data": "private records: a file, a directory, a hub name, a database URL or demo",
    "base": "base model: a directory, a hub name or demo",
    "unit": "record, the column that names a person, or none",
    "epsilon": "privacy budget of each client over the whole run; none is assumed (1 to 8 is common)",
    "query": "SQL that gives the private rows",
    "evaluation": "public records to evaluate on; `fedslm data split` makes them from one file",
    "evaluation_query": "SQL that gives the public rows",
}


def check_given(values: dict[str, Any]) -> None:
    """Refuses options that contradict each other, and missing ones if there is nobody to ask.

    Raises:
        Unusable: Names the options.
        DataError: A URL holds a password.
    """
    if values["unit"] == "none" and values["epsilon"] is not None:
        raise Unusable("--epsilon is only for a unit; leave it out with --unit none")
    for source in filter(None, (values["data"], values["evaluation"])):
        refuse_password(source)
    missing = _missing(values)
    if missing and not sys.stdin.isatty():
        lines = "".join(f"\n  --{key.replace('_', '-')}: {NEEDED[key]}" for key in missing)
        raise Unusable(f"missing, and there is no terminal to ask at:{lines}")


def answered(values: dict[str, Any], keys: Sequence[str] = tuple(NEEDED)) -> dict[str, Any]:
    """Asks for those of some values that are missing."""
    found = dict(values)
    while missing := [key for key in _missing(found) if key in keys]:
        found[missing[0]] = _asked(missing[0])
    return found


def _missing(values: dict[str, Any]) -> list[str]:
    """What is still needed, in the order in which it is asked for."""
    needed = ["data", "base", "unit"]
    if values["unit"] != "none":
        needed.append("epsilon")
    data = values["data"]
    if data is not None and is_url(data):
        needed.append("query")
        needed += [] if values["evaluation"] else ["evaluation_query"]
    elif data is not None and Path(expand(data)).is_file():
        needed.append("evaluation")
    if values["evaluation"] and is_url(values["evaluation"]):
        needed.append("evaluation_query")
    return [key for key in dict.fromkeys(needed) if values[key] is None]


def _asked(key: str) -> Any:
    """Asks for one value."""
    kind = float if key == "epsilon" else str
    return typer.prompt(f"{key.replace('_', ' ')}: {NEEDED[key]}\n>", type=kind, err=True)


def task_of(values: dict[str, Any], columns: Sequence[Column]) -> TaskName:
    """Returns the task that was given, or the one that the columns and the base fit, and says why.

    Raises:
        ModelError: The base cannot be found.
        Unusable: No task fits, or several do, and there is nobody to ask.
    """
    from fedslm.drafting import guess

    if values["task"] is not None:
        return cast(TaskName, values["task"])
    taken = (values["unit"], values["client_column"])
    free = [each for each in columns if each.name not in taken]
    found = guess.guesses(free, text=values["text"], label=values["label"])
    best = guess.best(found, guess.reads_of(ModelConfig(base=values["base"])))
    if sys.stdin.isatty():
        for each in best:
            ERRORS.print(f"the columns fit {each.task}: {each.why}")
        default = best[0].task if len(best) == 1 else None
        choice = click.Choice(list(TASKS))
        asked: TaskName = typer.prompt("task", default=default, type=choice, err=True)
        return asked
    if len(best) != 1:
        raise Unusable(_undecided(values["base"], found, best))
    ERRORS.print(f"task: {best[0].task} (a guess: {best[0].why}; --task names another)")
    return best[0].task


def _undecided(base: str, found: Sequence[Guess], best: Sequence[Guess]) -> str:
    """Says why no task was guessed, and what to give."""
    fit = "; ".join(f"{each.task} ({each.why})" for each in best or found)
    if best:
        why = f"the columns fit {fit}"
    elif found:
        why = f"the columns fit {fit}, which --base={base} cannot do"
    else:
        why = "the columns fit none"
    return f"--task is missing, and a guess is not possible: {why}; give one of {', '.join(TASKS)}"


def column_of(key: str, guesses: Sequence[str], columns: Sequence[Column]) -> str:
    """Says a guess of a column, and lets a person at a terminal correct it.

    Raises:
        DataError: There is no guess and nobody to ask, or no such column.
    """
    there = [column.name for column in columns]
    if sys.stdin.isatty():
        guess = guesses[0] if guesses else None
        asked = typer.prompt(f"{key} column", default=guess, type=click.Choice(there), err=True)
        return str(asked)
    if not guesses:
        raise DataError(
            f"no column looks like the {key}: name it with --{key}; there are {', '.join(there)}"
        )
    others = f", such as {guesses[1]}" if guesses[1:] else ""
    ERRORS.print(f"{key} column: {guesses[0]} (a guess; --{key} names another{others})")
    return guesses[0]
