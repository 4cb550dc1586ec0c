"""Masks: AES-256 keystreams, added to a vector modulo 2^32.

Formal guarantees:
    * A mask is the keystream of AES-256 in counter mode (NIST SP 800-38A) under a 256-bit key that is
      used for nothing else: without the key it looks uniform, and so does any vector to which it was
      added.
    * The vector is changed in place; beyond it there is one block of 64 KiB of keystream.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

from fedslm.errors import FederationError

KEY_BYTES = 32
_COUNTER = bytes(16)  # a key is used for only one stream, so its start need not vary
_BLOCK_VALUES = 16_384  # 64 KiB: the block stays in the cache of a core
_VALUE_BYTES, _CIPHER_BLOCK_BYTES = 4, 16


def add_masks(
    vector: NDArray[np.uint32], plus: Iterable[bytes] = (), minus: Iterable[bytes] = ()
) -> None:
    """Adds and subtracts masks modulo 2^32, in place.

    Args:
        vector: One-dimensional uint32 values.
        plus: Keys (32 bytes) of the masks to add.
        minus: Keys of the masks to subtract.

    Raises:
        FederationError: The vector has another type or form.

    >>> vector = np.arange(3, dtype=np.uint32)
    >>> add_masks(vector, plus=[bytes(32), bytes([1] * 32)])
    >>> add_masks(vector, minus=[bytes(32), bytes([1] * 32)])
    >>> vector.tolist()
    [0, 1, 2]
    """
    check_vector(vector, len(vector))
    streams: list[tuple[np.ufunc, CipherContext]] = [(np.add, _keystream(key)) for key in plus]
    streams += [(np.subtract, _keystream(key)) for key in minus]
    zeros = bytes(_BLOCK_VALUES * _VALUE_BYTES)
    buffer = bytearray(len(zeros) + _CIPHER_BLOCK_BYTES)  # the cipher asks for more room than it fills
    keystream = np.frombuffer(buffer, "<u4")
    for start in range(0, len(vector), _BLOCK_VALUES):
        part = vector[start : start + _BLOCK_VALUES]
        for operation, stream in streams:
            stream.update_into(zeros[: len(part) * _VALUE_BYTES], buffer)
            operation(part, keystream[: len(part)], out=part)


def check_vector(vector: NDArray[Any], num_values: int) -> None:
    """Refuses a vector that cannot be masked in place.

    Args:
        vector: The array.
        num_values: Length that it must have.

    Raises:
        FederationError: It is not a one-dimensional, contiguous, writable uint32 array of this length.
    """
    is_plain = vector.dtype == np.uint32 and vector.ndim == 1
    if not (is_plain and vector.flags.c_contiguous and vector.flags.writeable):
        raise FederationError("a vector to mask must be a one-dimensional, writable array of uint32")
    if len(vector) != num_values:
        raise FederationError(f"the vector has {len(vector)} values, not {num_values}")


def _keystream(key: bytes) -> CipherContext:
    """The cipher of one mask, at the start of its stream."""
    if len(key) != KEY_BYTES:
        raise FederationError(f"the key of a mask has {KEY_BYTES} bytes, not {len(key)}")
    return Cipher(algorithms.AES(key), modes.CTR(_COUNTER)).encryptor()
