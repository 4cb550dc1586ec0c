"""Adapters with deltas and cores in general position, and plain references for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers.pytorch_utils import Conv1D

from fedslm.adapter_keys import key_of, layers_of
from fedslm.config import LoraConfig, ModelConfig, TaskConfig
from fedslm.models.initial import initial_state
from fedslm.models.loaded import LoadedModel, load
from fedslm.records import AdapterState
from support.families import labels_of


def load_with(
    directory: Path,
    name: str,
    lora: LoraConfig,
    *,
    core: bool = False,
    pooling: str = "native",
    **options: str,
) -> LoadedModel:
    """A tiny model with an adapter of a given shape, of its own: no other test shares it."""
    base = ModelConfig(base=str(directory), device="cpu", **options)  # type: ignore[arg-type]
    task = TaskConfig(name=name, pooling=pooling, max_length=32)  # type: ignore[arg-type]
    return load.__wrapped__(base, lora, task, len(labels_of(name)), "core" if core else "factors")


def random_whole(model: LoadedModel, seed: int = 0) -> AdapterState:
    """Every parameter, in general position; a core too."""
    generator = np.random.default_rng(seed)
    start = initial_state(
        {key: tuple(each.shape) for key, each in model.adapter.parameters.items()}, seed
    )
    return AdapterState(
        {
            key: value + 0.1 * generator.standard_normal(value.shape).astype(np.float32)
            for key, value in start.tensors.items()
        }
    )


def random_deltas(model: LoadedModel, seed: int = 0, every: int = 1) -> AdapterState:
    """Deltas of different ranks on every layer, or on every second one."""
    generator = np.random.default_rng(seed)
    tensors = {}
    for number, layer in enumerate(layers_of(model.adapter.parameters)[::every]):
        rank = 1 + number % 5
        for part, like, axis in (("delta_A", "lora_A", 1), ("delta_B", "lora_B", 0)):
            width = model.adapter.parameters[key_of(layer, like)].shape[axis]  # type: ignore[arg-type]
            shape = (rank, width) if part == "delta_A" else (width, rank)
            values = 0.2 * generator.standard_normal(shape)
            tensors[key_of(layer, part)] = values.astype(np.float32)  # type: ignore[arg-type]
    return AdapterState(tensors)


def fold(model: LoadedModel, deltas: AdapterState) -> None:
    """Adds dense products of deltas to the base's own weights: what the layer must compute."""
    modules = dict(model.adapter.network.named_modules())
    for layer in sorted({key.rsplit(".", 2)[0] for key in deltas}):
        product = deltas[key_of(layer, "delta_B")] @ deltas[key_of(layer, "delta_A")]
        base = modules[layer].base_layer
        with torch.no_grad():
            base.weight += torch.from_numpy(product.T if isinstance(base, Conv1D) else product)
