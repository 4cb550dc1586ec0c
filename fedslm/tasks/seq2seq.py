"""Sequence to sequence: a text from a text, such as a summary from a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedslm.data.values import text_in
from fedslm.tasks import tokens
from fedslm.tasks.base import Example, Prepared, Row, Sums, Tensors, pad, pad_inputs, tokenise
from fedslm.tasks.prompts import Prompts

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Seq2Seq:
    """An encoder–decoder model; ``targets`` of an example are the tokens to be written.

    The decoder starts with the padding token, as T5's does; loading refuses a base where it does not.

    Attributes:
        prompts: How a row becomes the encoder's text.
        target_column: Column with the text to be written.
    """

    prompts: Prompts
    target_column: str

    labels = ()
    rows_per_example = 1
    uses_base = False
    headline = "loss"

    def prepare(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> Prepared:
        """Tokenises sources and targets; a record without either is skipped."""
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

    def made_up(self) -> Example:
        """Two tokens from five."""
        return Example((1, 2, 3, 2, 1), targets=(2, 1))

    def collate(self, examples: Sequence[Example], pad_token_id: int) -> Tensors:
        """Pads; ``labels`` are the targets, ``decoder_input_ids`` the same one step later."""
        labels = pad([each.targets for each in examples], tokens.IGNORED)
        begun = pad([(pad_token_id, *each.targets[:-1]) for each in examples], pad_token_id)
        inputs = pad_inputs([example.input_ids for example in examples], pad_token_id)
        return {**inputs, "decoder_input_ids": begun, "labels": labels}

    def per_example_loss(self, logits: torch.Tensor, batch: Tensors) -> torch.Tensor:
        """Mean over a target's own tokens."""
        return tokens.own_mean(tokens.losses(logits, batch["labels"]), batch["labels"])

    def per_example_score(self, logits: torch.Tensor, batch: Tensors) -> torch.Tensor:
        """Share of a target's own tokens that are predicted."""
        return tokens.own_mean(tokens.hits(logits, batch["labels"]), batch["labels"])

    def statistics(self, logits: torch.Tensor, batch: Tensors) -> Tensors:
        """Target tokens, and how many of them are right."""
        return tokens.statistics(logits, batch["labels"])

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Token metrics over targets; ROUGE needs writing, which ``fedslm evaluate`` does."""
        return tokens.metrics(sums)
