"""Compares a trained model with its base model, with confidence intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fedslm import layout
from fedslm.config.tasks import tasks_that
from fedslm.data import store
from fedslm.data.sources import cut, load_evaluation
from fedslm.data.tables import rows_in
from fedslm.data.values import is_value
from fedslm.errors import ConfigError, DataError, Problem, plural
from fedslm.inference.bootstrap import Comparison, Draws, Statistics, compare
from fedslm.inference.generation import default_max_tokens, prompts_of, write_greedily
from fedslm.inference.inputs import Rows
from fedslm.inference.text_scores import text_metrics, text_statistics
from fedslm.inference.trained import OnProgress, Trained, TunedModel
from fedslm.records import AdapterState
from fedslm.rng import stream
from fedslm.tasks.base import Example
from fedslm.tasks.prompts import Prompts
from fedslm.training.evaluation import statistics

Advance = Callable[[int], None]
RESAMPLES = 2000
_FEWEST_RESAMPLES = 1000
_PIECE_EXAMPLES = 256
_WITH_REFERENCES = tasks_that(lambda kind: kind.has_references)


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        metrics: Metric to base, tuned and difference, each with its interval.
        records: Number of records that the task's metrics are computed on.
        skipped: Number of unusable records: without text, or with an unknown label.
        truncated: Number of records whose end was cut off.
        written: Number of records for which texts were generated and scored; 0 if none was requested.
    """

    metrics: dict[str, Comparison]
    records: int
    skipped: int
    truncated: int
    written: int


def own_rows(run: TunedModel) -> Rows:
    """Returns the public evaluation split on which the run itself was evaluated.

    Raises:
        DataError: The split no longer exists.
    """
    if not (run.directory / layout.DATA / "evaluation.parquet").exists():
        raise DataError(
            f"{run.directory}/data/evaluation.parquet is not there any more, so the run's own split is "
            f"lost; name other data with --data"
        )
    return store.read_evaluation(run.directory / layout.DATA)


@dataclass(frozen=True)
class Elsewhere:
    """Evaluation data other than the run's own.

    Attributes:
        source: As ``data.evaluation_source``.
        split: As ``data.evaluation_split``; None: the run's.
        query: As ``data.evaluation_query``; None: the run's.
        max_records: Size of a seeded sample; None: all.
        optional: Further columns to read; None where they do not exist.
    """

    source: str
    split: str | None = None
    query: str | None = None
    max_records: int | None = None
    optional: frozenset[str] = frozenset()


def other_rows(run: TunedModel, data: Elsewhere) -> Rows:
    """Returns rows of other data with the run's columns.

    Raises:
        DataError: The rows cannot be read, lack a column, or are the private training split itself.
    """
    values = {
        "evaluation_source": data.source,
        "evaluation_split": data.split or run.data.evaluation_split,
        "evaluation_query": data.query or run.data.evaluation_query,
    }
    config, optional = run.data.model_copy(update=values), data.optional
    dataset = load_evaluation(config, run.task, run.seed, optional=optional)
    return rows_in(cut(dataset, data.max_records or len(dataset), run.seed))


@dataclass(frozen=True)
class EvaluationOptions:
    """Settings of an evaluation.

    Attributes:
        resamples: Bootstrap resamples, >= 1000.
        max_written: Number of records for which both models generate texts to score; 0: none.
    """

    resamples: int = RESAMPLES
    max_written: int = 0


def evaluate(
    trained: Trained, rows: Rows, on_progress: OnProgress, options: EvaluationOptions
) -> Evaluation:
    """Evaluates the trained model and its base model on the same records.

    Args:
        trained: Model of a run.
        rows: Records to evaluate on.
        on_progress: Receives the number of finished passes over a record, and the total.
        options: Number of resamples, and whether to score generated texts.

    Raises:
        ConfigError: Too few resamples, or the task has no references to score texts by.
        DataError: No record can be used.
    """
    _check(trained, options)
    prepared = trained.task.prepare(rows, trained.model.tokenizer)
    if not prepared.examples:
        raise DataError(
            f"none of {plural(len(rows), 'record')} can be used: they have no text or unknown labels"
        )
    kept = [rows[number] for number in prepared.kept]
    scored = _sample(kept, options.max_written, trained.run.seed)
    advance = _advancing(on_progress, 2 * (len(kept) + len(scored)))
    measured, texts = [], []
    try:
        for adapter in (trained.initial, trained.run.adapter):
            measured.append(_statistics(trained, prepared.examples, adapter, advance))
            if scored:
                texts.append(_text_statistics(trained, scored, adapter, advance))
    finally:
        trained.model.adapter.write(trained.run.adapter)
    draws = Draws(options.resamples, trained.run.seed)
    found = compare((measured[0], measured[1]), trained.task.metrics, draws)
    if scored:
        found |= compare((texts[0], texts[1]), text_metrics, draws)
    return Evaluation(found, len(kept), len(rows) - len(kept), prepared.truncated, len(scored))


def _check(trained: Trained, options: EvaluationOptions) -> None:
    """Refuses settings that would give misleading results."""
    if options.resamples < _FEWEST_RESAMPLES:
        message = f"value {options.resamples} must be at least {_FEWEST_RESAMPLES}"
        raise ConfigError([Problem("--resamples", message)])
    name = trained.run.task.name
    if options.max_written and name not in _WITH_REFERENCES:
        message = f"is for {' and '.join(_WITH_REFERENCES)}; this run's task.name is {name!r}"
        raise ConfigError([Problem("--generate", message)])


def _sample(rows: Rows, most: int, seed: int) -> Rows:
    """Returns a seeded sample of rows, in order."""
    if len(rows) <= most:
        return rows if most else []
    chosen = stream(seed, "written").choice(len(rows), most, replace=False)
    return [rows[number] for number in sorted(chosen)]


def _advancing(on_progress: OnProgress, total: int) -> Advance:
    """Returns a callback that accumulates progress."""
    done = 0

    def advance(more: int) -> None:
        nonlocal done
        done += more
        on_progress(done, total)

    return advance


def _statistics(
    trained: Trained, examples: Sequence[Example], adapter: AdapterState, advance: Advance
) -> Statistics:
    """Returns the task's statistics for each example."""
    parts = []
    for start in range(0, len(examples), _PIECE_EXAMPLES):
        piece = examples[start : start + _PIECE_EXAMPLES]
        parts.append(statistics(trained.model, trained.task, piece, adapter))
        advance(len(piece))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _text_statistics(
    trained: Trained, rows: Rows, adapter: AdapterState, advance: Advance
) -> Statistics:
    """Returns the scores of the generated text for each row."""
    trained.model.adapter.write(adapter)
    most, run = default_max_tokens(trained), trained.run
    prompts = Prompts.of(run.task, run.data)
    said = [prompts.said(row, run.data.label_column) for row in rows]
    if run.task.prompt is None:
        column = run.data.text_column
        pairs = zip(rows, said, strict=True)  # for a conversation, use the turns before the answer
        rows = [row if is_value(row[column]) else {column: list(one.turns)} for row, one in pairs]
    written = write_greedily(trained, prompts_of(trained, rows, most), most, advance)
    return text_statistics(written, [each.answer for each in said])
