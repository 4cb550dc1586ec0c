"""Tests of ROUGE and exact match, by hand and against the library."""

from __future__ import annotations

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from fedslm.inference.text_scores import ROUGE, text_metrics, text_statistics

WRITTEN = ["the patient has a fracture", "no fever", "", "chest pains radiating"]
RIGHT = ["patient has a wrist fracture", "no fever", "stable", "chest pain radiates left"]


def test_scores_are_the_library_s() -> None:
    """Each example has rouge_score's own F-measure."""
    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    found = text_statistics(WRITTEN, RIGHT)
    for name in ROUGE:
        expected = [scorer.score(b, a)[name].fmeasure for a, b in zip(WRITTEN, RIGHT, strict=True)]
        assert found[name].tolist() == expected
    assert len(set(found["rougeL"].tolist())) == 4


@pytest.mark.parametrize(
    ("written", "right", "expected"),
    [
        ("a b c", "a b c", (1.0, 1.0, 1.0, 1.0)),
        ("  a b c\n", "a b c", (1.0, 1.0, 1.0, 1.0)),  # space around is no difference
        ("a b c", "A b c", (1.0, 1.0, 1.0, 0.0)),  # ROUGE knows no capitals, exact match does
        ("a b c d", "a c", (2 / 3, 0.0, 2 / 3, 0.0)),  # P 1/2, R 1; no bigram; subsequence a c
        ("c b a", "a b c", (1.0, 0.0, 1 / 3, 0.0)),  # the longest common subsequence is one word
        ("a b", "c d", (0.0, 0.0, 0.0, 0.0)),
        ("", "a", (0.0, 0.0, 0.0, 0.0)),
    ],
)
def test_scores_by_hand(written: str, right: str, expected: tuple[float, float, float, float]) -> None:
    """ROUGE-1, ROUGE-2, ROUGE-L and exact match of small texts."""
    found = text_statistics([written], [right])
    assert [found[name][0] for name in (*ROUGE, "exact_match")] == pytest.approx(expected)


def test_metrics_are_means_over_texts() -> None:
    """Added-up scores become means."""
    found = text_statistics(WRITTEN, RIGHT)
    metrics = text_metrics({name: values.sum(axis=0) for name, values in found.items()})
    assert metrics["exact_match"] == 0.25
    assert metrics["rouge1"] == pytest.approx(float(np.mean(found["rouge1"])))


def test_as_many_references_as_texts() -> None:
    """A text without its reference is a mistake of the caller."""
    with pytest.raises(ValueError, match="shorter"):
        text_statistics(["a"], [])
