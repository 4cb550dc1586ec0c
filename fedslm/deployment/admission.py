"""Admission of nodes: the server's list of nodes, and the admission files that nodes receive.

An admission contains the server's address, its certificate authority, and the operator's public key for
requests; it is signed with the operator's key. The federation's fingerprint, which operators compare
over a separate channel, covers the authority's certificate and the operator's key together; the
operator's signature covers the rest of an admission.
"""

from __future__ import annotations

import json
import re
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fedslm
from fedslm import layout
from fedslm.deployment import authority
from fedslm.deployment.authority import AUTHORITY, operator_public, write_private
from fedslm.deployment.bundle import bundle, sha256_of
from fedslm.deployment.enrolment import (
    MAX_BYTES,
    UNUSABLE,
    fingerprint,
    node_key,
    public_text,
    read_request,
    short,
)
from fedslm.deployment.settings import FederationFile, read_federation
from fedslm.errors import LedgerError, Refused, Unusable
from fedslm.federation import spends
from fedslm.federation.checkpoint import RunDirectory
from fedslm.federation.standings import Standing
from fedslm.privacy import keys
from fedslm.storage import locked, read_text, write_text

ADMISSION, NODES = "admission.json", "nodes.json"
_ADDRESS = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}")
_LOCK_SECONDS = 30.0
_MAX_LIST_BYTES, _LARGEST = 64 << 20, (1 << 64) - 1
_PUBLIC_KEY = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Admitted:
    """One line of the server's list of nodes.

    Attributes:
        name: The node's name.
        node_id: Its number at the SuperLink.
        node_key: Its public key, SSH text.
        ledger_key: The public key that signs its ledger, hexadecimal.
        admitted_at: When it was admitted.
        revoked: True if its admission was revoked.
    """

    name: str
    node_id: int
    node_key: str
    ledger_key: str
    admitted_at: str
    revoked: bool = False


@dataclass(frozen=True)
class Admission:
    """The data that an admitted node receives.

    Attributes:
        federation: The federation's name.
        address: Host and port of the server.
        authority: Certificate of the server's authority, PEM.
        operator_key: Public half (Ed25519, hexadecimal) of the key that signs requests.
        node_id: The node's number at the SuperLink.
        node_key: The node's public key that was admitted.
        bundle_sha256: Hash of the application bundle that the server sends.
        version: The server's version of fedslm.
        signature: Signature over all of the above by the operator's key. It is checked when the
            admission is accepted.
    """

    federation: str
    address: str
    authority: str
    operator_key: str
    node_id: int
    node_key: str
    bundle_sha256: str
    version: str
    signature: str = ""

    @property
    def fingerprint(self) -> str:
        """The fingerprint that the two operators compare over the telephone."""
        return fingerprint(self.authority + self.operator_key)


def admitted_nodes(directory: Path) -> list[Admitted]:
    """Reads the server's list of nodes.

    Raises:
        RunError: It cannot be read.
    """
    path = directory / NODES
    if not path.exists():
        return []
    try:
        return [Admitted(**node) for node in json.loads(read_text(path, _MAX_LIST_BYTES))["nodes"]]
    except UNUSABLE as error:
        raise Unusable(f"{path} is not a list of nodes: {short(error)}") from error


def admit(directory: Path, request: Path, register: Any, *, reason: str = "") -> tuple[Admitted, Path]:
    """Admits a node.

    Args:
        directory: The server's directory.
        request: The node's request.
        register: Registers (public key, name) with the SuperLink and returns the node's number.
        reason: Why a node that spent something before begins a new ledger; the audit shows it.

    Returns:
        The node, and the admission file to send back.

    Raises:
        Refused: The name or a key is taken or revoked, a signature is wrong, or a node of this name had
            another ledger and the reason is empty.
        RunError: The request is not one.
        FederationError: The SuperLink refuses.
    """
    asked = read_request(request)
    with _locked(directory):  # the name and keys stay free between check and write
        nodes = admitted_nodes(directory)
        _refuse_taken(directory, request, asked, nodes=nodes)
        former = _former_key(directory, asked, nodes=nodes, reason=reason)
        found = Admitted(
            name=asked["name"],
            node_id=register(asked["node_key"], asked["name"]),
            node_key=asked["node_key"],
            ledger_key=asked["ledger_key"],
            admitted_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        if former:
            spends.succeed(directory / spends.SPENDS, former, found.ledger_key, reason=reason)
        _write(directory, [*nodes, found])
    return found, write_admission(directory, found)


def _former_key(directory: Path, asked: dict[str, str], *, nodes: list[Admitted], reason: str) -> str:
    """The other ledger key with which a revoked node of this name spent something; empty if none.

    Raises:
        Refused: There is such a key, and the reason is empty.
    """
    standings = spends.read_standings(directory / spends.SPENDS)
    former = [node.ledger_key for node in nodes if node.name == asked["name"]]
    if asked["ledger_key"] in former:
        return ""
    known = {key: standings.get(key, Standing()) for key in reversed(former)}
    found = next((key for key, each in known.items() if each.charges or each.readmissions), "")
    if found and not reason.strip():
        raise Refused(
            f"node {asked['name']!r} had another ledger, and its spent budget still counts for the "
            f"people in its data: it must keep its ledger and {keys.PRIVATE_KEY}. If they are lost, "
            f"give a --reason: the audit shows it"
        )
    return found


def _refuse_taken(
    directory: Path, request: Path, asked: dict[str, str], *, nodes: list[Admitted]
) -> None:
    """Refuses a name or a key that another node has, and a node's key that was revoked."""
    for node in nodes:
        taken = {"name": asked["name"] == node.name and not node.revoked}
        taken |= {"node_key": asked["node_key"] == node.node_key}
        taken |= {"ledger_key": asked["ledger_key"] == node.ledger_key and not node.revoked}
        if node.revoked and asked["node_key"] == node.node_key:
            raise Refused(f"{request} is refused: its key was revoked; enrol without that node-key")
        if any(taken.values()):
            which = ", ".join(key for key, is_taken in taken.items() if is_taken)
            raise Refused(
                f"{request} is refused: node {node.name!r} is admitted with the same {which}; its "
                f"admission is {_admission_of(directory, node.name)}"
            )


def revoke(directory: Path, name: str, unregister: Any) -> Admitted:
    """Revokes a node's admission; its name can be used again.

    Args:
        directory: The server's directory.
        name: The node's name.
        unregister: Unregisters a node's number with the SuperLink.

    Raises:
        RunError: There is no such node.
        FederationError: The SuperLink refuses.
    """
    for node in admitted_nodes(directory):
        if node.name == name and not node.revoked:
            unregister(node.node_id)
            gone = replace(node, revoked=True)
            with _locked(directory):
                now = admitted_nodes(directory)
                _write(directory, [gone if each == node else each for each in now])
            return gone
    raise Unusable(f"there is no admitted node {name!r}; see `fedslm provision list`")


def _locked(directory: Path) -> AbstractContextManager[None]:
    """Locks out other commands between reading and writing the list."""
    problem = f"{directory / NODES} is in use by another process; try again"
    return locked(directory / f"{NODES}.lock", _LOCK_SECONDS, problem)


def _write(directory: Path, nodes: list[Admitted]) -> None:
    """Writes the list of nodes."""
    content = {"nodes": [asdict(node) for node in nodes]}
    write_text(directory / NODES, json.dumps(content, indent=2))


def write_admission(directory: Path, node: Admitted) -> Path:
    """Writes a node's admission file.

    Raises:
        RunError: It cannot be written.
    """
    federation = read_federation(directory)
    values = Admission(
        federation=federation.name,
        address=address_of(federation),
        authority=(directory / AUTHORITY).read_text(encoding="utf-8"),
        operator_key=operator_public(directory),
        node_id=node.node_id,
        node_key=node.node_key,
        bundle_sha256=sha256_of(bundle()),
        version=fedslm.__version__,
    )
    path = _admission_of(directory, node.name)
    signature = keys.signature_of(
        keys.private_key(directory / layout.OPERATOR_KEY), _signed_part(values)
    )
    content = json.dumps(asdict(replace(values, signature=signature)), indent=2)
    write_private(path, content.encode())
    return path


def _admission_of(directory: Path, name: str) -> Path:
    """Path of a node's admission file."""
    return directory / "admissions" / f"{name}.admission.json"


def federation_fingerprint(directory: Path) -> str:
    """Fingerprint over the authority and the operator's key.

    Raises:
        RunError: One of them cannot be read.
    """
    try:
        certificate = (directory / AUTHORITY).read_text(encoding="utf-8")
    except OSError as error:
        raise Unusable(f"{directory / AUTHORITY} cannot be read: {error}") from error
    return fingerprint(certificate + operator_public(directory))


def rekey(directory: Path) -> list[Path]:
    """Creates a new operator's key, and the admissions that announce it to the nodes.

    Returns:
        The admissions of all admitted nodes, to send to them.

    Raises:
        ConfigError: This is not a server's directory.
        RunError: A run is active, or something cannot be written.
    """
    read_federation(directory)
    authority.read_certificate(directory / AUTHORITY)  # without it no admission could announce the key
    for run in (directory / "runs").glob(f"*/{layout.CONFIG_JSON}"):
        with RunDirectory(run.parent, "").locked():  # an active run signs with the old key
            pass
    authority.rekey(directory)
    nodes = [node for node in admitted_nodes(directory) if not node.revoked]
    return [write_admission(directory, node) for node in nodes]


def readmit(directory: Path, name: str, reason: str) -> Standing:
    """Readmits a node that was excluded because of its ledger.

    Returns:
        The previous standing of the node.

    Raises:
        ConfigError: This is not a server's directory.
        RunError: There is no such node, it is not excluded, or the reason is empty.
    """
    read_federation(directory)
    for node in admitted_nodes(directory):
        if node.name == name and not node.revoked:
            return spends.readmit(directory / spends.SPENDS, node.ledger_key, reason)
    raise Unusable(f"there is no admitted node {name!r}; see `fedslm provision list`")


def _signed_part(admission: Admission) -> dict[str, Any]:
    """The values that an admission's signature covers."""
    values = asdict(admission)
    del values["signature"]
    return {**values, "purpose": "fedslm admission, version 1"}


def accept(
    directory: Path, admission: Path, *, expected: str | None = None, replaces: bool = False
) -> Admission:
    """Stores an admission in the node's directory, if it is for this node.

    The fingerprint covers the authority and the operator's key; the operator's signature covers the
    rest. So if the fingerprint was compared with the server's operator over a separate channel, nothing
    else needs to be trusted.

    Args:
        directory: The node's own directory.
        admission: The admission file that was sent back.
        expected: The federation's fingerprint that it must have; None: any.
        replaces: Accept another authority or operator's key than the ones accepted before.

    Raises:
        Refused: It is not signed by the key that it names, is for another node's key, or has another
            authority or operator's key than before.
        RunError: It is not an admission.
    """
    found = read_admission(admission)
    if found.node_key != public_text(node_key(directory)):
        raise Refused(f"{admission} is for another node's key")
    if not _is_signed_by_its_operator(found):
        raise Refused(f"{admission} is refused: it is not signed with the operator's key that it names")
    if expected is not None and expected != found.fingerprint:
        raise Refused(
            f"{admission} is refused: the federation's fingerprint is not {expected}; ask the "
            f"server's operator again"
        )
    if (directory / ADMISSION).exists() and not replaces:
        before = read_admission(directory / ADMISSION)
        if before.fingerprint != found.fingerprint:
            raise Refused(
                f"{admission} has another authority or operator's key than before (fingerprint "
                f"{found.fingerprint}, was {before.fingerprint}); if the operator confirms: --replace"
            )
    write_private(directory / ADMISSION, json.dumps(asdict(found), indent=2).encode())
    return found


def _is_signed_by_its_operator(admission: Admission) -> bool:
    """True if an admission is signed with the operator's key that it contains."""
    try:
        key = keys.read_public_key(admission.operator_key)
    except LedgerError:
        return False
    return keys.is_signed(key, _signed_part(admission), admission.signature)


def read_admission(path: Path) -> Admission:
    """Reads an admission.

    Raises:
        RunError: It is not an admission.
    """
    try:
        found = Admission(**json.loads(read_text(path, MAX_BYTES)))
        for key, value in vars(found).items():
            if type(value) is not (int if key == "node_id" else str):
                raise ValueError(f"{key} is {str(value)[:40]!r}")
        if not 0 <= found.node_id <= _LARGEST or not _ADDRESS.fullmatch(found.address):
            raise ValueError("node_id is out of range, or the address is not a host and port")
        if not _PUBLIC_KEY.fullmatch(found.operator_key):
            raise ValueError("operator_key is not 64 hexadecimal digits")
        return found
    except UNUSABLE as error:
        raise Unusable(f"{path} is not an admission: {short(error)}") from error


def address_of(federation: FederationFile) -> str:
    """Host and port at which nodes reach the server.

    >>> address_of(FederationFile(name="f", host="::1"))
    '[::1]:8443'
    """
    host = f"[{federation.host}]" if ":" in federation.host else federation.host
    return f"{host}:{federation.port}"
