"""The public records that both models read, and the check that they contain no test records."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fedslm.config import DistillConfig
from fedslm.data.columns import Wanted, needed
from fedslm.data.duplicates import normalised
from fedslm.data.sources import cut, load, same_records
from fedslm.data.tables import rows_in
from fedslm.errors import ConfigError, DataError, Problem, told_as
from fedslm.inference.inputs import Rows
from fedslm.inference.trained import TunedModel
from fedslm.tasks.base import Row

MOST_OVERLAP = 0.01
_LABEL = "data.label_column"
_RUN_OF_WORDS = 13
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Overlap:
    """Test records that also occur in the public records.

    Attributes:
        records: Number of test records.
        found: Number of test records contained in public records, see :func:`without_overlap`.
        dropped: Number of public records that were dropped because of it.
    """

    records: int
    found: int
    dropped: int = 0


def public_rows(run: TunedModel, settings: DistillConfig) -> Rows:
    """Reads the public records; they need only the text columns.

    Raises:
        ConfigError: No source is configured.
        DataError: The source cannot be read, is the private training split, or lacks a column.
    """
    if settings.source is None:
        message = "is missing; give public records: a hub name or a path (--data)"
        raise ConfigError([Problem("distill.source", message)])
    return rows_of(run, settings.source, settings.split, settings.max_records)


def rows_of(run: TunedModel, source: str, split: str, most: int) -> Rows:
    """Reads records that are declared public.

    Raises:
        DataError: As :func:`public_rows`.
    """
    private = run.data
    if same_records((source, split), (private.source, private.train_split)):
        raise DataError(
            f"{source} ({split}) is the private training split, and no ε covers what is learned "
            f"from it directly; give public records"
        )
    columns = needed(run.data, run.task)
    label = frozenset({columns.pop(_LABEL)} if _LABEL in columns else ())
    wanted = Wanted(columns, label, f"{source} ({split})")
    with told_as({"data.source": "distill.source"}):
        dataset = load(source, split, seed=run.seed, wanted=wanted)
    rows = rows_in(cut(dataset, most, run.seed))
    if not rows:
        raise DataError(f"{source} ({split}) holds no record; distillation needs public ones")
    return rows


def text_columns(run: TunedModel) -> list[str]:
    """Returns the columns that a model reads, without the label."""
    return [column for key, column in needed(run.data, run.task).items() if key != _LABEL]


def without_overlap(
    rows: Rows, tests: Sequence[Row], columns: Sequence[str], *, drop: bool
) -> tuple[Rows, Overlap]:
    """Searches the public records for test records, on which metrics would be too optimistic.

    A test record counts as contained if a public record has the same text, or if at least half of its
    words are in runs of 13 words that public records also contain (as in Touvron et al. 2023, arXiv
    2307.09288, A.6).

    Args:
        rows: Public records.
        tests: Records of the private distribution that transfer is measured on.
        columns: Columns to compare; case, spaces and Unicode form are ignored.
        drop: Drop such public records instead of refusing.

    Returns:
        The public records to use, and the overlap that was found.

    Raises:
        DataError: More than one in a hundred test records is contained, and ``drop`` is not set.
    """
    public = [_marks(row, columns) for row in rows]
    known = {mark for marks in public for mark in marks}
    found = [marks for row in tests if _is_held(marks := _marks(row, columns), known)]
    shared = {mark for marks in found for mark in marks}
    if not drop and len(found) > MOST_OVERLAP * len(tests):
        raise DataError(
            f"{len(found)} of {len(tests)} test records ({len(found) / len(tests):.1%}) are in the "
            f"public records too; at most {MOST_OVERLAP:.0%} may be. Give other public records, or "
            f"leave these out with --drop-overlap"
        )
    kept = [
        row for row, marks in zip(rows, public, strict=True) if not drop or shared.isdisjoint(marks)
    ]
    if not kept:
        raise DataError("every public record is in the test records too; give others")
    return kept, Overlap(len(tests), len(found), len(rows) - len(kept))


def _marks(row: Row, columns: Sequence[str]) -> list[int]:
    """Hashes of a record's whole text (first), and of each run of 13 words in it."""
    whole = "\x1f".join(normalised(row[column]) for column in columns)
    words = _WORD.findall(whole)
    runs = (words[start : start + _RUN_OF_WORDS] for start in range(len(words) - _RUN_OF_WORDS + 1))
    return [hash(whole), *(hash(tuple(run)) for run in runs)]


def _is_held(marks: Sequence[int], known: set[int]) -> bool:
    """Whether public records contain a test record: as a whole, or in runs that cover half of it."""
    whole, *runs = marks
    if whole in known:
        return True
    covered: set[int] = set()
    for start, run in enumerate(runs):
        if run in known:
            covered.update(range(start, start + _RUN_OF_WORDS))
    return 2 * len(covered) >= len(runs) + _RUN_OF_WORDS - 1 if runs else False
