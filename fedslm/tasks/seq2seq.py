"""Sequence to sequence: generates a text from a text, such as a summary from a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedslm.data.values import text_in
from fedslm.tasks import tokens
from fedslm.tasks.base import (
    Example,
    Prepared,
    Row,
    Sums,
    Tensors,
    made_up_tokens,
    pad,
    pad_inputs,
    tokenise,
)
from fedslm.tasks.prompts import Prompts

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Seq2Seq:
    """An encoder–decoder model; ``targets`` of an example are the tokens to generate.

    The decoder starts with the padding token, as in T5; loading refuses any other base.

    Attributes:
        prompts: Builds the encoder's text from a row.
        target_column: Column with the text to generate.
    """

    prompts: Prompts
    target_column: str

    labels = ()
    rows_per_example = 1
    uses_base = False
    headline = "loss"

    def prepare(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> Prepared:
        """Tokenises sources and targets; skips a record in which one is missing."""
        special = tokenizer.num_special_tokens_to_add()
        sources = tokenise([self.prompts.text(row) for row in rows], tokenizer, self.prompts.max_length)
        texts = [text_in(row[self.target_column]) for row in rows]
        targets = self.prompts.completions(texts, tokenizer)
        most = self.prompts.max_target_length or self.prompts.max_length
        return Prepared.of(
            (
                number,
                Example(source.input_ids, targets=target[:most]),
                source.cut or len(target) > most,
            )
            for number, (source, target) in enumerate(zip(sources, targets, strict=True))
            if len(source.input_ids) > special and texts[number].strip()
        )

    def made_up(self, length: int = 5) -> Example:
        """Returns an example with as many source tokens as target tokens."""
        return Example(made_up_tokens(length), targets=made_up_tokens(length))

    def collate(self, examples: Sequence[Example], pad_token_id: int) -> Tensors:
        """Pads; ``labels`` are the targets, ``decoder_input_ids`` the targets shifted by one step."""
        labels = pad([each.targets for each in examples], tokens.IGNORED)
        begun = pad([(pad_token_id, *each.targets[:-1]) for each in examples], pad_token_id)
        inputs = pad_inputs([example.input_ids for example in examples], pad_token_id)
        return {**inputs, "decoder_input_ids": begun, "labels": labels}

    def per_example_loss(self, logits: torch.Tensor, batch: Tensors) -> torch.Tensor:
        """Returns the mean loss over each target's own tokens."""
        return tokens.own_mean(tokens.losses(logits, batch["labels"]), batch["labels"])

    def per_example_score(self, logits: torch.Tensor, batch: Tensors) -> torch.Tensor:
        """Returns the share of each target's tokens that are predicted correctly."""
        return tokens.own_mean(tokens.hits(logits, batch["labels"]), batch["labels"])

    def statistics(self, logits: torch.Tensor, batch: Tensors) -> Tensors:
        """Returns counts of target tokens, and of those predicted correctly."""
        return tokens.statistics(logits, batch["labels"])

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Returns token metrics over targets; ``fedslm evaluate`` generates texts and adds ROUGE."""
        return tokens.metrics(sums)
