"""A classifier over the masked mean of an encoder's last hidden states, for plain transformers.

This file is also copied to the exported folder: load the model with ``trust_remote_code=True``.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class MeanPoolingConfig(PretrainedConfig):  # type: ignore[misc]
    """Configuration of a :class:`MeanPoolingForSequenceClassification`.

    Args:
        encoder: The encoder's own configuration, as a dictionary with ``model_type``.
        encoder_class: Name of the encoder's class in transformers.
        normalized: Whether the mean is scaled to length √width.
        options: Options of any transformers configuration, such as ``id2label``.
    """

    model_type = "mean-pooling"
    _auto_class = "AutoConfig"

    def __init__(
        self,
        encoder: dict[str, Any] | None = None,
        encoder_class: str = "",
        normalized: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.normalized = normalized
        self.encoder = encoder or {}
        self.encoder_class = encoder_class


class Center(nn.Module):
    """Scales features to length √width, subtracts a constant, and scales again."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Returns features of the same shape (batch, width)."""
        return self._scaled(self._scaled(features) - self.weight)

    @staticmethod
    def _scaled(features: torch.Tensor) -> torch.Tensor:
        length = features.shape[-1] ** 0.5
        return nn.functional.normalize(features.float(), dim=-1).mul(length).to(features.dtype)


class MeanPoolingForSequenceClassification(PreTrainedModel):  # type: ignore[misc]
    """Encoder, masked mean, one linear layer.

    Args:
        config: The encoder's configuration and the labels.
    """

    config_class = MeanPoolingConfig
    base_model_prefix = "encoder"
    _auto_class = "AutoModelForSequenceClassification"

    def __init__(self, config: MeanPoolingConfig) -> None:
        super().__init__(config)
        values = dict(config.encoder)
        encoder_config = AutoConfig.for_model(values.pop("model_type"), **values)
        self.encoder = getattr(transformers, config.encoder_class)(encoder_config)
        if getattr(self.encoder, "pooler", None) is not None:
            self.encoder.pooler = None
        if config.normalized:
            self.center = Center(encoder_config.hidden_size)
        self.classifier = nn.Linear(encoder_config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **options: Any,
    ) -> SequenceClassifierOutput:
        """Returns ``logits`` of shape (batch, labels), and the mean ``loss`` if labels are given."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        if self.config.normalized:
            mean = self.center(mean)
        logits = self.classifier(mean)
        loss = None
        if labels is not None and self.config.problem_type == "multi_label_classification":
            loss = nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        elif labels is not None:
            loss = nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)
