"""LoRA's layers in two matrix products per direction, for plain and for private training.

PEFT computes W·x + s·B·(A·x) with a separate pass over the outputs for each of the three operations,
and autograd adds two gradients of x. Here the thin product is added in place. The values are PEFT's, up
to the order of rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedslm.models.peft_library import peft

_LORA = peft.tuners.lora.layer.Linear
_ADAPTER = "default"


class Records(Protocol):
    """Receives per-record gradients in place of a batch's."""

    def add(self, parameter: nn.Parameter, gradient: torch.Tensor, inputs: torch.Tensor | None) -> None:
        """Adds Σₜ gₜ·xₜᵀ of each record to a parameter's gradient (``inputs`` None: Σₜ gₜ).

        Args:
            parameter: A trained tensor.
            gradient: g of shape (rows, …, outputs).
            inputs: x of shape (rows, …, inputs).
        """


@dataclass(frozen=True)
class LoraLayer:
    """The tensors of one adapted layer.

    Attributes:
        module: PEFT's module.
        weight: Frozen, of shape (outputs, inputs).
        bias: Frozen, or None.
        down: A, of shape (rank, inputs).
        up: B, of shape (outputs, rank).
        scaling: s.
    """

    module: Any
    weight: torch.Tensor
    bias: torch.Tensor | None
    down: nn.Parameter
    up: nn.Parameter
    scaling: float

    @classmethod
    def of(cls, module: Any) -> LoraLayer | None:
        """Returns the tensors of a plain LoRA layer; None for any other layer or variant."""
        if type(module) is not _LORA or module.lora_variant or module.merged:
            return None
        base: Any = module.get_base_layer()
        if type(base) not in (nn.Linear, Conv1D) or list(module.lora_A) != [_ADAPTER]:
            return None
        down, up = module.lora_A[_ADAPTER], module.lora_B[_ADAPTER]
        if down.bias is not None or up.bias is not None:
            return None
        weight = base.weight.t() if type(base) is Conv1D else base.weight
        scaling = float(module.scaling[_ADAPTER])
        return cls(module, weight, base.bias, down.weight, up.weight, scaling)

    @property
    def drops(self) -> bool:
        """Whether dropout is on: then PEFT's own forward pass is used."""
        dropout = self.module.lora_dropout[_ADAPTER]
        return bool(self.module.training and isinstance(dropout, nn.Dropout) and dropout.p > 0)


@contextmanager
def fused(network: nn.Module, records: Records | None = None) -> Iterator[frozenset[int]]:
    """Replaces the forward pass of a network's LoRA layers inside the block.

    Args:
        network: The network.
        records: Receives per-record gradients of the trained factors; None gives ordinary gradients.

    Yields:
        The ids of the parameters that the replaced layers own.
    """
    layers = [layer for module in network.modules() if (layer := LoraLayer.of(module)) is not None]
    try:
        for layer in layers:
            layer.module.forward = _forward_of(layer, records)
        yield frozenset(id(parameter) for layer in layers for parameter in (layer.down, layer.up))
    finally:
        for layer in layers:
            layer.module.__dict__.pop("forward", None)


def _forward_of(layer: LoraLayer, records: Records | None) -> Callable[..., torch.Tensor]:
    """Returns a layer's forward pass."""

    def forward(x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        if layer.module.disable_adapters or layer.drops or arguments or options:
            own: torch.Tensor = type(layer.module).forward(layer.module, x, *arguments, **options)
            return own
        product: torch.Tensor = _Product.apply(x, layer.down, layer.up, layer, records)  # type: ignore[no-untyped-call]
        return product

    return forward


class _Product(torch.autograd.Function):
    """W·x + b + s·B·(A·x)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        down: torch.Tensor,
        up: torch.Tensor,
        layer: LoraLayer,
        records: Records | None,
    ) -> torch.Tensor:
        """Computes the product, in autocast's precision if it is on."""
        ctx.layer, ctx.records, ctx.type = layer, records, x.dtype
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        product, thin = F.linear(x, layer.weight, layer.bias), F.linear(x, down)
        flat = product.view(-1, product.shape[-1])
        flat.addmm_(thin.flatten(0, -2), up.t().to(thin.dtype), alpha=layer.scaling)
        ctx.save_for_backward(x if down.requires_grad else None, thin if up.requires_grad else None)
        return product

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Returns the gradient of x, and those of A and B unless records receive them."""
        (gradient,), (x, thin) = gradients, ctx.saved_tensors
        layer: LoraLayer = ctx.layer
        kind, flat = gradient.dtype, gradient.reshape(-1, gradient.shape[-1])
        below = inner = None
        if x is not None or ctx.needs_input_grad[0]:
            inner = (flat @ layer.up.to(kind)).mul_(layer.scaling)
        if inner is not None and ctx.needs_input_grad[0]:
            below = flat @ layer.weight.to(kind)
            below.addmm_(inner, layer.down.to(kind))
            below = below.view(*gradient.shape[:-1], -1).to(ctx.type)
        for_down = for_up = None
        if thin is not None:
            scaled = thin * layer.scaling
            if ctx.records is None:
                for_up = (flat.t() @ scaled.flatten(0, -2)).to(layer.up.dtype)
            else:
                ctx.records.add(layer.up, gradient, scaled)
        if x is not None and inner is not None:
            if ctx.records is None:
                for_down = (inner.t() @ x.flatten(0, -2)).to(layer.down.dtype)
            else:
                ctx.records.add(layer.down, inner.view(*gradient.shape[:-1], -1), x)
        return below, for_down, for_up, None, None
