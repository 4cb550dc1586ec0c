"""The list of admitted nodes, signed by the federation's offline authority.

A node accepts as peers only keys on a roster that it verified itself: a server cannot invent peers. The
authority is that of :mod:`fedslm.deployment.authority`, whose certificate nodes compare over a separate
channel. Its key also signs certificates; those begin with another byte than a roster, so neither
signature can be used as the other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedslm.errors import FederationError, LedgerError, Refused, RunError
from fedslm.privacy.keys import read_public_key, sha256_of
from fedslm.secagg.cohort import MOST_CLIENT, check_count, is_ascending
from fedslm.storage import locked, read_text, write_text

MOST_MEMBERS = 10_000
MOST_BYTES = 8 << 20
_PURPOSE = "fedslm secagg roster, version 1"
_LONGEST_NAME, _LONGEST_NODE_KEY, _LARGEST_SERIAL = 200, 600, 1 << 53
_LOCK_SECONDS = 30.0


@dataclass(frozen=True)
class Member:
    """One admitted node.

    Attributes:
        client: Its number in the federation.
        node_key: The public key of its connection, as text.
        ledger_key: The public key that signs its ledger and its round keys, hexadecimal.
    """

    client: int
    node_key: str
    ledger_key: str


@dataclass(frozen=True)
class Roster:
    """A verified list; made only by :func:`verified`.

    Attributes:
        federation: Name of the federation.
        serial: Number of the list; a later one has a greater number.
        members: The admitted nodes, by ascending client.
    """

    federation: str
    serial: int
    members: tuple[Member, ...]

    @cached_property
    def sha256(self) -> str:
        """Hash of the list."""
        return sha256_of(_signed_values(self))

    @cached_property
    def _ledger_keys(self) -> dict[int, Ed25519PublicKey]:
        """Each member's key, ready to verify with."""
        return {member.client: read_public_key(member.ledger_key) for member in self.members}

    def ledger_key(self, client: int) -> Ed25519PublicKey:
        """A member's ledger key.

        Raises:
            FederationError: The client is not on the roster.
        """
        key = self._ledger_keys.get(client)
        if key is None:
            raise FederationError(f"client={client} is not on the roster of {len(self.members)} nodes")
        return key

    def client_of(self, ledger_key: str) -> int:
        """The client whose ledger key (hexadecimal) this is.

        Raises:
            FederationError: No member has it.
        """
        for member in self.members:
            if member.ledger_key == ledger_key:
                return member.client
        raise FederationError(
            f"the ledger key {ledger_key[:16]}… is not on the roster; ask to be admitted"
        )


def signed_roster(
    authority: ec.EllipticCurvePrivateKey, federation: str, serial: int, members: Sequence[Member]
) -> str:
    """Signs a list of admitted nodes (ECDSA, SHA-384).

    Args:
        authority: The authority's private key; a simulation makes one of its own.
        federation: Name of the federation.
        serial: Number of the list, greater than that of any list before.
        members: The admitted nodes.

    Raises:
        FederationError: A value is not valid, or two members share a client or a key.
    """
    roster = _checked(federation, serial, tuple(sorted(members, key=lambda member: member.client)))
    signature = authority.sign(_canonical(_signed_values(roster)), ec.ECDSA(hashes.SHA384()))
    return _canonical({**_signed_values(roster), "signature": signature.hex()}).decode()


def verified(text: str, authority: ec.EllipticCurvePublicKey) -> Roster:
    """Reads a roster, which anybody may have sent.

    Args:
        text: The text of :func:`signed_roster`.
        authority: The public key of the authority that this node was told of.

    Raises:
        FederationError: It cannot be read, or a value is out of its range.
        Refused: It was not signed by this authority.
    """
    if len(text) > MOST_BYTES:
        raise FederationError(f"a roster has at most {MOST_BYTES} characters")
    try:
        values = json.loads(text)
        signature = bytes.fromhex(values.pop("signature"))
        content = _canonical(values)
        if values.pop("purpose") != _PURPOSE:
            raise ValueError("it is another kind of list")
        members = tuple(Member(**member) for member in values.pop("members")[: MOST_MEMBERS + 1])
        roster = _checked(**values, members=members)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FederationError(f"the roster cannot be read: {str(error)[:100]}") from error
    try:
        authority.verify(signature, content, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        raise Refused("the roster was not signed by this federation's authority") from None
    if _canonical({**_signed_values(roster), "signature": signature.hex()}).decode() != text:
        raise FederationError("the roster is not in its only encoding")
    return roster


def accepted(path: Path, text: str, authority: ec.EllipticCurvePublicKey) -> Roster:
    """Reads a roster, and keeps it if it is newer than the kept one; an older one is refused.

    A server could otherwise bring back a node whose admission was revoked.

    Args:
        path: Where the node keeps its roster.
        text: The text of :func:`signed_roster`.
        authority: As for :func:`verified`.

    Raises:
        FederationError: As for :func:`verified`.
        Refused: It was not signed by this authority, or is older than the kept one, or differs from it
            although it has the same number.
        RunError: The kept roster cannot be read or written.
    """
    roster = verified(text, authority)
    with locked(Path(f"{path}.lock"), _LOCK_SECONDS, f"another process has {path} locked"):
        if path.exists():
            try:
                kept = verified(read_text(path, MOST_BYTES), authority)
            except (OSError, ValueError, FederationError, Refused) as error:
                raise RunError(
                    f"{path} cannot be used: {error}; remove it to accept another"
                ) from error
            if roster == kept:
                return roster
            if roster.serial <= kept.serial:
                raise Refused(
                    f"serial={roster.serial} of the roster must be greater than {kept.serial}, that of "
                    f"the kept one; ask the authority for the newest"
                )
        write_text(path, text)
    return roster


def _checked(federation: Any, serial: Any, members: Any) -> Roster:
    """A list whose values are within bounds and whose members differ."""
    if type(federation) is not str or not 1 <= len(federation) <= _LONGEST_NAME:
        raise FederationError(f"federation must be a text of 1 to {_LONGEST_NAME} characters")
    check_count("serial", serial, 0, _LARGEST_SERIAL)
    if not 1 <= len(members) <= MOST_MEMBERS:
        raise FederationError(f"a roster has from 1 to {MOST_MEMBERS} members")
    for member in members:
        _check_member(member)
    clients = [member.client for member in members]
    if not is_ascending(clients):
        raise FederationError("a roster names each client once, in ascending order")
    for key in ("node_key", "ledger_key"):
        if len({getattr(member, key) for member in members}) != len(members):
            raise FederationError(f"two members of the roster have the same {key}")
    return Roster(federation, serial, members)


def _check_member(member: Member) -> None:
    """Refuses a member with a value out of its range."""
    check_count("client", member.client, 0, MOST_CLIENT)
    if type(member.node_key) is not str or not 1 <= len(member.node_key) <= _LONGEST_NODE_KEY:
        raise FederationError(f"node_key must be a text of 1 to {_LONGEST_NODE_KEY} characters")
    if type(member.ledger_key) is not str or not re.fullmatch("[0-9a-f]{64}", member.ledger_key):
        raise FederationError("ledger_key must have 64 hexadecimal digits")
    try:
        read_public_key(member.ledger_key)
    except LedgerError as error:
        raise FederationError(str(error)) from error


def _signed_values(roster: Roster) -> dict[str, Any]:
    """The values that the authority signs."""
    members = [asdict(member) for member in roster.members]
    return {
        "purpose": _PURPOSE,
        "federation": roster.federation,
        "serial": roster.serial,
        "members": members,
    }


def _canonical(values: dict[str, Any]) -> bytes:
    """The only encoding of a list."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
