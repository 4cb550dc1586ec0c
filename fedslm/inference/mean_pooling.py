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
        options: Options of any transformers configuration, such as ``id2label``.
    """

    model_type = "mean-pooling"
    _auto_class = "AutoConfig"

    def __init__(
        self, encoder: dict[str, Any] | None = None, encoder_class: str = "", **options: Any
    ) -> None:
        super().__init__(**options)
        self.encoder = encoder or {}
        self.encoder_class = encoder_class


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
        logits = self.classifier((hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1))
        loss = None
        if labels is not None and self.config.problem_type == "multi_label_classification":
            loss = nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        elif labels is not None:
            loss = nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)
