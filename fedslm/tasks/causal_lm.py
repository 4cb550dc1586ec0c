"""Causal language modelling: predict the next token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedslm.data.values import text_in
from fedslm.tasks import tokens
from fedslm.tasks.base import (
    Encoded,
    Example,
    Prepared,
    Row,
    Sums,
    Tensors,
    Tokens,
    made_up_tokens,
    pad,
    pad_inputs,
    tokenise,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class CausalLM:
    """Causal language modelling; ``targets`` of an example are the word numbers of its tokens.

    Attributes:
        text_column: Column with the text.
        max_length: Maximum sequence length in tokens; longer texts are truncated.
    """

    text_column: str
    max_length: int

    labels = ()
    rows_per_example = 1
    uses_base = False
    headline = "loss"

    def prepare(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> Prepared:
        """Tokenises texts; skips a text with fewer than two tokens, since it has nothing to predict."""
        shortest = max(2, tokenizer.num_special_tokens_to_add() + 1)
        texts = [text_in(row[self.text_column]) for row in rows]
        encoded = tokenise(texts, tokenizer, self.max_length)
        return Prepared.of(
            (number, Example(each.input_ids, targets=_words(text, each)), each.cut)
            for number, (text, each) in enumerate(zip(texts, encoded, strict=True))
            if len(each.input_ids) >= shortest
        )

    def made_up(self, length: int = 5) -> Example:
        """Returns an example of ``length`` tokens."""
        return Example(made_up_tokens(length))

    def collate(self, examples: Sequence[Example], pad_token_id: int) -> Tensors:
        """Pads texts; ``labels`` are the tokens that follow, ``words`` their word numbers.

        A token of no word has the number 0, as has one of the word that the text begins with, which is
        not predicted as a whole.
        """
        batch = pad_inputs([example.input_ids for example in examples], pad_token_id)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, tokens.IGNORED)
        words = pad([each.targets or (0,) * len(each.input_ids) for each in examples], 0)
        words = words.masked_fill(words == words[:, :1], 0)
        return {**batch, "labels": tokens.following(labels), "words": tokens.following(words, 0)}

    def per_example_loss(self, logits: torch.Tensor, batch: Tensors) -> torch.Tensor:
        """Returns the mean loss over each example's own tokens."""
        return tokens.own_mean(tokens.losses(logits, batch["labels"]), batch["labels"])

    def per_example_score(self, logits: torch.Tensor, batch: Tensors) -> torch.Tensor:
        """Returns the share of each example's next tokens that are predicted correctly."""
        return tokens.own_mean(tokens.hits(logits, batch["labels"]), batch["labels"])

    def statistics(self, logits: torch.Tensor, batch: Tensors) -> Tensors:
        """Returns counts of tokens and words, and of those predicted correctly."""
        labels = batch["labels"]
        found = tokens.statistics(logits, labels)
        for among in (1, 3):
            misses = ~tokens.hits(logits, labels, among)
            found[f"words_top{among}"], found["words"] = _right_words(misses, batch["words"])
        return found

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Returns token metrics; a word is correct if all its tokens are (among the top three)."""
        found = tokens.metrics(sums)
        if words := float(sums["words"]):
            found["next_word_top1"] = float(sums["words_top1"]) / words
            found["next_word_top3"] = float(sums["words_top3"]) / words
        return found


def _words(text: str, encoded: Encoded) -> Tokens:
    """Returns the number of the word that each token belongs to, from 1; 0 for special tokens."""
    numbers, word = [], 0
    for first, last in encoded.offsets:
        if last > first:
            begins = word == 0 or text[first].isspace() or text[first - 1].isspace()
            word += begins
        numbers.append(word if last > first else 0)
    return tuple(numbers)


def _right_words(misses: torch.Tensor, words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts correct words and all words of each row; 0 is no word's number."""
    import torch

    most = int(words.max()) + 1
    shape = (len(words), most)
    wrong = torch.zeros(shape, device=words.device).scatter_add_(1, words, misses.float())
    there = torch.zeros(shape, device=words.device).scatter_(1, words, 1.0)
    there[:, 0] = 0.0
    return ((wrong == 0) & (there > 0)).sum(dim=1), there.sum(dim=1)
