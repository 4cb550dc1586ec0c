"""Computations on token logits that several tasks share; rows are always independent.

``logits`` have shape (rows, length, classes). ``labels`` have shape (rows, length): what the logits of
the same position should predict, :data:`IGNORED` where they need not predict anything.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fedslm.tasks.base import Sums, Tensors

if TYPE_CHECKING:
    import torch

IGNORED = -100
_LONGEST_EXPONENT = 50.0


def following(values: torch.Tensor, last: int = IGNORED) -> torch.Tensor:
    """Gives each position of a causal model the value of the token that should follow it.

    The labels move, not the logits: a slice of the logits would have to be copied to become flat.

    Args:
        values: One value for each token, shape (rows, length).
        last: What the last position gets, which no token follows.
    """
    import torch.nn.functional as F

    return F.pad(values[:, 1:], (0, 1), value=last)


def at_labels(batch: Tensors) -> Tensors:
    """Limits a language model's batch to the positions at which some row has a label.

    Returns:
        The batch with ``logits_to_keep``, those positions in ascending order, at least one; ``labels``
        and ``words`` are the ones at them.
    """
    labelled = (batch["labels"] != IGNORED).any(dim=0)
    labelled[0] |= ~labelled.any()  # a batch without labels has a loss too: zero
    kept = labelled.nonzero().squeeze(1)
    aligned: Tensors = {key: batch[key][:, kept] for key in ("labels", "words") if key in batch}
    return {**batch, **aligned, "logits_to_keep": kept}


def losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns each position's cross-entropy in float32, shape (rows, length), zero where ignored."""
    import torch.nn.functional as F

    # Flat, so that each softmax reads adjacent numbers: with the classes in the middle it takes 3 times
    # as long. float() copies nothing that is float32 already.
    flat = logits.float().flatten(0, 1)
    found = F.cross_entropy(flat, labels.flatten(), reduction="none", ignore_index=IGNORED)
    return found.view(labels.shape)


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
