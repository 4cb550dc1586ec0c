"""Arithmetic on token logits that several tasks share; no row ever touches another.

``labels`` are token ids of shape (rows, length), :data:`IGNORED` where nothing is to be predicted.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fedslm.tasks.base import Sums, Tensors

if TYPE_CHECKING:
    import torch

IGNORED = -100
_LONGEST_EXPONENT = 50.0


def shifted(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs each token of a causal model with the one that it should be followed by."""
    return logits[:, :-1], labels[:, 1:]


def losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each position in float32, shape (rows, length), zero where ignored."""
    import torch.nn.functional as F

    transposed = logits.float().transpose(1, 2)
    return F.cross_entropy(transposed, labels, reduction="none", ignore_index=IGNORED)


def own_mean(values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean over a row's own positions, shape (rows,), so that no length touches another's loss."""
    return values.sum(dim=1) / (labels != IGNORED).sum(dim=1).clamp(min=1)


def hits(logits: torch.Tensor, labels: torch.Tensor, among: int = 1) -> torch.Tensor:
    """Where the label is among the ``among`` likeliest, bool of shape (rows, length)."""
    best = logits.topk(min(among, logits.shape[-1]), dim=-1).indices
    return (best == labels.unsqueeze(-1)).any(dim=-1)


def statistics(logits: torch.Tensor, labels: torch.Tensor) -> Tensors:
    """Predicted tokens, hits among the first and the first three, and losses of each row."""
    return {
        "tokens": (labels != IGNORED).sum(dim=1),
        "top1": hits(logits, labels).sum(dim=1),
        "top3": hits(logits, labels, 3).sum(dim=1),
        "loss": losses(logits, labels).sum(dim=1),
    }


def metrics(sums: Sums) -> dict[str, float]:
    """Loss per token (nats), perplexity, and how often a token is among the first guesses."""
    tokens = max(float(sums["tokens"]), 1.0)
    loss = float(sums["loss"]) / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, _LONGEST_EXPONENT)),
        "next_token_accuracy": float(sums["top1"]) / tokens,
        "next_token_top3": float(sums["top3"]) / tokens,
    }
