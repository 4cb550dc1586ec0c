"""The roster for secure aggregation: the admitted nodes, signed with the authority's key."""

from __future__ import annotations

import time
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from fedslm import layout
from fedslm.deployment.admission import admitted_nodes
from fedslm.deployment.authority import AUTHORITY, AUTHORITY_KEY, authority_of, public_key_of
from fedslm.deployment.settings import read_federation
from fedslm.errors import FederationError, Refused, Unusable
from fedslm.secagg.membership import note_authority, roster_at
from fedslm.secagg.roster import Member, Roster, signed_roster, verified
from fedslm.storage import write_text


def sign_roster(server: Path) -> Roster:
    """Signs the list of admitted nodes; each node gets it from the server, and checks the signature.

    A node's number is its position in the list, which no later admission or revocation changes.

    Args:
        server: The server's directory, or a copy of its list of nodes next to the authority's key.

    Raises:
        ConfigError: This is not a server's directory.
        RunError: The authority's key cannot be read, no node is admitted, or a file cannot be written.
    """
    federation = read_federation(server)
    key, _ = authority_of(server)
    members = [
        Member(number, node.node_key, node.ledger_key)
        for number, node in enumerate(admitted_nodes(server))
        if not node.revoked
    ]
    if not members:
        raise Unusable(f"{server} has admitted no node: there is nothing to sign")
    path = server / layout.SIGNED_ROSTER
    serial = int(time.time())  # later than any before, also if that one is not here
    try:
        note_authority(server, key.public_key())
        if path.exists():
            serial = max(serial, roster_at(server).serial + 1)
        text = signed_roster(key, federation.name, serial, members)
        roster = verified(text, key.public_key())
    except (FederationError, Refused) as error:
        raise Unusable(f"{path} cannot be made: {error}") from error
    write_text(path, text)
    return roster


def sign_if_possible(server: Path) -> Roster | None:
    """Signs the roster again after a change of the list of nodes; None if the key is kept elsewhere.

    Raises:
        RunError: As :func:`sign_roster`, but for a list without any node.
    """
    listed = any(not node.revoked for node in admitted_nodes(server))
    return sign_roster(server) if listed and (server / AUTHORITY_KEY).exists() else None


def know_authority(server: Path) -> None:
    """Lets a run of this server check the roster that it sends to nodes.

    Raises:
        RunError: The authority's certificate cannot be read.
    """
    note_authority(server, public_key(server / AUTHORITY))


def public_key(certificate: Path) -> ec.EllipticCurvePublicKey:
    """The authority's public key, from its certificate.

    Raises:
        RunError: It cannot be read, or is not an elliptic-curve key.
    """
    try:
        return public_key_of(certificate.read_bytes())
    except (OSError, ValueError) as error:
        raise Unusable(f"{certificate} is not an authority's certificate: {error}") from error
