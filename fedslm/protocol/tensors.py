"""Tensors as one Flower array: packed, masked, and unpacked within bounds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray

from fedslm.errors import FederationError
from fedslm.privacy.keys import masked
from fedslm.protocol import bounds
from fedslm.records import AdapterState

Mask = tuple[bytes, str]
"""Key and name of the keystream that tensors are under: see :func:`fedslm.privacy.keys.masked`."""
_TENSORS = "tensors"


def to_arrays(state: AdapterState) -> ArrayRecord:
    """Packs tensors whole."""
    return record_of(state.tensors)


def from_arrays(
    record: ArrayRecord, mask: Mask | None = None, most_bytes: int | None = None
) -> AdapterState:
    """Unpacks tensors that were sent whole, as read-only views of the received bytes.

    Raises:
        FederationError: A tensor is not float32, or they cannot be read.
    """
    content = bounds.tensor_bytes(record, ("F32",), most_bytes, mask=mask)
    return _views(content) if content else AdapterState({})


def _views(content: bytes) -> AdapterState:
    """The tensors of a safetensors content whose header is valid by itself.

    Raises:
        FederationError: The header's tensors do not lie one after another.
    """
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    flat = np.frombuffer(content, "<f4", offset=begin).astype(np.float32, copy=False)
    if not flat.flags.aligned:  # NumPy computes slowly on such an array, and BLAS not at all
        flat = flat.copy()
    shapes, tensors, end = {}, {}, 0
    for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, after = entry["data_offsets"]
        if first != end:
            raise FederationError(f"tensor {bounds.cut(key, 60)!r} overlaps another, or leaves a gap")
        end, shapes[key] = after, tuple(entry["shape"])
        try:
            tensors[key] = flat[first // 4 : after // 4].reshape(shapes[key])
        except ValueError as error:  # no values in 2^117 places
            raise FederationError(f"tensor {bounds.cut(key, 60)!r} cannot be read") from error
    if list(tensors) == sorted(tensors):
        return AdapterState.of_flat(flat, shapes)
    return AdapterState(tensors)


def record_of(tensors: Mapping[str, NDArray[Any]], mask: Mask | None = None) -> ArrayRecord:
    """Packs tensors into one array: with real nodes, Flower makes at least two requests per array."""
    from safetensors.numpy import save

    if not tensors:
        return ArrayRecord({})
    content = save({key: np.ascontiguousarray(value) for key, value in tensors.items()})
    content = content if mask is None else masked(*mask, content)
    return ArrayRecord({_TENSORS: Array("uint8", (len(content),), "safetensors", content)})


def arrays_of(
    record: ArrayRecord,
    number_types: Iterable[str],
    most_bytes: int | None = None,
    mask: Mask | None = None,
) -> dict[str, NDArray[Any]]:
    """Unpacks the result of :func:`record_of`."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    content = bounds.tensor_bytes(record, number_types, most_bytes, mask=mask)
    if not content:
        return {}
    try:
        return dict(load(content))
    except (SafetensorError, KeyError, ValueError) as error:
        raise FederationError(f"the tensors cannot be read: {bounds.cut(error, 100)}") from error
