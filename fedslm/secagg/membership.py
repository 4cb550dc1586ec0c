"""A node's place in secure aggregation: the authority that it trusts, its roster, and its session.

place/roster-authority.pem   the authority's public key
place/signed-roster.json     the newest roster that the node accepted
place/session                random text of the node's process

The place is the node's own directory. The nodes of a simulation have one together, and an authority
that was made for it.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedslm import layout
from fedslm.errors import FederationError, PolicyRefused
from fedslm.secagg.cohort import Requirements
from fedslm.secagg.kept import Kept
from fedslm.secagg.node import Node
from fedslm.secagg.roster import MOST_BYTES, Member, Roster, accepted, signed_roster, verified
from fedslm.storage import read_text, write_text

_MOST_PEM_BYTES, _MOST_SESSION_BYTES = 1 << 12, 64


def begin_session(place: Path, authority: ec.EllipticCurvePublicKey) -> None:
    """Notes that the node's process has started; what it began before, it only repeats.

    Args:
        place: The node's directory.
        authority: The public key of the federation's authority, from the node's admission.

    Raises:
        RunError: A file cannot be written.
    """
    note_authority(place, authority)
    write_text(place / layout.SESSION, secrets.token_hex(16))


def note_authority(place: Path, authority: ec.EllipticCurvePublicKey) -> None:
    """Notes whose signature a roster must have.

    Raises:
        RunError: The file cannot be written.
    """
    pem = authority.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    write_text(place / layout.ROSTER_AUTHORITY, pem.decode())


def begin_simulation(place: Path, ledger_keys: Mapping[int, str]) -> Roster:
    """Makes an authority for a simulation, and signs a roster of all its clients.

    Args:
        place: The directory above those of the simulated nodes.
        ledger_keys: Client to its ledger's public key, hexadecimal.

    Raises:
        RunError: A file cannot be written.
    """
    authority = ec.generate_private_key(ec.SECP384R1())
    members = [Member(client, f"simulated {client}", key) for client, key in ledger_keys.items()]
    text = signed_roster(authority, "simulation", 0, members)
    begin_session(place, authority.public_key())
    write_text(place / layout.SIGNED_ROSTER, text)
    return verified(text, authority.public_key())


def roster_at(place: Path) -> Roster:
    """The roster that a node accepted last.

    Raises:
        FederationError: There is none, or a file cannot be read.
        Refused: It is not signed by the authority.
    """
    try:
        return verified(read_text(place / layout.SIGNED_ROSTER, MOST_BYTES), _authority(place))
    except (OSError, ValueError) as error:
        raise FederationError(
            "this node has no roster yet: it comes with the first leg of a round"
        ) from error


def accept(place: Path, text: str) -> Roster:
    """Reads a roster that the server sent, and keeps it if it is newer than the one before.

    Raises:
        FederationError: It cannot be read, or this node does not know the authority.
        Refused: It was not signed by the authority, or is older than the kept one.
        RunError: The kept roster cannot be read or written.
    """
    return accepted(place / layout.SIGNED_ROSTER, text, _authority(place))


def member(
    place: Path, own: Path, run: str, *, key: Ed25519PrivateKey, requirements: Requirements
) -> Node:
    """A node's side of the protocol in one run.

    Args:
        place: Where its roster and its session are.
        own: Its own directory.
        run: Identifier of the run.
        key: Its ledger key.
        requirements: What it requires of a cohort.

    Raises:
        FederationError: The node has no roster.
        PolicyRefused: No process of this node has begun a session.
        Refused: The roster is not signed by the authority.
    """
    return Node(key, roster_at(place), requirements, Kept(own, run, _session(place)))


def _session(place: Path) -> str:
    """The session of the node's process."""
    try:
        text = read_text(place / layout.SESSION, _MOST_SESSION_BYTES)
    except (OSError, ValueError):
        text = ""
    if not re.fullmatch("[0-9a-f]{32}", text):
        raise PolicyRefused(
            "this node has no session, so a restart could not be noticed: secure aggregation needs a "
            "node that `fedslm node up` runs"
        )
    return text


def _authority(place: Path) -> ec.EllipticCurvePublicKey:
    """The authority's public key."""
    try:
        pem = read_text(place / layout.ROSTER_AUTHORITY, _MOST_PEM_BYTES)
        key = serialization.load_pem_public_key(pem.encode())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise FederationError(
            "this node does not know the federation's authority: restart it with `fedslm node up`"
        ) from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise FederationError("the authority's key is not an elliptic-curve key")
    return key
