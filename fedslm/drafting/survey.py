"""Looks at data that nobody has described yet: its columns, classes, lengths and people.

What it counts in private records is for the screen of their owner. A draft takes nothing from it but
the names of columns; the maximum length comes from the public split.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fedslm.config import DataConfig, ModelConfig, TaskConfig
from fedslm.config.base import TaskName
from fedslm.config.tasks import TASKS
from fedslm.data import labels as names
from fedslm.data.layouts import LAYOUTS
from fedslm.data.missing import is_missing, name_of
from fedslm.data.owners import owners_in
from fedslm.data.tables import batches, rows_in
from fedslm.data.turns import is_turns
from fedslm.errors import DataError
from fedslm.models import families
from fedslm.models.base import load_tokenizer, local
from fedslm.tasks import build

if TYPE_CHECKING:
    from datasets import Dataset

Kind = Literal["text", "number", "list", "turns", "other"]
_LOOKED_AT = 5000
_MEASURED = 1000
_QUANTILE = 0.95
_GRAIN, _SHORTEST = 32, 16
_LONGEST = 4096  # tokens; also where a base has no limit
_TOKENS_OF_A_WORD = 1.5
_MOST_CLASSES = 200
TEXTS = ("text", "note", "sentence", "content", "body", "message", "review", "document", "title")
_WORDS = ("tokens", "words")
PROMPTS = ("prompt", "instruction", "question", "input", "document", "dialogue", "article", *TEXTS)
CLASSES = (
    *("label", "labels", "class", "classes", "category", "intent", "diagnosis", "department"),
    *("topic", "sentiment", "target", "kind", "type", "code"),
)
_TAGS = ("tags", "ner_tags", "labels")
ANSWERS = ("completion", "answer", "response", "output", "summary", "target", "chosen")


@dataclass(frozen=True)
class Column:
    """One column, as far as it was examined.

    Attributes:
        name: Its name.
        kind: What its values are.
        different: Number of different values among those examined, or of different elements of lists; 0
            for objects.
        words: Mean number of words, or of elements of a list.
        examined: Number of records examined.
        is_empty: Whether all values are missing.
    """

    name: str
    kind: Kind
    different: int
    words: float
    examined: int
    is_empty: bool = False

    @property
    def text(self) -> str:
        """The column in words."""
        match self.kind:
            case "text":
                return f"text, {self.different} different values, {self.words:.1f} words"
            case "list":
                return f"lists, {self.different} different elements, {self.words:.1f} in each"
            case "number":
                return f"numbers, {self.different} different values"
            case "turns":
                return "conversations"
            case _:
                return "empty" if self.is_empty else "objects"

    @property
    def is_like_classes(self) -> bool:
        """Whether its values repeat as the names of classes do."""
        return 2 <= self.different <= min(_MOST_CLASSES, self.examined / 2)


def columns_of(dataset: Dataset) -> tuple[Column, ...]:
    """Examines each column of a data set: at most 5,000 records, evenly spread.

    Raises:
        DataError: The data set is empty.
    """
    if len(dataset) == 0:
        raise DataError("the data has no records")
    every = math.ceil(len(dataset) / _LOOKED_AT)
    sample = dataset.select(range(0, len(dataset), every))
    values: dict[str, list[Any]] = {name: [] for name in sample.column_names}
    for _, batch in batches(sample):
        for name, part in batch.items():
            values[name] += part
    return tuple(_column(name, found) for name, found in values.items())


def _column(name: str, values: Sequence[Any]) -> Column:
    """Describes one column."""
    there = [value for value in values if isinstance(value, list | dict) or not is_missing(value)]
    kind = Counter(map(_kind, there)).most_common(1)[0][0] if there else "other"
    different, words = 0, 0.0
    if kind in ("text", "number"):
        different = len({name_of(value) for value in there})
        words = sum(len(str(value).split()) for value in there) / len(there)
    elif kind == "list":
        elements = [each for value in there if isinstance(value, list) for each in value]
        different = len({name_of(each) for each in elements if not isinstance(each, list | dict)})
        words = len(elements) / len(there)
    return Column(name, kind, different, words, len(values), not there)


def _kind(value: object) -> Kind:
    """What one value is."""
    match value:
        case str():
            return "text"
        case bool() | int() | float():
            return "number"
        case list():
            return "turns" if is_turns(value) else "list"
        case _:
            return "other"


def texts_in(task: TaskName, columns: Iterable[Column], taken: Sequence[str | None]) -> tuple[str, ...]:
    """Names the columns that look like the input, the best first.

    Args:
        task: What is learned.
        columns: The columns.
        taken: Columns that have another use.

    >>> columns = [Column("kind", "text", 4, 1.0, 90), Column("entry", "text", 90, 14.0, 90)]
    >>> texts_in("classification", columns, [])
    ('entry',)
    """
    free = [each for each in columns if each.name not in taken]
    if TASKS[task].classes == "each word":
        return _ranked(free, _WORDS, lambda each: each.kind == "list", lambda each: each.different)
    known = PROMPTS if TASKS[task].has_prompt or TASKS[task].reads_turns else TEXTS
    texts = [each for each in free if each.kind == "text" and (each.words > 1 or each.name in known)]
    return _ranked(texts, known, lambda _: True, lambda each: each.words)


def targets_in(
    task: TaskName, columns: Iterable[Column], taken: Sequence[str | None]
) -> tuple[str, ...]:
    """Names the columns that look like the target, the best first; none if the task has no target.

    Args: as :func:`texts_in`.

    >>> columns = [Column("kind", "text", 4, 1.0, 90), Column("entry", "text", 90, 14.0, 90)]
    >>> targets_in("classification", columns, ["entry"])
    ('kind',)
    """
    kind, free = TASKS[task], [each for each in columns if each.name not in taken]
    match kind.classes:
        case "each word":
            return _ranked(free, _TAGS, lambda each: each.kind == "list", lambda each: -each.different)
        case "several":
            found = [each for each in free if each.kind in ("text", "list")]
            return _ranked(
                found, CLASSES, lambda each: each.kind == "list", lambda each: -each.different
            )
        case "one":
            found = [each for each in free if each.kind in ("text", "number")]
            few = [each for each in found if each.is_like_classes or each.name.lower() in CLASSES]
            return _ranked(few, CLASSES, lambda _: True, lambda each: -each.different)
        case _ if kind.label == "none":
            return ()
    numbers = [each for each in free if each.kind == "number" and each.name.lower() in ANSWERS]
    found = [*(each for each in free if each.kind == "text"), *numbers]
    return _ranked(found, ANSWERS, lambda each: each.words > 1, lambda each: each.words)


def _ranked(
    columns: Sequence[Column],
    known: Sequence[str],
    fits: Callable[[Column], bool],
    rank: Callable[[Column], float],
) -> tuple[str, ...]:
    """Columns with known names in their order, then those that fit by their rank, the highest first."""
    named = [each for each in columns if each.name.lower() in known]
    named.sort(key=lambda each: known.index(each.name.lower()))
    others = [each for each in columns if fits(each) and each not in named]
    return tuple(each.name for each in [*named, *sorted(others, key=rank, reverse=True)])


def layout_of(task: TaskName, columns: Iterable[Column]) -> tuple[str, ...]:
    """The columns of the first layout that a task knows and the data has; empty if there is none.

    A config then need not name them: :func:`fedslm.data.layouts.laid_out` finds them too.
    """
    there = {column.name for column in columns}
    fits = (each.columns for each in LAYOUTS if task in each.tasks and there.issuperset(each.columns))
    return next(fits, ())


@dataclass(frozen=True)
class Lengths:
    """Lengths of public records.

    Attributes:
        measure: "tokens", or "words" where the base's tokenizer is not here.
        median: The median.
        high: The 95 % quantile.
        longest: The maximum.
        max_length: What follows for ``task.max_length``.
        cut_share: Share of the records that are then cut.
    """

    measure: str
    median: int
    high: int
    longest: int
    max_length: int
    cut_share: float

    @property
    def text(self) -> str:
        """The lengths in words."""
        return (
            f"median {self.median} {self.measure}, 95 % up to {self.high}, longest {self.longest}; "
            f"task.max_length = {self.max_length} cuts {self.cut_share:.1%}"
        )


def lengths_of(public: Dataset, data: DataConfig, task: TaskConfig, model: ModelConfig) -> Lengths:
    """Measures at most 1,000 public records, evenly spread, and proposes a maximum length.

    The proposal is the 95 % quantile, rounded up to a multiple of 32 (or to 16), at most what the base
    can read.

    Args:
        public: The public split, checked.
        data: Its columns.
        task: The task; its maximum length is not used.
        model: The base.

    Raises:
        DataError: No record gives an example.
    """
    every = math.ceil(len(public) / _MEASURED)
    rows, directory = rows_in(public.select(range(0, len(public), every))), local(model)
    if directory is None:
        texts = (str(value).split() for row in rows for value in row.values() if value is not None)
        found = sorted(map(len, texts))
        return _proposed(found, "words", _LONGEST, _TOKENS_OF_A_WORD)
    limit = _positions(families.configuration(directory))
    whole = task.model_copy(update={"max_length": _LONGEST})
    prepared = build(whole, data, names.resolve(data, task, public)).prepare(
        rows, load_tokenizer(directory)
    )
    if not prepared.examples:
        raise DataError("no record of the public split gives an example; check its columns")
    return _proposed(sorted(each.length for each in prepared.examples), "tokens", limit, 1.0)


def _positions(values: Mapping[str, Any]) -> int:
    """Most tokens that a base can read, from its ``config.json``."""
    found = values.get("max_position_embeddings") or values.get("n_positions") or _LONGEST
    return min(_LONGEST, int(found))


def _proposed(lengths: Sequence[int], measure: str, limit: int, tokens: float) -> Lengths:
    """Rounds the quantile of sorted lengths, each of so many tokens."""
    high = lengths[math.ceil(_QUANTILE * len(lengths)) - 1]
    wanted = tokens * high
    rounded = _SHORTEST if wanted <= _SHORTEST else _GRAIN * math.ceil(wanted / _GRAIN)
    chosen = min(rounded, limit)
    cut = sum(tokens * each > chosen for each in lengths) / len(lengths)
    return Lengths(measure, lengths[len(lengths) // 2], high, lengths[-1], chosen, cut)


def people_in(dataset: Dataset, column: str, key: str) -> int:
    """Number of units that a column names.

    Args:
        dataset: The private records.
        column: The column.
        key: The option that named it, for errors.

    Raises:
        DataError: The column does not exist, or cannot define the unit.
    """
    return len({owner for owner in owners_in(dataset, column, key) if owner})


def classes_in(dataset: Dataset, data: DataConfig, task: TaskConfig) -> Counter[str]:
    """Counts the private records of each class; empty for tasks without classes.

    Raises:
        DataError: All records have the same class, so there is nothing to learn.
    """
    found = names.counts(dataset, data, task)
    if TASKS[task.name].classes == "one" and len(found) == 1:
        raise DataError(
            f"--label={data.label_column!r}: all records have the same class, {next(iter(found))!r}; "
            f"name a column with two classes or more"
        )
    return found
