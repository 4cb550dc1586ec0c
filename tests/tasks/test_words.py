"""Tests of next-word prediction: a word is right if each of its tokens is."""

from __future__ import annotations

import pytest
import torch
from support.kinds import LANGUAGE, PAD, metrics_of

from fedslm.models.base import DEMO_DIRECTORY, load_tokenizer
from fedslm.tasks.base import Example
from fedslm.tasks.causal_lm import CausalLM


@pytest.mark.parametrize("text", ["chest pain", "  xylophonically\n pain, fever  zzqzzq"])
def test_tokens_know_their_word(text: str) -> None:
    """Words are what white space separates; special tokens belong to none."""
    tokenizer = load_tokenizer(DEMO_DIRECTORY)
    (example,) = CausalLM("text", 64).prepare([{"text": text}], tokenizer).examples
    assert example.targets[0] == example.targets[-1] == 0
    expected = []
    for number, word in enumerate(text.split(), start=1):
        expected += [number] * len(tokenizer(word, add_special_tokens=False)["input_ids"])
    assert list(example.targets[1:-1]) == expected


def test_word_hits_by_hand() -> None:
    """One wrong token spoils its word alone; the row's first word is not predicted."""
    ids = (5, 6, 7, 8, 9, 10)
    example = Example(ids, targets=(1, 2, 2, 3, 4, 4))  # 1 begins the row: nothing comes before it
    batch = LANGUAGE.collate([example, Example((1, 2), targets=(0, 1))], PAD)
    logits = torch.zeros(2, 6, 17)
    for at, token in enumerate(ids[1:]):
        logits[0, at, token] = 10.0
    logits[0, 4, 3] = 20.0  # token 10, of word 4, is the second guess
    logits[1, 0, 9] = 5.0  # token 2 of the second row is none of the first three
    logits[1, 0, 10:12] = 4.0
    metrics = metrics_of(LANGUAGE, logits, batch)
    assert metrics["next_word_top1"] == pytest.approx(2 / 4)
    assert metrics["next_word_top3"] == pytest.approx(3 / 4)


def test_a_tokenizer_without_offsets_has_no_word_metrics() -> None:
    """Where words are not known nothing is said about them."""
    batch = LANGUAGE.collate([Example((1, 2, 3))], PAD)
    metrics = metrics_of(LANGUAGE, torch.zeros(1, 3, 17), batch)
    assert "next_word_top1" not in metrics
    assert "next_token_top3" in metrics
