"""A classifier over the masked mean of the last hidden states."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn


class MeanPoolingClassifier(nn.Module):
    """Encoder, masked mean, one linear layer.

    The attribute names ``encoder`` and ``classifier`` are part of the adapter's format: its model card
    shows the same class in a few lines for people without fedslm.

    Args:
        encoder: A transformers model with ``last_hidden_state``.
        num_labels: Number of classes.
    """

    def __init__(self, encoder: nn.Module, num_labels: int) -> None:
        super().__init__()
        self.config = encoder.config
        self.encoder = encoder
        if getattr(encoder, "pooler", None) is not None:
            setattr(encoder, "pooler", None)  # noqa: B010  (a module is what mypy wants here)
        width: int = encoder.config.hidden_size  # type: ignore[union-attr, assignment]
        self.classifier = nn.Linear(width, num_labels)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        """Returns ``logits`` of shape (batch, num_labels)."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        return SimpleNamespace(logits=self.classifier(mean))
