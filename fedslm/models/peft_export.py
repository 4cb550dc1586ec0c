"""Exports any adapter as one ordinary LoRA adapter that PEFT loads and merges without fedslm."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedslm.adapter_keys import key_of, layers_of, part_of
from fedslm.config import LoraConfig
from fedslm.errors import ModelError
from fedslm.models.adapter import AttachedAdapter
from fedslm.records import AdapterState, FloatArray

if TYPE_CHECKING:
    import torch

_ADAPTER = "default"  # PEFT's name for the single adapter
_WHOLE = ("head", "center")


def plain(state: AdapterState, lora: LoraConfig) -> tuple[AdapterState, LoraConfig]:
    """Folds cores into A and appends deltas to the factors.

    ``s·B·(R·A) + D_B·D_A`` is ``s·[B, D_B/s]·[R·A; D_A]``. All layers get the largest rank that any
    layer needs, padded with zeros; alpha is set so that the scaling stays s.

    Args:
        state: A whole adapter.
        lora: The config it was attached with.

    Returns:
        The adapter and the config it attaches with, whose rank may exceed the bound of ``lora.rank``;
        both are unchanged if there is neither a core nor a delta.

    Raises:
        ModelError: A layer has only one factor of a pair, or lacks its A.
    """
    parts = {part_of(key) for key in state}
    if not parts & {"lora_R", "delta_A", "delta_B"}:
        return state, lora
    layers = layers_of(state)
    stray = [key for key in state if part_of(key) not in _WHOLE and key.rsplit(".", 2)[0] not in layers]
    if stray:
        raise ModelError(f"the adapter has {stray[0]}, but no LoRA factor A of that layer")
    factors = {layer: _factors(state, layer, lora.scaling) for layer in layers}
    rank = max(len(down) for down, _ in factors.values())
    tensors = {key: value for key, value in state.tensors.items() if part_of(key) in _WHOLE}
    for layer, (down, up) in factors.items():
        tensors[key_of(layer, "lora_A")] = np.pad(down, ((0, rank - len(down)), (0, 0)))
        tensors[key_of(layer, "lora_B")] = np.pad(up, ((0, 0), (0, rank - len(down))))
    alpha = lora.scaling * (math.sqrt(rank) if lora.rslora else rank)
    return AdapterState(tensors), lora.model_copy(update={"rank": rank, "alpha": alpha})


def save_plain(
    adapter: AttachedAdapter, state: AdapterState, lora: LoraConfig, directory: Path
) -> AdapterState:
    """Writes any adapter in PEFT's format, so that ``PeftModel.from_pretrained`` loads it.

    Args:
        adapter: The attached adapter of the model; it is not changed.
        state: A whole adapter.
        lora: The config the model was attached with.
        directory: The directory for PEFT's files.

    Returns:
        The tensors that were written.

    Raises:
        ModelError: The state is not whole, or does not match this model.
    """
    import torch

    written, shape = plain(state, lora)
    network: Any = adapter.network
    keys = {id(parameter): key for key, parameter in adapter.parameters.items()}
    names = {keys[id(each)]: name for name, each in network.named_parameters() if id(each) in keys}
    wanted = {key for key in adapter.parameters if part_of(key) != "lora_R"}
    if set(written) != wanted:
        odd = sorted(set(written) ^ wanted)
        raise ModelError(f"an adapter to be saved lacks or has too much: {', '.join(odd[:3])}")
    tensors: dict[str, torch.Tensor] = {
        names[key]: torch.from_numpy(value.copy()) for key, value in written.tensors.items()
    }
    kept = network.peft_config[_ADAPTER]
    network.peft_config[_ADAPTER] = _with_rank(kept, shape)
    try:
        network.save_pretrained(directory, state_dict=tensors)
    finally:
        network.peft_config[_ADAPTER] = kept
    return written


def _factors(state: AdapterState, layer: str, scaling: float) -> tuple[FloatArray, FloatArray]:
    """Returns A and B of a layer, such that s·B·A is the layer's whole change."""
    down, up, core, down_aside, up_aside = (
        state.tensors.get(key_of(layer, part))
        for part in ("lora_A", "lora_B", "lora_R", "delta_A", "delta_B")
    )
    if down is None or up is None or (down_aside is None) != (up_aside is None):
        raise ModelError(f"the adapter has one factor of {layer} without the other")
    if core is not None:
        down = (core.astype(np.float64) @ down).astype(np.float32)
    if down_aside is not None and up_aside is not None:
        down, up = np.vstack([down, down_aside]), np.hstack([up, up_aside / np.float32(scaling)])
    return down, up.astype(np.float32)


def _with_rank(kept: Any, lora: LoraConfig) -> Any:
    """Returns PEFT's config with another rank and scaling."""
    changed = copy.copy(kept)  # a shallow copy: its sets keep their order in the file
    changed.r, changed.lora_alpha = lora.rank, lora.alpha
    return changed
