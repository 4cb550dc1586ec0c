"""Which columns a task reads."""

from __future__ import annotations

import re
from string import Formatter

from fedslm.config import DataConfig, TaskConfig
from fedslm.data.missing import is_missing, name_of
from fedslm.errors import ConfigError, Problem

_LONGEST_PROMPT = 10_000


def needed(data: DataConfig, task: TaskConfig) -> dict[str, str]:
    """Columns that a task reads.

    Args:
        data: Names of the columns.
        task: The task, and its prompt.

    Returns:
        What the column is for (a dotted key) to the column.

    Raises:
        ConfigError: The prompt is no template.

    >>> data = DataConfig(source="demo", label_column="answer")
    >>> needed(data, TaskConfig(name="instruction", prompt="{question}?"))
    {'task.prompt {question}': 'question', 'data.label_column': 'answer'}
    """
    columns = {"data.text_column": data.text_column}
    if task.prompt is not None:
        columns = {f"task.prompt {{{name}}}": name for name in placeholders(task.prompt)}
    if task.name != "causal-lm":
        columns["data.label_column"] = str(data.label_column)
    if task.name == "preference":
        columns["data.rejected_column"] = str(data.rejected_column)
    return columns


def placeholders(prompt: str) -> list[str]:
    """Columns that a prompt names in braces.

    Raises:
        ConfigError: The braces are not balanced, or hold something else than a name.
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
    """Class names of a multi-label record: a list, or a text that separates them by , ; or |.

    >>> names_in("heart, bone"), names_in(["heart"]), names_in(None)
    (('heart', 'bone'), ('heart',), ())
    """
    if is_missing(value):
        return ()
    if isinstance(value, list | tuple):
        return tuple(name_of(name) for name in value if not is_missing(name))
    return tuple(name.strip() for name in re.split(r"[,;|]", str(value)) if name.strip())
