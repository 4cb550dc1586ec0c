"""Instruction tuning: a completion for each prompt; the loss covers only the completion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedslm.tasks import tokens
from fedslm.tasks.base import Example, Prepared, Row, Sums, Tensors, made_up_tokens, pad, pad_inputs
from fedslm.tasks.prompts import Prompts

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Instruction:
    """Instruction tuning of a causal model; ``targets`` of an example are the completion's tokens.

    A conversation is one example: all its answers are learned; its loss is the mean over their tokens.

    Attributes:
        prompts: Builds a prompt from a row.
        completion_column: Column with the completion; None if the conversation ends with it.
    """

    prompts: Prompts
    completion_column: str | None

    labels = ()
    rows_per_example = 1
    uses_base = False
    headline = "loss"

    def prepare(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> Prepared:
        """Tokenises prompts and completions; a record without a completion is skipped."""
        said = [self.prompts.said(row, self.completion_column) for row in rows]
        asked = self.prompts.asked(said, tokenizer)
        answers = self.prompts.completions([each.answer for each in said], tokenizer)
        made = []
        for number, (prompt, answer) in enumerate(zip(asked, answers, strict=True)):
            if prompt.ids and said[number].answer.strip():
                made.append((number, *self.prompts.join(prompt, answer)))
        return Prepared.of(made)

    def made_up(self, length: int = 5) -> Example:
        """Returns an example with three prompt tokens; the others are the completion."""
        made = made_up_tokens(length)
        return Example(made, targets=(*(tokens.IGNORED,) * 3, *made[3:]))

    def collate(self, examples: Sequence[Example], pad_token_id: int) -> Tensors:
        """Pads; ``labels`` are the completion's tokens that follow, shape (batch, longest)."""
        inputs = pad_inputs([example.input_ids for example in examples], pad_token_id)
        targets = pad([each.targets for each in examples], tokens.IGNORED)
        return {**inputs, "labels": tokens.following(targets)}

    def per_example_loss(self, logits: torch.Tensor, batch: Tensors) -> torch.Tensor:
        """Returns the mean loss over each completion's own tokens."""
        return tokens.own_mean(tokens.losses(logits, batch["labels"]), batch["labels"])

    def per_example_score(self, logits: torch.Tensor, batch: Tensors) -> torch.Tensor:
        """Returns the share of each completion's tokens that are predicted correctly."""
        return tokens.own_mean(tokens.hits(logits, batch["labels"]), batch["labels"])

    def statistics(self, logits: torch.Tensor, batch: Tensors) -> Tensors:
        """Returns counts of completion tokens, and of those predicted correctly."""
        return tokens.statistics(logits, batch["labels"])

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Returns token metrics over completions."""
        return tokens.metrics(sums)
