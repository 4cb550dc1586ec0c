"""The public records that both models are shown, and whether they are what they say."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fedslm.config import DistillConfig
from fedslm.data.columns import needed
from fedslm.data.duplicates import normalised
from fedslm.data.sources import cut, load, same_records
from fedslm.errors import ConfigError, DataError, Problem
from fedslm.inference.inputs import Rows
from fedslm.inference.trained import FinishedRun
from fedslm.tasks.base import Row

MOST_OVERLAP = 0.01
_RUN_OF_WORDS = 13
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Overlap:
    """Test records that the public records hold too.

    Attributes:
        records: Test records.
        found: Those of which the whole text, or a run of 13 words, is in a public record.
        dropped: Public records that were left out because of it.
    """

    records: int
    found: int
    dropped: int = 0

    @property
    def share(self) -> float:
        """Of the test records."""
        return self.found / self.records if self.records else 0.0


def public_rows(run: FinishedRun, settings: DistillConfig) -> Rows:
    """Reads the public records; they need the text's columns alone.

    Raises:
        ConfigError: No source is named.
        DataError: It cannot be read, is the private training split, or lacks a column.
    """
    if settings.source is None:
        message = "is missing; give public records: a hub name or a path (--data)"
        raise ConfigError([Problem("distill.source", message)])
    return rows_of(run, settings.source, settings.split, settings.max_records)


def rows_of(run: FinishedRun, source: str, split: str, most: int) -> Rows:
    """Reads records that are said to be public.

    Raises:
        DataError: As :func:`public_rows`.
    """
    private = run.data
    if same_records((source, split), (private.source, private.train_split)):
        raise DataError(
            f"{source} ({split}) is the private training split: what is learned from it directly is "
            f"covered by no ε; give public records"
        )
    dataset = load(source, split, key="distill.source", seed=run.seed)
    columns = text_columns(run)
    for column in columns:
        if column not in dataset.column_names:
            there = ", ".join(dataset.column_names)
            raise DataError(f"{source} ({split}) has no column {column!r}; it has {there}")
    rows: Rows = cut(dataset, most, run.seed).to_list()
    if not rows:
        raise DataError(f"{source} ({split}) holds no record; distillation needs public ones")
    return rows


def text_columns(run: FinishedRun) -> list[str]:
    """Columns that a model reads, without the label."""
    label = "data.label_column"
    return [column for key, column in needed(run.data, run.task).items() if key != label]


def without_overlap(
    rows: Rows, tests: Sequence[Row], columns: Sequence[str], *, drop: bool
) -> tuple[Rows, Overlap]:
    """Looks for test records among public ones: what is measured on them would flatter.

    Args:
        rows: Public records.
        tests: Records of the private distribution that transfer is measured on.
        columns: What is compared; case, spaces and Unicode forms make no difference.
        drop: Leave such public records out, instead of refusing.

    Returns:
        The public records to use, and what was found.

    Raises:
        DataError: More than one in a hundred test records is there, and ``drop`` is not set.
    """
    known = {mark for row in tests for mark in _marks(row, columns)}
    shared: set[str] = set()
    kept = []
    for row in rows:
        found = known & set(_marks(row, columns))
        shared |= found
        if not (found and drop):
            kept.append(row)
    count = sum(not shared.isdisjoint(_marks(row, columns)) for row in tests) if shared else 0
    overlap = Overlap(len(tests), count, len(rows) - len(kept))
    if overlap.share > MOST_OVERLAP and not drop:
        raise DataError(
            f"{count} of {len(tests)} test records ({overlap.share:.1%}) are in the public records too, as "
            f"a whole or in {_RUN_OF_WORDS} words in a row; at most {MOST_OVERLAP:.0%} may be. Give "
            f"other public records, or leave these out with --drop-overlap"
        )
    if not kept:
        raise DataError("every public record is in the test records too; give others")
    return kept, overlap


def _marks(row: Row, columns: Sequence[str]) -> Iterator[str]:
    """A record's text as a whole, and each of its runs of words."""
    texts = [normalised(row[column]) for column in columns]
    yield "\x1f".join(texts)
    for text in texts:
        words = _WORD.findall(text)
        for start in range(len(words) - _RUN_OF_WORDS + 1):
            yield " ".join(words[start : start + _RUN_OF_WORDS])
