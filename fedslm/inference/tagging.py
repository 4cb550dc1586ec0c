"""Entities in texts: predicts a tag for each word, from the word's first token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedslm.errors import ModelError
from fedslm.inference.inputs import Rows, text_of, words_in
from fedslm.inference.outputs import logits_of, softmax
from fedslm.inference.trained import Trained
from fedslm.tasks.base import Example
from fedslm.tasks.token_classification import entities

Answer = dict[str, Any]


@dataclass(frozen=True)
class _Words:
    """Words and their positions in a text; for a row with a list of words there is no text."""

    words: list[str]
    text: str | None = None
    spans: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, row: dict[str, Any], column: str, number: int) -> _Words:
        """Returns the words of a row."""
        value = row[column]
        if isinstance(value, list | tuple):
            return cls([str(word) for word in value])
        text = text_of(row, column, number)
        spans = tuple(words_in(text))
        return cls([text[begin:end] for begin, end in spans], text, spans)


def tagged(trained: Trained, rows: Rows, first: int) -> list[Answer]:
    """Returns entities with their text, and a tag for each word; words after truncation get none.

    Args:
        trained: Model of a run.
        rows: Rows with texts, or with lists of words.
        first: Number of rows before these, for errors.

    Raises:
        ModelError: The tokenizer does not report which word a token belongs to.
        DataError: A row's column contains something else.
    """
    column, tokenizer = trained.run.data.text_column, trained.model.tokenizer
    if not tokenizer.is_fast:
        raise ModelError("token-classification needs a fast tokenizer (tokenizer.json)")
    read = [_Words.of(row, column, first + at) for at, row in enumerate(rows, 1)]
    answers: list[Answer] = [{"words": [], "tags": [], "entities": [], "note": "no text"} for _ in rows]
    there = [at for at, each in enumerate(read) if each.words]
    if not there:
        return answers
    encoded = tokenizer(
        [read[at].words for at in there],
        is_split_into_words=True,
        truncation=True,
        max_length=trained.run.task.max_length,
    ).encodings
    examples = [Example(tuple(each.ids), targets=(0,) * len(each.ids)) for each in encoded]
    found = logits_of(trained, examples)
    for at, each, logits in zip(there, encoded, found, strict=True):
        tags, shares = _tags(logits, each.word_ids, trained.run.labels, len(read[at].words))
        answers[at] = {
            **({} if read[at].text is None else {"text": read[at].text}),
            "words": read[at].words,
            "tags": tags,
            "entities": _entities(read[at], tags, shares),
            **({"truncated": True} if each.overflowing else {}),
        }
    return answers


def _tags(
    logits: NDArray[np.float32], owners: Sequence[int | None], labels: Sequence[str], count: int
) -> tuple[list[str | None], list[float]]:
    """Tag and probability of each word, from its first token; none for a word without tokens."""
    tags: list[str | None] = [None] * count
    shares = [0.0] * count
    for piece, word in enumerate(owners):
        if word is not None and tags[word] is None:
            values = softmax(logits[piece])
            tags[word], shares[word] = labels[int(values.argmax())], float(values.max())
    return tags, shares


def _entities(read: _Words, tags: list[str | None], shares: list[float]) -> list[Answer]:
    """Returns entities in order; "score" is the mean probability of the tags of their words."""
    found = []
    for kind, begin, end in sorted(entities([tag or "O" for tag in tags]), key=lambda each: each[1:]):
        inside = slice(begin, end + 1)
        answer: Answer = {"kind": kind, "text": " ".join(read.words[inside])}
        if read.text is not None:
            start, stop = read.spans[begin][0], read.spans[end][1]
            answer |= {"text": read.text[start:stop], "start": start, "end": stop}
        score = float(np.mean(shares[inside]))
        found.append({**answer, "first_word": begin, "last_word": end, "score": score})
    return found
