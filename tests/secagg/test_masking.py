"""Tests of the masks: against another implementation, a published vector, and the memory they take."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedslm.errors import FederationError
from fedslm.secagg import masking
from fedslm.secagg.masking import add_masks

KEYS = [bytes([number]) * 32 for number in range(1, 5)]


def keystream(key: bytes, count: int) -> list[int]:
    """The mask of a key, one block at a time: AES of the counter, four little-endian numbers each."""
    cipher = Cipher(algorithms.AES(key), modes.ECB()).encryptor()  # noqa: S305
    values: list[int] = []
    for counter in range(-(-count // 4)):
        block = cipher.update(counter.to_bytes(16, "big"))
        values += [int.from_bytes(block[i : i + 4], "little") for i in range(0, 16, 4)]
    return values[:count]


@pytest.mark.parametrize("count", [1, 3, 4, 5, 16_383, 16_384, 16_385, 40_000])
def test_another_implementation_agrees(count: int) -> None:
    """Two masks are added and two subtracted, modulo 2^32, at any length."""
    start = np.random.default_rng(0).integers(0, 1 << 32, count, np.uint32)
    vector = start.copy()
    add_masks(vector, plus=KEYS[:2], minus=KEYS[2:])
    a, b, c, d = (keystream(key, count) for key in KEYS)
    expected = [
        (v + p + q - r - s) % (1 << 32)
        for v, p, q, r, s in zip(start.tolist(), a, b, c, d, strict=True)
    ]
    assert vector.tolist() == expected


def test_the_keystream_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """NIST SP 800-38A, F.5.5 (CTR-AES256): the keystream is plaintext XOR ciphertext."""
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    plain = bytes.fromhex("6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51")
    cipher = bytes.fromhex("601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5")
    monkeypatch.setattr(masking, "_COUNTER", bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff"))
    vector = np.zeros(8, np.uint32)
    add_masks(vector, plus=[key])
    found = vector.astype("<u4").tobytes()
    assert found == bytes(a ^ b for a, b in zip(plain, cipher, strict=True))


def test_masks_take_one_block_of_memory() -> None:
    """Beyond the vector (32 MB), which is changed in place, five masks take less than 1 MB."""
    vector = np.zeros(8_000_000, np.uint32)
    tracemalloc.start()
    try:
        add_masks(vector, plus=KEYS[:3], minus=KEYS[3:])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20
    assert np.count_nonzero(vector) > 7_900_000


@pytest.mark.parametrize(
    "vector",
    [
        np.zeros(4, np.int32),
        np.zeros(4, np.float32),
        np.zeros((2, 2), np.uint32),
        np.zeros(8, np.uint32)[::2],
        np.frombuffer(bytes(16), np.uint32),  # read-only
    ],
)
def test_what_cannot_be_masked(vector: Any) -> None:
    """Another type or form, or memory that cannot be written: nothing is changed."""
    before = vector.copy()
    with pytest.raises(FederationError):
        add_masks(vector, plus=KEYS)
    assert (vector == before).all()


def test_a_short_key_masks_nothing() -> None:
    """A key of 16 bytes would be AES-128."""
    vector = np.zeros(4, np.uint32)
    with pytest.raises(FederationError):
        add_masks(vector, plus=[KEYS[0], bytes(16)])
    assert not vector.any()
