"""Tests of multi-label classification."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from support.kinds import KINDS, PAD, metrics_of

from fedslm.models.base import DEMO_DIRECTORY, load_tokenizer
from fedslm.tasks.base import Example

TASK = KINDS["multi-label"]


@pytest.mark.parametrize(
    ("value", "targets"),
    [
        (["flu"], (0, 1, 0)),
        (["other", "cold"], (1, 0, 1)),
        ("cold, flu", (1, 1, 0)),
        ("cold;other", (1, 0, 1)),
        ([], (0, 0, 0)),
        ("", (0, 0, 0)),
        (None, (0, 0, 0)),
    ],
)
def test_names_become_zeros_and_ones(value: Any, targets: tuple[int, ...]) -> None:
    """A list or a text of names says which classes there are; none is fine."""
    tokenizer = load_tokenizer(DEMO_DIRECTORY)
    (example,) = TASK.prepare([{"text": "chest pain", "labels": value}], tokenizer).examples
    assert example.targets == targets


def test_an_unknown_name_leaves_its_record_out() -> None:
    """A record with a name that is no class is left out alone."""
    tokenizer = load_tokenizer(DEMO_DIRECTORY)
    rows = [{"text": "chest pain", "labels": names} for names in (["pox"], ["flu"], ["flu", "pox"])]
    assert TASK.prepare(rows, tokenizer).kept == (1,)


def test_loss_and_metrics_by_hand() -> None:
    """The loss is the mean binary cross-entropy; F1 is twice the hits over guesses and truths."""
    generator = np.random.default_rng(3)
    truth, logits = generator.integers(0, 2, (40, 3)), generator.standard_normal((40, 3))
    truth[:, 2] = 0  # a class that does not occur
    examples = [Example((1, 2), targets=tuple(int(x) for x in row)) for row in truth]
    batch = TASK.collate(examples, PAD)
    tensor = torch.tensor(logits)
    losses = TASK.per_example_loss(tensor, batch).tolist()
    for loss, row, actual in zip(losses, logits, truth, strict=True):
        terms = [
            math.log1p(math.exp(-value if there else value))
            for value, there in zip(row, actual, strict=True)
        ]
        assert loss == pytest.approx(sum(terms) / 3, rel=1e-5)
    metrics = metrics_of(TASK, tensor, batch)
    guesses = (logits > 0).astype(int)
    hits, both = (truth * guesses).sum(axis=0), (truth + guesses).sum(axis=0)
    assert metrics["f1_micro"] == pytest.approx(2 * hits.sum() / both.sum())
    assert metrics["f1_micro"] == pytest.approx(0.40384615384615385)  # recorded: scikit-learn 1.9.1
    assert metrics["f1_macro"] == pytest.approx((2 * hits / both)[:2].mean())
    assert metrics["exact_match"] == pytest.approx((truth == guesses).all(axis=1).mean())
    scores = TASK.per_example_score(tensor, batch).tolist()
    assert scores == pytest.approx((truth == guesses).mean(axis=1).tolist())
