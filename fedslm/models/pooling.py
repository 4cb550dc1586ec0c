"""A classifier over the masked mean of the last hidden states."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn


class Center(nn.Module):
    """Subtracts a public constant, which is stored with the adapter and is not trained."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Returns features (batch, width) without the constant."""
        return features - self.weight


class MeanPoolingClassifier(nn.Module):
    """Encoder, masked mean, one linear layer.

    The attribute names ``encoder``, ``center`` and ``classifier`` are part of the adapter's format.

    Args:
        encoder: A transformers model with ``last_hidden_state``.
        num_labels: Number of classes.
        normalized: Whether the mean, less a public constant, is scaled to length √width: all texts then
            have features of one length, so one rate and one clip norm suit every encoder and every
            length of text.
    """

    def __init__(self, encoder: nn.Module, num_labels: int, *, normalized: bool = False) -> None:
        super().__init__()
        self.normalized = normalized
        self.config = encoder.config
        self.encoder = encoder
        if getattr(encoder, "pooler", None) is not None:
            setattr(encoder, "pooler", None)  # noqa: B010  (a module is what mypy wants here)
        width: int = encoder.config.hidden_size  # type: ignore[union-attr, assignment]
        if normalized:
            self.center = Center(width)
        self.classifier = nn.Linear(width, num_labels)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        """Returns ``logits`` of shape (batch, num_labels)."""
        features = self.mean(input_ids, attention_mask)
        if self.normalized:
            features = scaled(self.center(scaled(features)))
        return SimpleNamespace(logits=self.classifier(features))

    def mean(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Returns the masked mean of the last hidden states, of shape (batch, width)."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean: torch.Tensor = (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        return mean


def scaled(features: torch.Tensor) -> torch.Tensor:
    """Returns features (batch, width) scaled to length √width; zeros stay zeros."""
    width: int = features.shape[-1]
    return nn.functional.normalize(features.float(), dim=-1).mul(width**0.5).to(features.dtype)
