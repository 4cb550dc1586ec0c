"""Compression of updates for the wire: fewer bits per value, and fewer values.

:func:`compress` returns an update that holds only values that the wire format can represent;
:meth:`Packing.pack` and :meth:`Packing.unpack` then transfer it without loss, so the hash of a release
is the hash of what the server uses.

When each is sound:
    * Rounding and dropping values come after clipping and noise: post-processing for every unit.
    * Both are unbiased: E[compress(u)] = u, over the rounding and the choice of values.
    * With error feedback, values are not scaled up, and the error is added to the next update. Under
      record- and user-level privacy the error is a function of noised values only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, assert_never

import numpy as np
from numpy.typing import NDArray

from fedslm.config import UploadName
from fedslm.errors import FederationError
from fedslm.records import AdapterState, FloatArray
from fedslm.rng import stream

Packed = dict[str, NDArray[Any]]
_SCALE = "scale/"
_LARGEST_INT8 = 127
_SMALLEST, _LARGEST = 2.0**-126, 2.0**100


@dataclass(frozen=True)
class Packing:
    """How the updates of one round are packed; server and client derive it from the request.

    Attributes:
        upload: Number format on the wire.
        keep_fraction: Share of each tensor's values that is sent, in (0, 1]; at least one value.
        mask_seed: (run's seed, round): all clients of a round send the same positions.
    """

    upload: UploadName = "float32"
    keep_fraction: float = 1.0
    mask_seed: tuple[int, int] = (0, 0)

    @property
    def is_whole(self) -> bool:
        """True if updates are sent unchanged."""
        return self.upload == "float32" and self.keep_fraction == 1

    def places(self, key: str, size: int) -> NDArray[np.int64]:
        """Returns the indices of the values of a flattened tensor that are sent, ascending."""
        if self.keep_fraction == 1:
            return np.arange(size)
        seed, round_number = self.mask_seed
        kept = max(1, round(self.keep_fraction * size))
        chosen = stream(seed, "mask", round_number, key).choice(size, kept, replace=False)
        return np.sort(chosen).astype(np.int64)

    @property
    def number_types(self) -> tuple[str, ...]:
        """The safetensors dtypes of the arrays on the wire."""
        return {"float32": ("F32",), "bfloat16": ("U16",), "int8": ("I8", "F32")}[self.upload]

    def bytes_of(self, size: int) -> int:
        """Returns the bytes on the wire of one tensor with this many values."""
        kept = size if self.keep_fraction == 1 else max(1, round(self.keep_fraction * size))
        return {"float32": 4 * kept, "bfloat16": 2 * kept, "int8": kept + 4}[self.upload]

    def keys_of(self, shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
        """Returns the names of the arrays that a message contains for these tensors."""
        scales = {f"{_SCALE}{key}" for key in shapes} if self.upload == "int8" else set()
        return set(shapes) | scales

    def pack(self, state: AdapterState) -> Packed:
        """Packs the result of :func:`compress`.

        Raises:
            FederationError: The update has values that this packing cannot represent.
        """
        if self.is_whole:
            return dict(state.tensors)
        packed: Packed = {}
        for key in state:
            flat = state[key].ravel()
            packed |= _encode(key, flat[self.places(key, flat.size)], self.upload)
        if self.unpack(packed, state.shapes).sha256() != state.sha256():
            raise FederationError("the update was not compressed for this packing")
        return packed

    def unpack(
        self, packed: Mapping[str, NDArray[Any]], shapes: Mapping[str, tuple[int, ...]] | None = None
    ) -> AdapterState:
        """Unpacks arrays that were received.

        Args:
            packed: The arrays of a message.
            shapes: The expected tensors; required unless everything is sent in float32.

        Raises:
            FederationError: An array is missing, unexpected, or not a possible output of this packing.
        """
        if self.is_whole:
            return AdapterState(packed)
        if shapes is None:
            raise FederationError("a packed update needs the shapes that are expected")
        if set(packed) != self.keys_of(shapes):
            raise FederationError("the packed update has other tensors than were asked for")
        tensors: dict[str, FloatArray] = {}
        for key, shape in shapes.items():
            places = self.places(key, math.prod(shape))
            flat = np.zeros(math.prod(shape), np.float32)
            flat[places] = _decode(key, packed, self.upload, len(places))
            tensors[key] = flat.reshape(shape)
        return AdapterState(tensors)


WHOLE = Packing()


def compress(
    difference: AdapterState, packing: Packing, rounding: np.random.Generator, *, unbiased: bool
) -> AdapterState:
    """Returns an update that the wire format can represent.

    Args:
        difference: A client's difference, after all noise.
        packing: The round's packing.
        rounding: Draws the direction in which each value is rounded.
        unbiased: Scales the kept values up by 1 / keep_fraction; if False, error feedback compensates
            for the values that are dropped.
    """
    tensors: dict[str, FloatArray] = {}
    for key in difference:
        flat = difference[key].ravel()
        places = packing.places(key, flat.size)
        values = flat[places]
        if unbiased and len(places) < flat.size:
            values = values * np.float32(flat.size / len(places))
        sent = np.zeros_like(flat)
        sent[places] = _rounded(values, packing.upload, rounding)
        tensors[key] = sent.reshape(difference[key].shape)
    return AdapterState(tensors)


def with_feedback(difference: AdapterState, error: AdapterState) -> AdapterState:
    """Adds the compression error of earlier updates (of the same tensors) to an update.

    With e ← (Δ + e) - C(Δ + e), the updates sent add up to Σ Δ less the last e: the error is delayed,
    not lost. For e to stay bounded, E‖u - C(u)‖² must be less than ‖u‖². Keeping a share q of the
    values leaves (1 - q)·‖u‖² if they are not scaled up; scaled up by 1 / q it leaves
    (1 / q - 1)·‖u‖², too much for q <= 1/2.

    References:
        Karimireddy et al. 2019 (arXiv 1901.09847).
    """
    same = {key for key in error if key in difference.tensors}
    return difference.plus(error.select(same))


def _rounded(values: FloatArray, upload: UploadName, rounding: np.random.Generator) -> FloatArray:
    """Rounds at random, without bias, to one of the two nearest values of the wire format."""
    match upload:
        case "float32":
            return values
        case "bfloat16":
            # Carries with probability (low 16 bits) / 2^16, the distance from the number below.
            bits = values.view(np.uint32)
            added = rounding.integers(0, 1 << 16, values.shape, dtype=np.uint32)
            return ((bits + added) & np.uint32(0xFFFF0000)).view(np.float32)
        case "int8":
            scale = _scale_of(values)
            exact = values.astype(np.float64) / scale
            below = np.floor(exact)  # up with probability exact - below: the mean is exact
            up = rounding.random(values.shape) < exact - below
            return ((below + up) * scale).astype(np.float32)
        case _:
            assert_never(upload)


def _scale_of(values: FloatArray) -> float:
    """Returns a power of two, so that its multiples are exact: rounding twice equals rounding once."""
    largest = float(np.abs(values).max(initial=0.0))
    if largest == 0:
        return 1.0
    mantissa, exponent = math.frexp(largest / _LARGEST_INT8)
    return max(_SMALLEST, 2.0 ** (exponent if mantissa > 0.5 else exponent - 1))


def _encode(key: str, values: FloatArray, upload: UploadName) -> Packed:
    """Encodes rounded values for the wire."""
    match upload:
        case "float32":
            return {key: values}
        case "bfloat16":
            return {key: (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)}
        case "int8":
            scale = _scale_of(values)
            numbers = np.clip(np.rint(values / scale), -_LARGEST_INT8, _LARGEST_INT8).astype(np.int8)
            return {key: numbers, f"{_SCALE}{key}": np.array([scale], np.float32)}
        case _:
            assert_never(upload)


def _decode(key: str, packed: Mapping[str, NDArray[Any]], upload: UploadName, count: int) -> FloatArray:
    """Decodes values that were received."""
    wanted = {"float32": np.float32, "bfloat16": np.uint16, "int8": np.int8}[upload]
    array = packed[key]
    if array.dtype != wanted or array.shape != (count,):
        raise FederationError(f"packed {key} has dtype={array.dtype} and shape {array.shape}")
    match upload:
        case "float32":
            return array
        case "bfloat16":
            return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
        case "int8":
            scale = packed[f"{_SCALE}{key}"]
            good = scale.dtype == np.float32 and scale.shape == (1,)
            if not (good and _SMALLEST <= float(scale[0]) <= _LARGEST):
                raise FederationError(f"the scale of packed {key} is not a scale")
            values: FloatArray = array.astype(np.float32) * scale[0]
            return values
        case _:
            assert_never(upload)
