"""Enrolment of a node: it creates its keys and a signed request for admission.

The node creates its keys itself; no private key ever leaves it. It sends the server's operator (by
mail, for instance) a request with its public keys, signed by both private ones. The operator compares
the fingerprint over a separate channel and answers with an admission
(:mod:`fedslm.deployment.admission`). Treat both files as confidential: they are not enough to take
part, but they reveal who does, and where.
"""

from __future__ import annotations

import hashlib
import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

import fedslm
from fedslm.deployment.authority import write_private
from fedslm.errors import LedgerError, Refused, RunError, Unusable
from fedslm.privacy import keys
from fedslm.storage import read_text, write_text

NODE_KEY = "node-key"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # also a file name, here and at the server
_LEDGER_KEY = re.compile(r"[0-9a-f]{64}")
_REQUEST_KEYS = {"name", "node_key", "ledger_key", "version", "made_at"}
MAX_BYTES = 64 * 1024
UNUSABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
_OTHERS = 0o077


def enroll(directory: Path, name: str) -> Path:
    """Creates a node's keys, if it has none, and writes its request.

    Args:
        directory: The node's own directory.
        name: Its name.

    Returns:
        The request's file.

    Raises:
        RunError: The name is not valid, something cannot be written, or others can read a key.
    """
    if not _NAME.fullmatch(name):
        raise Unusable(f"name {name!r} must be 1 to 64 letters, digits, dots, dashes or underscores")
    if not (directory / NODE_KEY).exists():
        fresh = ec.generate_private_key(ec.SECP384R1())
        pem = fresh.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
        write_private(directory / NODE_KEY, pem)
    key = node_key(directory)
    try:
        ledger = keys.signing_key(directory)
    except LedgerError as error:
        raise RunError(str(error)) from error
    values = {
        "name": name,
        "node_key": public_text(key),
        "ledger_key": keys.public_hex(ledger.public_key()),
        "version": fedslm.__version__,
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    signatures = {
        "node": key.sign(_canonical(values), ec.ECDSA(hashes.SHA384())).hex(),
        "ledger": keys.signature_of(ledger, values),
    }
    path = directory / f"{name}.request.json"
    write_text(path, json.dumps({**values, "signatures": signatures}, indent=2))
    return path


def node_key(directory: Path) -> ec.EllipticCurvePrivateKey:
    """Reads a node's private key.

    Raises:
        RunError: It is missing or not a valid key, or others can read it.
    """
    path = directory / NODE_KEY
    try:
        if path.stat().st_mode & _OTHERS:
            raise RunError(f"{path} can be read by others; run: chmod 600 {path}")
        key = serialization.load_ssh_private_key(path.read_bytes(), None)
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise Unusable(f"{path} is not a key: {error}; run `fedslm node enroll`") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise Unusable(f"{path} is not an elliptic-curve key; run `fedslm node enroll`")
    return key


def public_text(key: ec.EllipticCurvePrivateKey) -> str:
    """The public half of a node's key, in SSH format."""
    return _ssh(key.public_key())


def _ssh(key: ec.EllipticCurvePublicKey) -> str:
    """The canonical encoding of a node's public key."""
    found = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return found.decode()


def fingerprint(key: str) -> str:
    """Fingerprint of a node's key or an authority, which operators compare over the telephone.

    >>> fingerprint("ecdsa-sha2-nistp384 AAAA")
    'c766-424a-5bb8-8fcc'
    """
    digest = hashlib.sha256(key.encode()).hexdigest()
    return "-".join(digest[start : start + 4] for start in range(0, 16, 4))


def read_request(path: Path) -> dict[str, str]:
    """Reads a request whose signatures show that its sender has both private keys.

    Raises:
        Refused: The node key's signature is wrong.
        RunError: It is not an enrolment request.
    """
    try:
        content: dict[str, Any] = json.loads(read_text(path, MAX_BYTES))
        signatures = content.pop("signatures")
        if set(content) != _REQUEST_KEYS or not all(isinstance(each, str) for each in content.values()):
            raise ValueError("it has other fields than a request")
        if not _NAME.fullmatch(content["name"]):
            raise ValueError("its name is not 1 to 64 letters, digits, dots, dashes or underscores")
        if not _LEDGER_KEY.fullmatch(content["ledger_key"]):
            raise ValueError("its ledger key is not 64 hexadecimal digits")
        key = serialization.load_ssh_public_key(content["node_key"].encode())
        if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp384r1":
            raise ValueError("its node key is not a P-384 key")
        if content["node_key"] != _ssh(key):
            raise ValueError("its node key is not as `fedslm node enroll` writes it")
        key.verify(bytes.fromhex(signatures["node"]), _canonical(content), ec.ECDSA(hashes.SHA384()))
        ledger = keys.read_public_key(content["ledger_key"])
        if not keys.is_signed(ledger, content, signatures["ledger"]):
            raise ValueError("the ledger key's signature is wrong")
    except InvalidSignature as error:
        raise Refused(f"{path} is refused: the node key's signature is wrong") from error
    except (*UNUSABLE, LedgerError) as error:
        raise Unusable(f"{path} is not an enrolment request: {short(error)}") from error
    return content


def short(error: Exception) -> str:
    """A one-line description of what is wrong with a file from outside."""
    return str(error)[:200]


def _canonical(values: dict[str, str]) -> bytes:
    """The canonical encoding of a request for signing."""
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
