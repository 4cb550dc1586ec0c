"""How close a written text is to a reference: ROUGE and exact match, for each example."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fedslm.inference.porter import stem
from fedslm.tasks.base import Sums

ROUGE = ("rouge1", "rouge2", "rougeL")
_WORD = re.compile(r"[a-z0-9]+")
_UNSTEMMED = 3  # letters of a word that is taken as it is


def text_statistics(
    written: Sequence[str], references: Sequence[str]
) -> dict[str, NDArray[np.float64]]:
    """Scores of each text, ready to be added up.

    ROUGE is the F-measure after Porter stemming, as summarisation papers report it; its tokenizer
    knows the letters a–z and digits alone. An exact match ignores space around the text.

    Args:
        written: What a model wrote.
        references: What it should have written; as many.

    Returns:
        "texts" (ones), "exact_match" and each of ``ROUGE``, all of shape (texts,), in [0, 1].

    References:
        Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries.

    >>> found = text_statistics(["the heart is fine"], ["The heart was fine"])
    >>> [round(float(found[name][0]), 2) for name in ("rouge1", "rouge2", "exact_match")]
    [0.75, 0.33, 0.0]
    """
    scores = [_rouge(text, right) for text, right in zip(written, references, strict=True)]
    exact = [text.strip() == right.strip() for text, right in zip(written, references, strict=True)]
    found = {name: np.array([score[at] for score in scores], float) for at, name in enumerate(ROUGE)}
    return {"texts": np.ones(len(exact)), "exact_match": np.array(exact, float), **found}


def text_metrics(sums: Sums) -> dict[str, float]:
    """Means over texts."""
    texts = float(sums["texts"])
    return {name: float(sums[name]) / texts for name in (*ROUGE, "exact_match")}


def _rouge(written: str, reference: str) -> tuple[float, float, float]:
    """F-measures by words, by pairs of words, and by the longest common subsequence."""
    own, right = _words(written), _words(reference)
    return (
        _shared(own, right),
        _shared(list(pairwise(own)), list(pairwise(right))),
        _f_measure(_longest_common(own, right), len(own), len(right)),
    )


def _words(text: str) -> list[str]:
    """Stemmed words in lower case."""
    found = _WORD.findall(text.lower())
    return [stem(word) if len(word) > _UNSTEMMED else word for word in found]


def _shared(own: Sequence[object], right: Sequence[object]) -> float:
    """F-measure of what two texts share, each as often as both have it."""
    return _f_measure((Counter(own) & Counter(right)).total(), len(own), len(right))


def _longest_common(own: Sequence[str], right: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    before = [0] * (len(own) + 1)
    for word in right:
        row = [0]
        for at, each in enumerate(own):
            row.append(before[at] + 1 if each == word else max(row[at], before[at + 1]))
        before = row
    return before[-1]


def _f_measure(shared: int, own: int, right: int) -> float:
    """Harmonic mean of precision and recall; 0 where nothing is shared."""
    if not shared:
        return 0.0
    precision, recall = shared / own, shared / right
    return 2 * precision * recall / (precision + recall)
