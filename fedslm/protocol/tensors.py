"""Tensors as one Flower array: packed, masked, and unpacked within bounds."""

from __future__ import annotations

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


def from_arrays(record: ArrayRecord, mask: Mask | None = None) -> AdapterState:
    """Unpacks tensors.

    Raises:
        ModelError: A tensor is not float32.
        FederationError: They cannot be read.
    """
    return AdapterState(arrays_of(record, ("F32",), mask=mask))


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
