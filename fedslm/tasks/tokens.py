"""Computations on token logits that several tasks share; rows are always independent.

``labels`` are token ids of shape (rows, length), :data:`IGNORED` where no token is to be predicted.
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
    """Pairs each position's logits in a causal model with the token that should follow it."""
    return logits[:, :-1], labels[:, 1:]


def losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns each position's cross-entropy in float32, shape (rows, length), zero where ignored."""
    import torch.nn.functional as F

    transposed = logits.float().transpose(1, 2)
    return F.cross_entropy(transposed, labels, reduction="none", ignore_index=IGNORED)


def own_mean(values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns each row's mean over its own positions, shape (rows,), so rows stay independent."""
    return values.sum(dim=1) / (labels != IGNORED).sum(dim=1).clamp(min=1)


def hits(logits: torch.Tensor, labels: torch.Tensor, among: int = 1) -> torch.Tensor:
    """True where the label is among the ``among`` most likely, bool of shape (rows, length)."""
    best = logits.topk(min(among, logits.shape[-1]), dim=-1).indices
    return (best == labels.unsqueeze(-1)).any(dim=-1)


def statistics(logits: torch.Tensor, labels: torch.Tensor) -> Tensors:
    """Returns predicted tokens, hits in the top one and top three, and losses of each row."""
    return {
        "tokens": (labels != IGNORED).sum(dim=1),
        "top1": hits(logits, labels).sum(dim=1),
        "top3": hits(logits, labels, 3).sum(dim=1),
        "loss": losses(logits, labels).sum(dim=1),
    }


def metrics(sums: Sums) -> dict[str, float]:
    """Returns loss per token (nats), perplexity, and the shares of tokens in the top one and three."""
    tokens = max(float(sums["tokens"]), 1.0)
    loss = float(sums["loss"]) / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, _LONGEST_EXPONENT)),
        "next_token_accuracy": float(sums["top1"]) / tokens,
        "next_token_top3": float(sums["top3"]) / tokens,
    }
