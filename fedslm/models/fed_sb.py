"""LoRA with a core: B·R·A with a small trained R between two frozen factors (Fed-SB)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fedslm.models.peft_library import peft


class CoreLora(peft.tuners.lora.layer.LoraVariant):  # type: ignore[misc]
    """PEFT's LoRA layer with ``lora_R`` between its factors; PEFT itself does not support it.

    B and A are shared and frozen, so Σ pₖ·B·Rₖ·A = B·(Σ pₖ·Rₖ)·A: averaging R is exact. R starts at
    zero: its gradient is s·Bᵀ·G·Aᵀ, where G is the gradient of the layer's weights.

    R is a separate layer, so that the per-record gradients of each factor are those of a linear layer.

    References:
        Singhal et al. 2025, Fed-SB (arXiv 2502.15436).
    """

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        """Returns the base's ``result`` + s·B·R·A·dropout(x)."""
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        core, dropout = module.lora_R[active_adapter], module.lora_dropout[active_adapter]
        added: torch.Tensor = up(core(down(dropout(x)))) * module.scaling[active_adapter]
        return result + added

    def supports_lora_conversion(self) -> bool:
        """Returns False: :func:`fedslm.models.peft_export.plain` converts it instead."""
        return False


def insert_cores(layers: Iterable[Any]) -> None:
    """Inserts R = 0 between the factors of PEFT's LoRA layers.

    Args:
        layers: Layers with one adapter, "default".
    """
    for layer in layers:
        rank, device = layer.r["default"], layer.lora_A["default"].weight.device
        core = nn.Linear(rank, rank, bias=False, device=device)
        nn.init.zeros_(core.weight)
        layer.lora_R = nn.ModuleDict({"default": core})
        layer.lora_variant["default"] = CoreLora()
