"""Tests of token classification: word pieces, tags, and entities as seqeval counts them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import KINDS, PAD, TAGS, metrics_of
from transformers import PreTrainedTokenizerBase

from fedslm.models.base import DEMO_DIRECTORY, load_tokenizer
from fedslm.tasks.base import Example
from fedslm.tasks.token_classification import TokenClassification, entities
from fedslm.tasks.tokens import IGNORED

TASK = KINDS["token-classification"]
LONG_WORDS = TokenClassification(TAGS, "words", "tags", 64)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """The embedded model's tokenizer."""
    return load_tokenizer(DEMO_DIRECTORY)


def test_a_tag_stands_on_the_first_piece_of_its_word(tokenizer: PreTrainedTokenizerBase) -> None:
    """Each word keeps one tag, however many pieces it is cut into; the other pieces have none."""
    words = ["chest", "xylophonically", "pain", "zzqzzq"]
    tags = ["B-Pain", "I-Pain", "O", "B-Drug"]
    (example,) = LONG_WORDS.prepare([{"words": words, "tags": tags}], tokenizer).examples
    pieces = [len(tokenizer(word, add_special_tokens=False)["input_ids"]) for word in words]
    assert max(pieces) > 1
    expected = [IGNORED]
    for tag, count in zip(tags, pieces, strict=True):
        expected += [TAGS.index(tag), *[IGNORED] * (count - 1)]
    assert list(example.targets) == [*expected, IGNORED]
    assert len(example.targets) == len(example.input_ids)


@pytest.mark.parametrize(
    ("words", "tags"),
    [
        (["chest", "pain"], ["O"]),
        (["chest"], ["B-Unheard"]),
        ([], []),
        ("chest pain", ["O", "O"]),
        (["chest", None], ["O", "O"]),
        (None, None),
        (["", "\u200b"], ["O", "O"]),
    ],
    ids=["lengths", "unknown", "empty", "text", "none", "missing", "no pieces"],
)
def test_a_record_that_does_not_fit_is_left_out_alone(
    words: Any, tags: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Whatever is wrong with one record, the others are as if it were not there."""
    good = {"words": ["chest", "pain"], "tags": ["O", "B-Pain"]}
    alone = TASK.prepare([good], tokenizer)
    prepared = TASK.prepare([{"words": words, "tags": tags}, good], tokenizer)
    assert prepared.kept == (1,)
    assert prepared.examples == alone.examples


def test_a_long_sentence_is_cut_and_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    """Words behind the longest length are left out, tags with them."""
    rows = [{"words": ["pain"] * count, "tags": ["O"] * count} for count in (3, 40)]
    prepared = TASK.prepare(rows, tokenizer)
    assert prepared.truncated == 1
    assert [len(example.targets) for example in prepared.examples] == [5, 16]


SENTENCES = st.lists(
    st.lists(st.tuples(st.sampled_from(TAGS), st.sampled_from(TAGS)), min_size=1, max_size=12),
    min_size=1,
    max_size=3,
)


@settings(max_examples=150, deadline=None)
@given(sentences=SENTENCES)
def test_metrics_are_those_of_seqeval(sentences: list[list[tuple[str, str]]]) -> None:
    """Precision, recall and F1 are seqeval's own, also for tags that follow no rule."""
    from seqeval.metrics import f1_score, precision_score, recall_score

    examples = [
        Example((1,) * len(pairs), targets=tuple(TAGS.index(tag) for tag, _ in pairs))
        for pairs in sentences
    ]
    batch = TASK.collate(examples, PAD)
    logits = torch.zeros(*batch["labels"].shape, len(TAGS))
    for row, pairs in enumerate(sentences):
        for at, (_, guess) in enumerate(pairs):
            logits[row, at, TAGS.index(guess)] = 1.0
    found = metrics_of(TASK, logits, batch)
    truth = [[tag for tag, _ in pairs] for pairs in sentences]
    guesses = [[guess for _, guess in pairs] for pairs in sentences]
    assert found["f1"] == pytest.approx(f1_score(truth, guesses, zero_division=0))
    assert found["precision"] == pytest.approx(precision_score(truth, guesses, zero_division=0))
    assert found["recall"] == pytest.approx(recall_score(truth, guesses, zero_division=0))


def test_entities_by_hand() -> None:
    """An entity is right if kind, first and last word are."""
    assert entities(["B-Drug", "I-Drug", "O", "I-Pain", "B-Pain"]) == {
        ("Drug", 0, 1),
        ("Pain", 3, 3),
        ("Pain", 4, 4),
    }
    assert entities(["O", "O"]) == set()
