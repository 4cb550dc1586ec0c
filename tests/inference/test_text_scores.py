"""Tests of ROUGE and exact match, by hand and against recorded scores of rouge_score."""

from __future__ import annotations

import numpy as np
import pytest

from fedslm.inference.text_scores import ROUGE, text_metrics, text_statistics

# written, reference, and the F-measures of rouge_score 0.1.2 with its stemmer (ROUGE-1, -2, -L)
RECORDED = [
    (
        "the patient has a fracture",
        "patient has a wrist fracture",
        (0.8000000000000002, 0.5, 0.8000000000000002),
    ),
    ("no fever", "no fever", (1.0, 1.0, 1.0)),
    ("", "stable", (0.0, 0.0, 0.0)),
    (
        "chest pains radiating",
        "chest pain radiates left",
        (0.8571428571428571, 0.8, 0.8571428571428571),
    ),
    (
        "Give 2.5 mg/d of B-12; recheck in two weeks.",
        "B12 2.5mg daily, re-check after 2 weeks",
        (0.1904761904761905, 0.0, 0.1904761904761905),
    ),
    ("fever fever fever and coughing", "coughs and fever", (0.7499999999999999, 0.0, 0.25)),
    ("naïve Ärzte", "naive arzte", (0.0, 0.0, 0.0)),
    ("the cat the cat the dog", "the dog the cat", (0.8, 0.5, 0.6)),
    (
        "What is asthma? Asthma is a chronic disease of the airways.",
        "Asthma is a disease that affects your lungs; airways become inflamed.",
        (0.45454545454545453, 0.20000000000000004, 0.45454545454545453),
    ),
]
WRITTEN, RIGHT = ([case[at] for case in RECORDED[:4]] for at in (0, 1))


def test_scores_are_those_of_the_package_that_papers_use() -> None:
    """Each example has the F-measure that rouge_score 0.1.2 gave for it."""
    found = text_statistics([case[0] for case in RECORDED], [case[1] for case in RECORDED])
    for at, name in enumerate(ROUGE):
        assert found[name].tolist() == pytest.approx([case[2][at] for case in RECORDED], abs=1e-12)


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
