"""How a node gets in: keys of its own, a signed request, and the server operator's admission.

The node makes its keys itself; none of them ever leaves it. What it sends to the server's operator (by
any way, such as mail) is a request with its public keys, signed by both private ones. The operator
compares the fingerprint over another way, admits it, and sends back an admission: where the server is,
how to know it, and which client the node is. Neither file is secret.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

import fedslm
from fedslm.deployment.authority import AUTHORITY, write_private
from fedslm.deployment.bundle import bundle, sha256_of
from fedslm.deployment.settings import FederationFile, read_federation
from fedslm.errors import LedgerError, RunError
from fedslm.privacy import keys
from fedslm.storage import write_text

NODE_KEY, ADMISSION, NODES = "node-key", "admission.json", "nodes.json"
_NAME = re.compile(r"(?!\.+$)[A-Za-z0-9._-]{1,64}")  # also a file's name, here and at the server
_LEDGER_KEY = re.compile(r"[0-9a-f]{64}")
_ADDRESS = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}")
_REQUEST_KEYS = {"name", "node_key", "ledger_key", "version", "made_at"}
_MAX_BYTES = 64 * 1024
_OTHERS = 0o077


@dataclass(frozen=True)
class Admitted:
    """One line of the server's list of nodes.

    Attributes:
        name: The node's name.
        client: Its index in the population.
        node_id: Its number at the SuperLink.
        node_key: Its public key, SSH text.
        ledger_key: The public key that signs its ledger, hexadecimal.
        admitted_at: When.
        revoked: True if it is shut out.
    """

    name: str
    client: int
    node_id: int
    node_key: str
    ledger_key: str
    admitted_at: str
    revoked: bool = False


@dataclass(frozen=True)
class Admission:
    """What a node is told.

    Attributes:
        federation: The federation's name.
        address: Host and port of the server.
        authority: The certificate that the server is known by, PEM.
        client: The node's index in the population.
        node_id: The node's number at the SuperLink.
        node_key: The node's public key that was admitted.
        bundle_sha256: Hash of the application bundle that the server sends.
        version: The server's version of fedslm.
    """

    federation: str
    address: str
    authority: str
    client: int
    node_id: int
    node_key: str
    bundle_sha256: str
    version: str


def enroll(directory: Path, name: str) -> Path:
    """Makes a node's keys, if it has none, and writes its request.

    Args:
        directory: The node's own directory.
        name: Its name.

    Returns:
        The request's file.

    Raises:
        RunError: The name is none, something cannot be written, or others can read a key.
    """
    if not _NAME.fullmatch(name):
        raise RunError(f"name {name!r} must be 1 to 64 letters, digits, dots, dashes or underscores")
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
    """A node's private key.

    Raises:
        RunError: It is missing or none, or others can read it.
    """
    path = directory / NODE_KEY
    try:
        if path.stat().st_mode & _OTHERS:
            raise RunError(f"{path} can be read by others; run: chmod 600 {path}")
        key = serialization.load_ssh_private_key(path.read_bytes(), None)
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise RunError(f"{path} is no key: {error}; run `fedslm node enroll`") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise RunError(f"{path} is no elliptic-curve key; run `fedslm node enroll`")
    return key


def public_text(key: ec.EllipticCurvePrivateKey) -> str:
    """The public half of a node's key, as SSH writes it."""
    return _ssh(key.public_key())


def _ssh(key: ec.EllipticCurvePublicKey) -> str:
    """The one way to write a node's public key."""
    found = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return found.decode()


def fingerprint(key: str) -> str:
    """What operators read to one another over the telephone: of a node's key, or an authority.

    >>> fingerprint("ecdsa-sha2-nistp384 AAAA")
    'c766-424a-5bb8-8fcc'
    """
    digest = hashlib.sha256(key.encode()).hexdigest()
    return "-".join(digest[start : start + 4] for start in range(0, 16, 4))


def read_request(path: Path) -> dict[str, str]:
    """Reads a request whose signatures show that its sender has both private keys.

    Raises:
        RunError: It is none, or a signature is wrong.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError("it is too long")
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        signatures = content.pop("signatures")
        if set(content) != _REQUEST_KEYS or not all(isinstance(each, str) for each in content.values()):
            raise ValueError("it has other fields than a request")
        if not _NAME.fullmatch(content["name"]):
            raise ValueError("its name is not 1 to 64 letters, digits, dots, dashes or underscores")
        if not _LEDGER_KEY.fullmatch(content["ledger_key"]):
            raise ValueError("its ledger key is not 64 hexadecimal digits")
        key = serialization.load_ssh_public_key(content["node_key"].encode())
        if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp384r1":
            raise ValueError("its node key is no P-384 key")
        if content["node_key"] != _ssh(key):
            raise ValueError("its node key is not as `fedslm node enroll` writes it")
        key.verify(bytes.fromhex(signatures["node"]), _canonical(content), ec.ECDSA(hashes.SHA384()))
        ledger = keys.read_public_key(content["ledger_key"])
        if not keys.is_signed(ledger, content, signatures["ledger"]):
            raise ValueError("the ledger key's signature is wrong")
    except InvalidSignature as error:
        raise RunError(f"{path} is refused: the node key's signature is wrong") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, LedgerError) as error:
        raise RunError(f"{path} is no enrolment request: {error}") from error
    return content


def admitted_nodes(directory: Path) -> list[Admitted]:
    """The server's list of nodes.

    Raises:
        RunError: It cannot be read.
    """
    path = directory / NODES
    if not path.exists():
        return []
    try:
        return [Admitted(**node) for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is no list of nodes: {error}") from error


def admit(directory: Path, request: Path, register: Any) -> tuple[Admitted, Path]:
    """Lets a node in.

    Args:
        directory: The server's directory.
        request: The node's request.
        register: Registers (public key, name) with the SuperLink and gives the node's number.

    Returns:
        The node, and the admission's file, to be sent back.

    Raises:
        RunError: The request is wrong, or the name or a key is taken.
        FederationError: The SuperLink refuses.
    """
    asked, nodes = read_request(request), admitted_nodes(directory)
    for node in nodes:
        taken = {"name": asked["name"] == node.name and not node.revoked}
        taken |= {"node_key": asked["node_key"] == node.node_key}
        taken |= {"ledger_key": asked["ledger_key"] == node.ledger_key and not node.revoked}
        if node.revoked and asked["node_key"] == node.node_key:
            raise RunError(f"{request} is refused: its key was revoked; enrol without that node-key")
        if any(taken.values()):
            which = ", ".join(key for key, is_taken in taken.items() if is_taken)
            raise RunError(f"{request} is refused: {which} of node {node.name!r}")
    used = {node.client for node in nodes if not node.revoked}
    client = next(index for index in range(len(used) + 1) if index not in used)
    found = Admitted(
        name=asked["name"],
        client=client,
        node_id=register(asked["node_key"], asked["name"]),
        node_key=asked["node_key"],
        ledger_key=asked["ledger_key"],
        admitted_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    _write(directory, [*nodes, found])
    return found, write_admission(directory, found)


def write_admission(directory: Path, node: Admitted) -> Path:
    """Writes what a node is told.

    Raises:
        RunError: It cannot be written.
    """
    federation = read_federation(directory)
    values = Admission(
        federation=federation.name,
        address=address_of(federation),
        authority=(directory / AUTHORITY).read_text(encoding="utf-8"),
        client=node.client,
        node_id=node.node_id,
        node_key=node.node_key,
        bundle_sha256=sha256_of(bundle()),
        version=fedslm.__version__,
    )
    path = directory / "admissions" / f"{node.name}.admission.json"
    write_text(path, json.dumps(asdict(values), indent=2))
    return path


def revoke(directory: Path, name: str, unregister: Any) -> Admitted:
    """Shuts a node out; its index is free again.

    Args:
        directory: The server's directory.
        name: The node's name.
        unregister: Unregisters a node's number with the SuperLink.

    Raises:
        RunError: There is no such node.
        FederationError: The SuperLink refuses.
    """
    nodes = admitted_nodes(directory)
    for index, node in enumerate(nodes):
        if node.name == name and not node.revoked:
            unregister(node.node_id)
            gone = replace(node, revoked=True)
            _write(directory, [*nodes[:index], gone, *nodes[index + 1 :]])
            return gone
    raise RunError(f"there is no admitted node {name!r}; see `fedslm provision list`")


def accept(
    directory: Path, admission: Path, *, expected: str | None = None, replaces: bool = False
) -> Admission:
    """Puts an admission into the node's directory, if it is for this node.

    Nothing in an admission proves who made it: compare the authority's fingerprint with the server's
    operator over another way.

    Args:
        directory: The node's own.
        admission: What came back.
        expected: The authority's fingerprint that it must have; None: whatever it has.
        replaces: Take another authority than the one that was accepted before.

    Raises:
        RunError: It is none, is for another node's key, or has another authority.
    """
    found = read_admission(admission)
    if found.node_key != public_text(node_key(directory)):
        raise RunError(f"{admission} is for another node's key")
    if expected is not None and expected != fingerprint(found.authority):
        raise RunError(
            f"{admission} is refused: its authority's fingerprint is {fingerprint(found.authority)}, "
            f"not {expected}"
        )
    if (directory / ADMISSION).exists() and not replaces:
        before = read_admission(directory / ADMISSION)
        if before.authority != found.authority:
            raise RunError(
                f"{admission} has another authority than before; if that is right: --replace"
            )
    write_text(directory / ADMISSION, admission.read_text(encoding="utf-8"))
    return found


def read_admission(path: Path) -> Admission:
    """Reads an admission.

    Raises:
        RunError: It is none.
    """
    try:
        found = Admission(**json.loads(path.read_text(encoding="utf-8")))
        numbers = {"client": found.client, "node_id": found.node_id}
        for key, value in vars(found).items():
            if not isinstance(value, int if key in numbers else str) or isinstance(value, bool):
                raise ValueError(f"{key} is {value!r}")
        if min(numbers.values()) < 0 or not _ADDRESS.fullmatch(found.address):
            raise ValueError("a number is negative, or the address is no host and port")
        return found
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{path} is no admission: {error}") from error


def address_of(federation: FederationFile) -> str:
    """Host and port that nodes reach.

    >>> address_of(FederationFile(name="f", host="::1"))
    '[::1]:8443'
    """
    host = f"[{federation.host}]" if ":" in federation.host else federation.host
    return f"{host}:{federation.port}"


def _write(directory: Path, nodes: list[Admitted]) -> None:
    """Writes the list of nodes."""
    content = {"nodes": [asdict(node) for node in nodes]}
    write_text(directory / NODES, json.dumps(content, indent=2))


def _canonical(values: dict[str, str]) -> bytes:
    """The one way to write a request for signing."""
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
