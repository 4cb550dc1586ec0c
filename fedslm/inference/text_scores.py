"""How close a written text is to a reference: ROUGE and exact match, for each example."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedslm.tasks.base import Sums

ROUGE = ("rouge1", "rouge2", "rougeL")


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
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    scores = [scorer.score(right, text) for text, right in zip(written, references, strict=True)]
    exact = [text.strip() == right.strip() for text, right in zip(written, references, strict=True)]
    found = {name: np.array([score[name].fmeasure for score in scores], float) for name in ROUGE}
    return {"texts": np.ones(len(exact)), "exact_match": np.array(exact, float), **found}


def text_metrics(sums: Sums) -> dict[str, float]:
    """Means over texts."""
    texts = float(sums["texts"])
    return {name: float(sums[name]) / texts for name in (*ROUGE, "exact_match")}
