"""A node's own secrets: the Ed25519 key that signs its ledger, and the key of its data commitments.

Both are made on the node at first use, are readable only by its owner, and never leave the node.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, hmac, serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from filelock import FileLock, Timeout

from fedslm.errors import LedgerError
from fedslm.storage import read_text

PRIVATE_KEY = "ledger-key.pem"
PUBLIC_KEY = "ledger-key.pub.pem"
_COMMITMENT_KEY = "commitment.key"
_COMMITMENT_BYTES = 32
_LOCK_SECONDS = 30.0
_OTHERS = 0o077
_MOST_BYTES = 1 << 16


_SMALL_ORDER = frozenset(
    bytes.fromhex(digits)
    for digits in (
        "00" * 32,
        "01" + "00" * 31,
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
        "ec" + "ff" * 30 + "7f",
        "ed" + "ff" * 30 + "7f",
        "ee" + "ff" * 30 + "7f",
    )
)
"""Points of small order, but for the highest bit: for such a "key" anybody finds signatures."""


def signing_key(directory: Path) -> Ed25519PrivateKey:
    """The node's signing key; made at first use, with the public key stored next to it.

    Raises:
        LedgerError: The key cannot be made or read, is not an Ed25519 key, or others can read it.
    """
    path = directory / PRIVATE_KEY
    key = _as_private(path, _secret(path, new_private_key))
    _publish(directory / PUBLIC_KEY, public_pem(key.public_key()))
    return key


def private_key(path: Path) -> Ed25519PrivateKey:
    """Reads a private key from a PEM file.

    Raises:
        LedgerError: It is missing, is not an Ed25519 key, or others can read it.
    """
    if not path.exists():
        raise LedgerError(f"{path} is missing")
    return _as_private(path, _secret(path, new_private_key))


def _as_private(path: Path, content: bytes) -> Ed25519PrivateKey:
    """Parses the content of a PEM file as a private key."""
    try:
        key = serialization.load_pem_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise LedgerError(f"{path} is not a key: {error}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise LedgerError(f"{path} is not an Ed25519 key")
    return key


def read_public_key(source: Path | str) -> Ed25519PublicKey:
    """Reads a public key: 64 hexadecimal digits, even if a file has that name, or else a PEM file.

    Raises:
        LedgerError: It is neither, or a key for which anybody can sign: its owner could repudiate every
            signature.
    """
    text = str(source)
    try:
        key: Any
        if re.fullmatch(r"[0-9a-fA-F]{64}", text):
            key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(text))
        else:
            key = serialization.load_pem_public_key(read_text(Path(source), _MOST_BYTES).encode())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise LedgerError(f"{source} is not a public key: {error}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise LedgerError(f"{source} is not an Ed25519 public key")
    if _without_sign(key.public_bytes_raw()) in _SMALL_ORDER:
        raise LedgerError(f"{source} is refused: anybody can sign for this key")
    return key


def _without_sign(point: bytes) -> bytes:
    """A point's bytes without the highest bit, which is the sign of its other coordinate."""
    return bytes([*point[:31], point[31] & 0x7F])


def public_hex(key: Ed25519PublicKey) -> str:
    """The 32 bytes of a public key as hexadecimal digits."""
    return key.public_bytes_raw().hex()


def public_pem(key: Ed25519PublicKey) -> bytes:
    """A public key as PEM."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def signature_of(key: Ed25519PrivateKey, values: Mapping[str, Any]) -> str:
    """Signs JSON values."""
    return key.sign(_canonical(values)).hex()


def is_signed(key: Ed25519PublicKey, values: Mapping[str, Any], signature: object) -> bool:
    """True if these values were signed with the private half of ``key``.

    Only the exact output of :func:`signature_of` is a signature: no capital digits, no spaces.
    """
    if not (isinstance(signature, str) and re.fullmatch(r"[0-9a-f]{128}", signature)):
        return False
    try:
        key.verify(bytes.fromhex(signature), _canonical(values))
    except (InvalidSignature, ValueError):
        return False
    return True


def sha256_of(values: Any) -> str:
    """Hash of JSON values."""
    return hashlib.sha256(_canonical(values)).hexdigest()


def masked(key: bytes, name: str, content: bytes) -> bytes:
    """Encrypts content with a keystream (ChaCha20); the same call decrypts it.

    It hides nothing from anyone who has the key, which is sent together with the content: it only makes
    the bytes, and so their hashes, impossible to know beforehand.

    Args:
        key: 32 random bytes, new for each message.
        name: Name of the content; two contents of one message have two names.
        content: Any bytes.
    """
    nonce = hashlib.sha256(name.encode()).digest()[:16]
    return Cipher(algorithms.ChaCha20(key, nonce), mode=None).encryptor().update(content)


def data_commitment(directory: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    """A keyed hash of a client's records that does not depend on their order.

    Formal guarantees:
        * Without the node's own 256-bit key it reveals nothing: HMAC-SHA256 over the sorted HMACs of
          the records. With the key an auditor on the node can check which records a charge was for.

    Raises:
        LedgerError: The key cannot be made or read, or others can read it. No record raises.
    """
    key = _secret(directory / _COMMITMENT_KEY, lambda: os.urandom(_COMMITMENT_BYTES))
    each = sorted(_mac(key, json.dumps(row, sort_keys=True, default=_typed).encode()) for row in rows)
    return _mac(key, b"".join(each)).hex()


def _typed(value: object) -> list[str]:
    """A value that JSON does not support, with its type."""
    match value:
        case bytes():
            return ["bytes", value.hex()]
        case _:
            return [type(value).__name__, repr(value)]


def _publish(path: Path, content: bytes) -> None:
    """Writes the public key's file so that it matches the private key."""
    try:
        if not path.exists() or path.read_bytes() != content:
            _write(path, content, mode=0o644)
    except OSError as error:
        raise LedgerError(f"{path} cannot be written: {error}") from error


def _mac(key: bytes, message: bytes) -> bytes:
    """HMAC-SHA256."""
    code = hmac.HMAC(key, hashes.SHA256())
    code.update(message)
    return code.finalize()


def _canonical(values: Any) -> bytes:
    """The canonical encoding of JSON values for hashing and signing."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def new_private_key() -> bytes:
    """A fresh Ed25519 key as PEM."""
    return Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _secret(path: Path, make: Any) -> bytes:
    """Reads a secret file, or creates it; refuses one that others can read."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            with FileLock(f"{path}.lock", timeout=_LOCK_SECONDS):
                if not path.exists():
                    _write(path, make(), mode=0o600)
        if path.stat().st_mode & _OTHERS:
            raise LedgerError(f"{path} can be read by others; run: chmod 600 {path}")
        return path.read_bytes()
    except (OSError, Timeout) as error:
        raise LedgerError(f"{path} cannot be made or read: {error}") from error


def _write(path: Path, content: bytes, *, mode: int) -> None:
    """Writes a file with its mode under a temporary name and renames it: it is complete or absent."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
