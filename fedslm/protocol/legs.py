"""The legs of secure aggregation as parts of ordinary requests and replies.

A leg's request is a :class:`fedslm.protocol.messages.Request` with one more value, which the protocol's
own code reads (:mod:`fedslm.secagg`). So a leg is signed, admitted and bounded as any other request.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedslm.errors import FederationError
from fedslm.secagg.kept import LEGS
from fedslm.secagg.roster import MOST_BYTES

SECAGG = "query.secagg"
"""Flower's message type of all legs but the one in which clients train."""
MOST_BODY, MOST_ANSWER = 1 << 18, 1 << 16
_LEG, BODY, _ROSTER = "leg", "body", "roster"
LEG_VALUES = (_LEG, BODY, _ROSTER)


@dataclass(frozen=True)
class Leg:
    """What one leg asks of one client.

    Attributes:
        name: One of ``LEGS``.
        body: The protocol's request; at most ``MOST_BODY`` bytes.
        roster: The signed list of admitted nodes; only in the first leg.
    """

    name: str
    body: bytes
    roster: str = ""

    def values(self) -> dict[str, str | bytes]:
        """What a request has for it."""
        return {_LEG: self.name, BODY: self.body, _ROSTER: self.roster}

    @property
    def num_bytes(self) -> int:
        """Bytes that a client downloads for it."""
        return len(self.body) + len(self.roster)


def leg_of(values: Mapping[str, Any]) -> Leg | None:
    """The leg of a request; None if it has none.

    Raises:
        FederationError: A value is missing or out of bounds.
    """
    if not set(LEG_VALUES) & set(values):
        return None
    name, roster = values.get(_LEG), values.get(_ROSTER)
    if name not in LEGS or type(name) is not str:
        raise FederationError(f"leg must be one of {', '.join(LEGS)}")
    if type(roster) is not str or len(roster) > MOST_BYTES:
        raise FederationError(f"roster must be a text of at most {MOST_BYTES} characters")
    return Leg(name, body_of(values, MOST_BODY), roster)


def body_of(values: Mapping[str, Any], most: int) -> bytes:
    """Reads the protocol's part of a request or a reply; empty if there is none.

    Raises:
        FederationError: It is not bytes, or more than ``most``.
    """
    body = values.get(BODY, b"")
    if type(body) is not bytes or len(body) > most:
        raise FederationError(f"body must be at most {most} bytes")
    return body
