"""Tests of token classification: word pieces, tags, and entities as CoNLL counts them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.kinds import KINDS, PAD, TAGS, metrics_of
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


# tags and guesses of three sentences, and the scores that seqeval 1.2.2 gave for them
TRUTH = """
    I-Drug B-Drug B-Pain O O I-Pain O I-Drug I-Pain
    O I-Pain B-Drug O O B-Pain B-Pain
    O B-Drug O I-Pain B-Pain O I-Pain O B-Drug I-Pain
"""
GUESSES = """
    I-Pain B-Drug B-Pain O O I-Pain O I-Drug I-Pain
    O O B-Drug I-Drug O I-Pain B-Pain
    O B-Pain B-Pain I-Pain B-Pain O B-Drug O B-Drug I-Pain
"""
SCORES = {"f1": 0.6451612903225806, "precision": 0.6666666666666666, "recall": 0.625}


def test_metrics_are_those_of_conll() -> None:
    """Precision, recall and F1 are seqeval's recorded ones, for tags that follow no rule."""
    truth, guesses = ([line.split() for line in text.strip().splitlines()] for text in (TRUTH, GUESSES))
    targets = [tuple(map(TAGS.index, tags)) for tags in truth]
    batch = TASK.collate([Example((1,) * len(each), targets=each) for each in targets], PAD)
    logits = torch.zeros(*batch["labels"].shape, len(TAGS))
    for row, tags in enumerate(guesses):
        for at, guess in enumerate(tags):
            logits[row, at, TAGS.index(guess)] = 1.0
    found = metrics_of(TASK, logits, batch)
    assert {name: found[name] for name in SCORES} == pytest.approx(SCORES)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("I-A I-A B-A I-B O I-B", {("A", 0, 1), ("A", 2, 2), ("B", 3, 3), ("B", 5, 5)}),
        ("B-A B-A E-A S-A I-A", {("A", 0, 0), ("A", 1, 2), ("A", 3, 3), ("A", 4, 4)}),
        ("S-B E-B E-B I-B O E-A", {("B", 0, 0), ("B", 1, 1), ("B", 2, 2), ("B", 3, 3), ("A", 5, 5)}),
        ("B I O I", {("_", 0, 1), ("_", 3, 3)}),
        ("B-A-x I-A-x I-A", {("A-x", 0, 1), ("A", 2, 2)}),
        ("U-B B-A L-A L-A", {("B", 0, 0), ("A", 1, 3)}),
        ("O E-B B-B S-B", {("B", 1, 1), ("B", 2, 2), ("B", 3, 3)}),
        ("", set()),
    ],
)
def test_entities_are_read_as_conll_does(tags: str, expected: set[tuple[str, int, int]]) -> None:
    """Also where tags follow no rule; recorded from seqeval 1.2.2."""
    assert entities(tags.split()) == expected


def test_entities_by_hand() -> None:
    """An entity is right if kind, first and last word are."""
    assert entities(["B-Drug", "I-Drug", "O", "I-Pain", "B-Pain"]) == {
        ("Drug", 0, 1),
        ("Pain", 3, 3),
        ("Pain", 4, 4),
    }
    assert entities(["O", "O"]) == set()
