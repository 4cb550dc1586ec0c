"""Predict from texts: classes, entities, next words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedslm.config.tasks import TASKS
from fedslm.errors import ConfigError, Problem
from fedslm.inference.inputs import Rows, text_of
from fedslm.inference.next_words import continued
from fedslm.inference.outputs import logits_of, softmax
from fedslm.inference.tagging import tagged
from fedslm.inference.trained import Trained, TunedModel
from fedslm.tasks.base import Example, tokenise

Answer = dict[str, Any]
_PIECE_ROWS = 512
_TOP = 3


def check_task(run: TunedModel) -> None:
    """Refuses a run whose task generates text.

    Raises:
        ConfigError: The task generates text; the message names ``generate`` instead.
    """
    if not TASKS[run.task.name].predicts:
        remedy = f"fedslm generate {run.directory} --prompt …"
        message = f"value {run.task.name!r} writes texts; use: {remedy}"
        raise ConfigError([Problem("task.name", message)])


def predict(trained: Trained, rows: Rows) -> Iterator[Answer]:
    """Predicts for each row, in order; the prediction for a row depends only on that row.

    Args:
        trained: Model of a run.
        rows: Rows with the run's text column: a text, or a list of words for tagging.

    Yields:
        A JSON-compatible dictionary: the text (or words), the prediction, "truncated" if the end was
        not read, and "note" if there is nothing to read.

    Raises:
        ConfigError: The run's task generates text; use ``generate``.
        DataError: A row's column contains something else.
    """
    check_task(trained.run)
    answer = _ANSWERS[TASKS[trained.run.task.name].network]
    for first in range(0, len(rows), _PIECE_ROWS):
        yield from answer(trained, rows[first : first + _PIECE_ROWS], first)


def _classified(trained: Trained, rows: Rows, first: int) -> list[Answer]:
    """Returns the label (or labels) and the largest probabilities."""
    column, tokenizer = trained.run.data.text_column, trained.model.tokenizer
    texts = [text_of(row, column, first + at) for at, row in enumerate(rows, 1)]
    encoded = tokenise(texts, tokenizer, trained.run.task.max_length)
    special, labels = tokenizer.num_special_tokens_to_add(), trained.run.labels
    absent = (0,) * len(labels)
    there = [at for at, each in enumerate(encoded) if len(each.input_ids) > special]
    examples = [Example(encoded[at].input_ids, 0, targets=absent) for at in there]
    logits = dict(zip(there, logits_of(trained, examples), strict=True))
    several = TASKS[trained.run.task.name].classes == "several"
    said = _labels_of if several else _label_of
    nothing: Answer = {"labels": []} if several else {"label": None}
    return [
        {
            "text": text,
            **(said(logits[at], labels) if at in logits else {**nothing, "note": "no text"}),
            **({"truncated": True} if encoded[at].cut else {}),
        }
        for at, text in enumerate(texts)
    ]


def _label_of(logits: NDArray[np.float32], labels: Sequence[str]) -> Answer:
    """Returns the most likely class."""
    shares = softmax(logits)
    likeliest = _largest(shares, labels)
    return {"label": next(iter(likeliest)), "probabilities": likeliest}


def _labels_of(logits: NDArray[np.float32], labels: Sequence[str]) -> Answer:
    """Returns every class with a probability above one half."""
    chances = 1 / (1 + np.exp(-logits.astype(np.float64)))
    named = [label for label, chance in zip(labels, chances, strict=True) if chance > 0.5]
    return {"labels": named, "probabilities": _largest(chances, labels)}


def _largest(values: NDArray[np.float64], labels: Sequence[str]) -> dict[str, float]:
    """Returns the names with the largest values."""
    order = np.argsort(-values, kind="stable")[:_TOP]
    return {labels[at]: float(values[at]) for at in order}


_ANSWERS: dict[str, Callable[[Trained, Rows, int], list[Answer]]] = {
    "classifier": _classified,
    "tagger": tagged,
    "decoder": continued,
}
