"""A task's requirements on records, and its class names from the config or the public split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedslm.config import DataConfig, TaskConfig
from fedslm.config.tasks import TASKS
from fedslm.data.columns import names_in, needed
from fedslm.data.missing import is_missing, is_nothing, name_of
from fedslm.data.tables import batches, named
from fedslm.data.turns import answered, turns_of
from fedslm.data.values import BYTES, HOLES, NOTHING, described, is_value, text_in
from fedslm.errors import DataError, have, plural
from fedslm.storage import expand

if TYPE_CHECKING:
    from datasets import Dataset

_MOST_SHOWN = 20
_NO_ENTITY = "O"


def resolve(data: DataConfig, task: TaskConfig, evaluation: Dataset) -> tuple[str, ...]:
    """Returns class names or tags: from the config or its file, else from the public split.

    They never come from private data: revealing that a name occurs there would be a release.

    Raises:
        DataError: The file cannot be read, or there are fewer than two names (multi-label: none).
    """
    kind = TASKS[task.name]
    if kind.classes == "none":
        return ()
    if task.labels:
        return task.labels
    if task.labels_file is not None:
        return read_file(task.labels_file)
    found = set(counts(evaluation, data, task))
    if kind.classes == "each word":
        labels = tuple(sorted(found, key=lambda tag: (tag != _NO_ENTITY, tag)))
    else:
        labels = tuple(sorted(found))
    least = 1 if kind.classes == "several" else 2
    if len(labels) < least:
        raise DataError(
            f"the public evaluation split names only {plural(len(labels), 'label')}; set task.labels "
            f"or task.labels_file"
        )
    return labels


def read_file(name: str) -> tuple[str, ...]:
    """Reads names from a public file, one per line.

    Raises:
        DataError: The file cannot be read, contains a name twice, or has fewer than two names.
    """
    try:
        text = Path(expand(name)).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"task.labels_file={name!r} cannot be read: {error}") from None
    labels = tuple(line.strip() for line in text.splitlines() if line.strip())
    twice = [label for label, count in Counter(labels).items() if count > 1]
    if twice or len(labels) < 2:
        what = f"names {twice[0]!r} twice" if twice else f"names only {plural(len(labels), 'label')}"
        raise DataError(f"task.labels_file={name!r} {what}; it needs two or more, one on each line")
    return labels


def counts(dataset: Dataset, data: DataConfig, task: TaskConfig) -> Counter[str]:
    """Counts how often each name occurs; empty for tasks without names."""
    found: Counter[str] = Counter()
    if TASKS[task.name].classes != "none":
        column = str(data.label_column)
        for _, values in batches(dataset, [column]):
            for value in values[column]:
                found.update(names_of(value, task))
    return found


def names_of(value: Any, task: TaskConfig) -> tuple[str, ...]:
    """Returns the names in one record's label column, stripped of spaces."""
    if TASKS[task.name].classes == "one":
        return () if is_missing(value) else (name_of(value),)
    return names_in(value)


def check(dataset: Dataset, data: DataConfig, task: TaskConfig, part: str) -> None:
    """Refuses empty splits and records that lack what the task reads; names the rows.

    Raises:
        DataError: States the column, the number of records and the first rows.
    """
    if len(dataset) == 0:
        raise DataError(f"the {part} split is empty")
    columns = {column: key for key, column in needed(data, task).items()}
    wrong: dict[tuple[str, str, str], list[int]] = {}
    for first, values in batches(dataset, columns):
        for column, key in columns.items():
            demand = _demand(column, data, task)
            for row, value in enumerate(values[column], first):
                if not demand.fits(value):
                    found, remedy = described(value)
                    holds = f"no {demand.wanted} in column {column!r}"
                    if found != NOTHING:
                        holds = f"{holds}, but {found}"
                    if found not in (NOTHING, BYTES, HOLES) and not isinstance(value, dict):
                        remedy = demand.remedy or remedy
                    wrong.setdefault((f"{key}={column!r}: ", holds, remedy), []).append(row)
        if TASKS[task.name].classes == "each word":
            words, tags = values[data.text_column], values[str(data.label_column)]
            holds = "words and tags of different lengths in"
            holds = f"{holds} {data.text_column!r} and {data.label_column!r}"
            for row, pair in enumerate(zip(words, tags, strict=True), first):
                if all(isinstance(each, list) for each in pair) and len(pair[0]) != len(pair[1]):
                    wrong.setdefault(("", holds, "give each word one tag"), []).append(row)
    for (key, holds, remedy), rows in wrong.items():
        lacking = have(len(rows), "record")
        raise DataError(f"{key}in the {part} split, {lacking} {holds} ({named(rows)}); {remedy}")


def check_known(
    dataset: Dataset, data: DataConfig, task: TaskConfig, labels: tuple[str, ...], part: str
) -> None:
    """Refuses records with a name outside the list; names the rows.

    Raises:
        DataError: States the names, how often they occur and the first rows.
    """
    if not labels:
        return
    known, column = set(labels), str(data.label_column)
    unknown: Counter[str] = Counter()
    rows: list[int] = []
    for first, values in batches(dataset, [column]):
        for row, value in enumerate(values[column], first):
            strange = set(names_of(value, task)) - known
            unknown.update(strange)
            rows.extend([row] if strange else [])
    if unknown:
        shown = ", ".join(f"{label!r} ({count})" for label, count in unknown.most_common(5))
        more = ", …" if len(labels) > _MOST_SHOWN else ""
        raise DataError(
            f"the {part} split has labels that are not in task.labels or the public split: {shown} "
            f"in {named(rows)}; known: {', '.join(labels[:_MOST_SHOWN])}{more}"
        )


@dataclass(frozen=True)
class _Demand:
    """The requirement on a column's values.

    Attributes:
        fits: Returns whether a value meets it.
        wanted: The requirement in words.
        remedy: How to correct any other value; empty: the value itself determines the remedy.
    """

    fits: Callable[[Any], bool]
    wanted: str
    remedy: str = ""


def _demand(column: str, data: DataConfig, task: TaskConfig) -> _Demand:
    """Returns a task's requirement on a column."""
    kind = TASKS[task.name]
    if kind.classes == "each word":
        if column == data.text_column:
            return _Demand(_is_words, "list of words", "give a list of one text for each word")
        return _Demand(_is_tags, "list of tags", "give a list of one tag for each word")
    if column == data.label_column and kind.classes == "one":
        return _Demand(_is_text, "label", 'name one class, or use task.name="multi-label"')
    if column == data.label_column and kind.classes == "several":
        return _Demand(_is_names, "list or text of labels", "give a list of names")
    if task.prompt is not None and column not in (data.label_column, data.rejected_column):
        return _Demand(is_value, "single value for the prompt")
    if kind.label == "turns" and data.label_column is None:
        remedy = "name the column with the answers in data.label_column"
        return _Demand(_is_answered, "conversation with an answer", remedy)
    if kind.reads_turns:
        return _Demand(_is_text_or_turns, "text")
    return _Demand(_is_text, "text")


def _is_text(value: Any) -> bool:
    """True for text that is not blank, or a number or date that is meant as text."""
    return bool(text_in(value).strip())


def _is_text_or_turns(value: Any) -> bool:
    """True for text, or a readable conversation."""
    return _is_text(value) or bool(turns_of(value))


def _is_answered(value: Any) -> bool:
    """True for a readable conversation with at least one assistant turn."""
    return bool(answered(turns_of(value))[1])


def _is_words(value: Any) -> bool:
    """True for a list of one or more texts."""
    return isinstance(value, list) and bool(value) and all(isinstance(each, str) for each in value)


def _is_tags(value: Any) -> bool:
    """True for a list of values with none missing."""
    return isinstance(value, list) and all(map(_is_text, value))


def _is_names(value: Any) -> bool:
    """True for a list of names, a text, or a missing value."""
    if isinstance(value, list):
        return all(map(_is_text, value))
    return is_nothing(value) or isinstance(value, str | int)
