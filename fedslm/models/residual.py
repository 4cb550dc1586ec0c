"""The remainder that aggregation keeps next to LoRA: a low-rank, untrained change of a layer.

An aggregate of clients' products generally has a higher rank than the adapter. The part that the
adapter cannot represent stays exact as ``D_B·D_A`` with a scaling of 1. It is computed next to the
layer and never added to the base's weights: the base keeps the hash that was checked, and no
rounding accumulates in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from fedslm.adapter_keys import key_of, part_of
from fedslm.errors import ModelError
from fedslm.records import AdapterState, FloatArray

if TYPE_CHECKING:
    from torch import nn

_Pair = tuple[torch.Tensor, torch.Tensor]


class Deltas:
    """The deltas of a network's adapted layers.

    They are not parameters and not buffers: an optimizer, Opacus, PEFT's files and an average of
    parameters do not include them. Gradients pass through them to the layers below.

    Args:
        layers: Maps each layer's name in adapter keys to PEFT's module; deltas are added to its output.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._layers: dict[str, Any] = dict(layers)
        self._pairs: dict[str, _Pair] = {}
        for layer, module in layers.items():
            module.register_forward_hook(partial(self._add, layer))

    def __len__(self) -> int:
        return len(self._pairs)

    def check(self, state: AdapterState) -> None:
        """Refuses deltas that do not fit the layers.

        Args:
            state: Only keys of deltas.

        Raises:
            ModelError: A layer is unknown, has only one factor, or a shape differs.
        """
        for layer in _layers(state):
            keys = key_of(layer, "delta_A"), key_of(layer, "delta_B")
            down, up = (state.tensors.get(key) for key in keys)
            module = self._layers.get(layer)
            if module is None or down is None or up is None:
                raise ModelError(
                    f"adapter tensors {keys[0]} and {keys[1]} must both be there, of one layer"
                )
            width, height = module.in_features, module.out_features
            if not (
                down.ndim == up.ndim == 2
                and (down.shape[1], up.shape[0]) == (width, height)
                and down.shape[0] == up.shape[1]
            ):
                raise ModelError(
                    f"delta of {layer} has shapes {down.shape} and {up.shape}; (d, {width}) and "
                    f"({height}, d) fit"
                )

    def write(self, state: AdapterState, *, others_stay: bool) -> None:
        """Stores deltas that were checked.

        Args:
            state: Only keys of deltas; a delta of rank 0 removes the layer's delta.
            others_stay: Whether layers without a delta in ``state`` keep their current one.
        """
        if not others_stay:
            self._pairs.clear()
        for layer in _layers(state):
            down, up = (state[key_of(layer, part)] for part in ("delta_A", "delta_B"))
            device = self._layers[layer].lora_A["default"].weight.device
            self._pairs.pop(layer, None)
            if len(down):
                self._pairs[layer] = (_tensor(down, device), _tensor(up, device))

    def _add(
        self, layer: str, module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> torch.Tensor | None:
        """Adds D_B·(D_A·x), in the precision of LoRA's own path: in total (W + s·B·A + D_B·D_A)·x."""
        pair = self._pairs.get(layer)
        if pair is None or module.disable_adapters:
            return None
        down, up = pair
        added = F.linear(F.linear(inputs[0].to(down.dtype), down), up)
        return (output + added).to(output.dtype)


def _layers(state: Iterable[str]) -> list[str]:
    """Returns the layers for which a state has a factor of a delta, sorted."""
    return sorted({key.removesuffix(f".{part_of(key)}.weight") for key in state})


def _tensor(values: FloatArray, device: torch.device) -> torch.Tensor:
    """Returns a copy that training can use, even if it is created in inference mode."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device)
