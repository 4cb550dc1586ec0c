"""Adapters of several ranks: a client of a lower rank holds the leading rows of A and columns of B."""

from __future__ import annotations

import numpy as np

from fedslm.adapter_keys import part_of
from fedslm.errors import FederationError
from fedslm.records import AdapterState

# The axes of a factor whose length is the rank.
RANK_AXES = {"lora_A": (0,), "lora_B": (1,), "lora_R": (0, 1)}


def crop(state: AdapterState, rank: int) -> AdapterState:
    """Returns the part of an adapter that a client of a rank holds; heads and deltas stay whole.

    >>> crop(AdapterState({"q.lora_B.weight": np.ones((3, 4), np.float32)}), 2).shapes
    {'q.lora_B.weight': (3, 2)}
    """
    cropped = {}
    for key, tensor in state.tensors.items():
        axes = RANK_AXES.get(part_of(key), ())
        cropped[key] = tensor[
            tuple(slice(rank) if a in axes else slice(None) for a in range(tensor.ndim))
        ]
    return AdapterState(cropped)


def pad(state: AdapterState, like: AdapterState) -> AdapterState:
    """Pads with zero rows and columns to the shapes of another adapter.

    Raises:
        FederationError: A tensor is unknown, or larger than in the other adapter.
    """
    padded = {}
    for key, tensor in state.tensors.items():
        shape = like[key].shape if key in like.tensors else ()
        if len(shape) != tensor.ndim or any(a > b for a, b in zip(tensor.shape, shape, strict=True)):
            raise FederationError(f"adapter tensor {key} of shape {tensor.shape} does not fit {shape}")
        widths = [(0, b - a) for a, b in zip(tensor.shape, shape, strict=True)]
        padded[key] = np.pad(tensor, widths)
    return AdapterState(padded)


def rank_of(state: AdapterState) -> int:
    """Returns the rank of an adapter's factors; 0 if it has none."""
    for key in state:
        axes = RANK_AXES.get(part_of(key))
        if axes:
            return int(state[key].shape[axes[0]])
    return 0
