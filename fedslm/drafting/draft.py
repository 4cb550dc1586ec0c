"""The commented TOML file that ``fedslm init`` writes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedslm.config.base import TaskName
from fedslm.config.commented import toml_value
from fedslm.config.tasks import TASKS
from fedslm.data.database import is_url
from fedslm.errors import printable

UNITS = ("record", "none")  # any other word names a column
_WIDTH = 46
_COMMENTS = {
    "run.name": "results are written to runs/{value}",
    "model.base": "frozen; only an adapter is trained",
    "data.source": "private: divided among the clients",
    "data.evaluation_source": "public: every run is evaluated on it",
    "data.evaluation_split": "public: every run is evaluated on it",
    "data.evaluation_query": "public: every run is evaluated on its rows",
    "data.label_column": "the public split names the classes",
    "data.partition": "each value of natural_column is a client",
    "task.max_length": "tokens, from the public split; longer texts are cut",
    "privacy.unit": "whose participation is protected",
    "privacy.unit_column": "all records with the same value are one unit",
    "privacy.epsilon": "of each client, over the whole run; smaller is more private",
    "federation.num_clients": "simulated on this machine",
}
_LEFT_OUT = """\
# A recipe chooses the rest: delta, clip norm, sample rate, batch size, learning rate, rounds.
# `fedslm config show {file}` prints every value. What you set here always wins.
"""


@dataclass(frozen=True)
class Wish:
    """What somebody wants to train.

    Attributes:
        data: Source of the private records.
        task: What is learned.
        base: The base model.
        unit: "record", "none", or the column that names a person.
        epsilon: Budget; None without privacy.
        clients: Number of simulated clients.
        text: Column with the input; None: found by the column layout.
        label: Column with the target; None: there is none, or found by the column layout.
        client_column: Column that names the client; None: records are divided evenly.
        evaluation: Source of the public records; None: a split of ``data``.
        train_split: The private split, for directories and hub names.
        evaluation_split: The public one.
        query: SQL for the private records.
        evaluation_query: SQL for the public ones.
    """

    data: str
    task: TaskName
    base: str
    unit: str
    epsilon: float | None
    clients: int
    text: str | None = None
    label: str | None = None
    client_column: str | None = None
    evaluation: str | None = None
    train_split: str = "train"
    evaluation_split: str = "test"
    query: str | None = None
    evaluation_query: str | None = None

    @property
    def unit_column(self) -> str | None:
        """The column that names a person; None if the unit is a record, or there is no privacy."""
        return None if self.unit in UNITS else self.unit


def values_of(wish: Wish, name: str, max_length: int | None = None) -> dict[str, dict[str, Any]]:
    """Returns a config's sections for a wish; a recipe completes it.

    Args:
        wish: The wish.
        name: Name of the run; what a name may not hold becomes a dash.
        max_length: Longest sequence; None: the default.
    """
    values: dict[str, dict[str, Any]] = {
        "run": {"name": re.sub(r"[^A-Za-z0-9._-]+", "-", name) or "run"},
        "model": {"base": wish.base},
        "data": _data(wish),
        "task": {"name": wish.task} | ({} if max_length is None else {"max_length": max_length}),
        "privacy": _privacy(wish),
        "federation": {"num_clients": wish.clients},
    }
    return values


def _data(wish: Wish) -> dict[str, Any]:
    """The section about the data."""
    values: dict[str, Any] = {"source": wish.data}
    from_queries = {
        "train_split": is_url(wish.data),
        "evaluation_split": is_url(wish.evaluation or wish.data),
    }
    for key, value, default in (
        ("train_split", wish.train_split, "train"),
        ("train_query", wish.query, None),
        ("evaluation_source", wish.evaluation, None),
        ("evaluation_split", wish.evaluation_split, "test" if wish.evaluation else None),
        ("evaluation_query", wish.evaluation_query, None),
        ("text_column", wish.text, None),
        ("label_column", wish.label, None),
    ):
        if value != default and not from_queries.get(key):
            values[key] = value
    if wish.text is not None and wish.label is None and TASKS[wish.task].label != "needed":
        values["label_column"] = ""
    if wish.client_column is not None:
        return values | {"partition": "natural", "natural_column": wish.client_column}
    return values


def _privacy(wish: Wish) -> dict[str, Any]:
    """The section about privacy."""
    if wish.unit == "none":
        return {"unit": "none"}
    column = {} if wish.unit_column is None else {"unit_column": wish.unit_column}
    return {"unit": "record" if not column else "user", **column, "epsilon": wish.epsilon}


def text_of(values: Mapping[str, Mapping[str, Any]], path: Path) -> str:
    """Returns a config's sections as a commented file.

    Args:
        values: Section to its keys.
        path: The file, for its comments.
    """
    file = printable(str(path))
    head = (
        f"# Written by `fedslm init`.\n"
        f"#   fedslm config check {file} --data\n"
        f"#   fedslm simulate {file}\n"
    )
    is_private = values["privacy"]["unit"] != "none"
    rest = f"\n{_LEFT_OUT.format(file=file)}" if is_private else ""
    body = "".join(
        f"\n[{section}]\n{''.join(_lines(section, keys))}" for section, keys in values.items()
    )
    return head + body + rest


def _lines(section: str, keys: Mapping[str, Any]) -> Iterator[str]:
    """Yields one line for each key, with its comment."""
    for key, value in keys.items():
        text = f"{key} = {toml_value(value)}"
        comment = _COMMENTS.get(f"{section}.{key}", "").format(value=value)
        yield f"{text.ljust(_WIDTH)} # {comment}\n" if comment else f"{text}\n"
