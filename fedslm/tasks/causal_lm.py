"""Causal language modelling: predict the next token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedslm.tasks.base import Example, Prepared, Tensors, pad

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

_IGNORED = -100
_LONGEST_EXPONENT = 50.0


@dataclass(frozen=True)
class CausalLM:
    """Causal language modelling.

    Attributes:
        text_column: Column with the text.
        max_length: Longest sequence in tokens; the rest of a longer text is cut off.
    """

    text_column: str
    max_length: int

    @property
    def labels(self) -> tuple[str, ...]:
        """No classes."""
        return ()

    @property
    def headline(self) -> str:
        """Loss per token in nats."""
        return "loss"

    def prepare(
        self, rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase
    ) -> Prepared:
        """Tokenises texts; one with fewer than two tokens has nothing to predict."""
        if not rows:
            return Prepared((), ())
        shortest = max(2, tokenizer.num_special_tokens_to_add() + 1)
        encoded = tokenizer(
            [str(row[self.text_column]) for row in rows],
            truncation=True,
            max_length=self.max_length,
        )["input_ids"]
        kept = [number for number, tokens in enumerate(encoded) if len(tokens) >= shortest]
        return Prepared(tuple(Example(tuple(encoded[number])) for number in kept), tuple(kept))

    def collate(self, examples: Sequence[Example], pad_token_id: int) -> Tensors:
        """Pads texts; ``labels`` are the token ids, -100 on padding, shape (batch, longest)."""
        batch = pad(examples, pad_token_id)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, _IGNORED)
        return {**batch, "labels": labels}

    def per_example_loss(self, logits: torch.Tensor, batch: Tensors) -> torch.Tensor:
        """Mean over an example's own tokens, so that no example's length touches another's loss."""
        losses, counts = _token_losses(logits, batch)
        return losses.sum(dim=1) / counts.clamp(min=1)

    def per_example_score(self, logits: torch.Tensor, batch: Tensors) -> torch.Tensor:
        """Share of an example's own next tokens that are predicted."""
        counts = (batch["labels"][:, 1:] != _IGNORED).sum(dim=1)
        return _hits(logits, batch).sum(dim=1) / counts.clamp(min=1)

    def sums(self, logits: torch.Tensor, batch: Tensors) -> dict[str, float]:
        """Counts predicted tokens and hits, and adds token losses."""
        losses, counts = _token_losses(logits, batch)
        return {
            "tokens": float(counts.sum()),
            "correct": float(_hits(logits, batch).sum()),
            "loss": float(losses.double().sum()),
        }

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Loss per token (nats), perplexity and next-token accuracy."""
        loss = sums["loss"] / sums["tokens"]
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, _LONGEST_EXPONENT)),
            "next_token_accuracy": sums["correct"] / sums["tokens"],
        }


def _hits(logits: torch.Tensor, batch: Tensors) -> torch.Tensor:
    """Where the next token is predicted; padding never is. Shape (batch, longest - 1)."""
    return logits[:, :-1].argmax(dim=-1) == batch["labels"][:, 1:]


def _token_losses(logits: torch.Tensor, batch: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses (batch, longest - 1), zero on padding, and predicted tokens per example (batch,)."""
    import torch.nn.functional as F

    targets = batch["labels"][:, 1:]
    losses = F.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), targets, reduction="none", ignore_index=_IGNORED
    )
    return losses, (targets != _IGNORED).sum(dim=1)
