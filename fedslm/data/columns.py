"""Selects the columns that are read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from string import Formatter
from typing import TYPE_CHECKING, Any

from fedslm.config import DataConfig, PrivacyConfig, TaskConfig
from fedslm.config.tasks import TASKS
from fedslm.data.missing import is_missing, name_of
from fedslm.errors import ConfigError, DataError, Problem

if TYPE_CHECKING:
    import pyarrow as pa

_LONGEST_PROMPT = 10_000
_FEATURES = b"huggingface"  # key of a schema's metadata


def needed(data: DataConfig, task: TaskConfig) -> dict[str, str]:
    """Returns the columns that a task reads.

    Args:
        data: Names of the columns.
        task: The task and its prompt.

    Returns:
        Purpose of each column (a dotted key) to its name.

    Raises:
        ConfigError: The prompt is not a valid template.

    >>> data = DataConfig(source="demo", label_column="answer")
    >>> needed(data, TaskConfig(name="instruction", prompt="{question}?"))
    {'task.prompt {question}': 'question', 'data.label_column': 'answer'}
    """
    columns = {"data.text_column": data.text_column}
    if task.prompt is not None:
        columns = {f"task.prompt {{{name}}}": name for name in placeholders(task.prompt)}
    kind = TASKS[task.name]
    if kind.label == "needed" or (kind.label == "turns" and data.label_column is not None):
        columns["data.label_column"] = str(data.label_column)
    if kind.has_rejected:
        columns["data.rejected_column"] = str(data.rejected_column)
    return columns


def needed_to_share(data: DataConfig, privacy: PrivacyConfig) -> dict[str, str]:
    """Columns that assign a simulation's records to clients and units, in the form of :func:`needed`.

    >>> needed_to_share(DataConfig(source="demo", partition="natural"), PrivacyConfig(unit="none"))
    {'data.natural_column': 'client'}
    """
    columns = {}
    if data.partition == "natural":
        columns["data.natural_column"] = data.natural_column
    if data.partition_column is not None:
        columns["data.partition_column"] = data.partition_column
    elif data.partition in ("dirichlet", "shard") and data.label_column is not None:
        columns["data.label_column"] = data.label_column
    if privacy.unit == "user" and privacy.unit_column is not None:
        columns["privacy.unit_column"] = privacy.unit_column
    return columns


@dataclass(frozen=True)
class Wanted:
    """The columns that are read from a source; the content of other columns is ignored.

    Attributes:
        needed: Purpose of each column (a dotted key) to its name; None: all columns are read.
        optional: Columns that are read if present.
        source: Name of the source, for errors.
        there: Column names seen so far.
    """

    needed: Mapping[str, str] | None = None
    optional: frozenset[str] = frozenset()
    source: str = "the data"
    there: dict[str, None] = field(default_factory=dict)

    def of(self, names: Iterable[str]) -> list[str]:
        """Returns the given names that are read, in order; records the names for :meth:`check`.

        Raises:
            DataError: A column that is read occurs twice.
        """
        met = list(names)
        self.there.update(dict.fromkeys(met))
        chosen = self.among(met)
        for name in chosen:
            if chosen.count(name) > 1:
                raise DataError(f"{self.source} has two columns {name!r}; rename one of them")
        return chosen

    def among(self, names: Iterable[str]) -> list[str]:
        """Returns the given names that are read, in order."""
        return [name for name in names if self.needed is None or name in self.columns]

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that are requested by name."""
        return tuple(dict.fromkeys([*(self.needed or {}).values(), *sorted(self.optional)]))

    def fit(self, table: pa.Table) -> pa.Table:
        """Returns the columns of a table that are read; requested but missing columns are null."""
        import pyarrow as pa

        chosen = self.of(table.column_names)
        fields = [table.schema.field(name) for name in chosen]
        fields += [pa.field(name, pa.null()) for name in self.columns if name not in chosen]
        columns = [table[each.name] if each.name in chosen else pa.nulls(len(table)) for each in fields]
        known = features_in(table.schema)
        kept = {"info": {"features": {name: known[name] for name in chosen if name in known}}}
        metadata = {_FEATURES: json.dumps(kept)} if known else None
        return pa.table(columns, schema=pa.schema(fields, metadata=metadata))

    def check(self) -> None:
        """Refuses data that lacks a needed column.

        Raises:
            DataError: States the column, its purpose and the columns that exist.
        """
        for key, column in (self.needed or {}).items():
            if column not in self.there:
                raise DataError(
                    f"{key}={column!r} is not a column of {self.source}; it has {', '.join(self.there)}"
                )


def features_in(schema: pa.Schema) -> dict[str, Any]:
    """Returns the feature metadata of the datasets library; empty if none is readable."""
    try:
        return dict(json.loads(schema.metadata[_FEATURES])["info"]["features"])
    except (KeyError, ValueError, TypeError, RecursionError):
        return {}


def placeholders(prompt: str) -> list[str]:
    """Returns the columns that a prompt names in braces.

    Raises:
        ConfigError: The braces are not balanced, or contain something other than a name.
    """
    try:
        parts = [(name, spec, how) for _, name, spec, how in Formatter().parse(prompt)]
    except ValueError as error:
        raise ConfigError([Problem("task.prompt", f"value {prompt!r}: {error}")]) from None
    names = [name for name, _, _ in parts if name is not None]
    if len(set(names)) < len(names) or len(prompt) > _LONGEST_PROMPT:
        message = f"must name each column once, in at most {_LONGEST_PROMPT} characters"
        raise ConfigError([Problem("task.prompt", message)])
    plain = all(
        name.isidentifier() and not spec and not how for name, spec, how in parts if name is not None
    )
    if not names or not plain:
        message = f"value {prompt!r}: name at least one column in braces, such as {{text}}"
        raise ConfigError([Problem("task.prompt", message)])
    return names


def names_in(value: object) -> tuple[str, ...]:
    """Returns the class names of a multi-label record: a list, or text separated by , ; or |.

    >>> names_in("heart, bone"), names_in(["heart"]), names_in(None)
    (('heart', 'bone'), ('heart',), ())
    """
    if is_missing(value):
        return ()
    if isinstance(value, list | tuple):
        return tuple(name_of(name) for name in value if not is_missing(name))
    return tuple(name.strip() for name in re.split(r"[,;|]", str(value)) if name.strip())
