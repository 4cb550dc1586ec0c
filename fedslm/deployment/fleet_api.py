"""The calls that a node may make to the SuperLink, and the maximum size of each request.

The proxy and the guard use the same table: a path that is not in it does not exist for a node.
"""

from __future__ import annotations

MIB = 1024 * 1024
PIECE_BYTES = 5 * MIB  # Flower sends tensors in pieces of this size
MOST_REQUEST_BYTES = PIECE_BYTES + 64 * 1024  # one piece and the other fields of its request
MOST_RECORDS = 8  # a reply has five objects besides the pieces of its tensors
DEEPEST = 5  # message, its content, a record, an array, a piece
_SMALL_BYTES, _BYTES_PER_OBJECT = 64 * 1024, 80

ACTIVATE, DEACTIVATE = "/v1/fleet/activate-node", "/v1/fleet/deactivate-node"
HEARTBEAT = "/v1/fleet/send-node-heartbeat"
PULL_MESSAGES, PUSH_MESSAGES = "/v1/fleet/pull-messages", "/v1/fleet/push-messages"
PULL_OBJECT, PUSH_OBJECT = "/v1/fleet/pull-object", "/v1/fleet/push-object"
CONFIRM = "/v1/fleet/confirm-message-received"
GET_RUN, GET_BUNDLE = "/v1/fleet/get-run", "/v1/fleet/get-fab"
PATHS = (
    *(ACTIVATE, DEACTIVATE, HEARTBEAT, PULL_MESSAGES, PUSH_MESSAGES),
    *(PULL_OBJECT, PUSH_OBJECT, CONFIRM, GET_RUN, GET_BUNDLE),
)
REFUSED_PATHS = ("/v1/fleet/register-node", "/v1/fleet/unregister-node")
"""Paths that Flower knows as well; no node may admit or revoke another."""


def most_objects(message_mb: int) -> int:
    """Number of objects of the largest reply: its records, and one for each piece of its tensors.

    >>> most_objects(1024)
    213
    """
    return MOST_RECORDS + -(-message_mb * MIB // PIECE_BYTES)


def most_bytes(path: str, message_mb: int) -> int:
    """Largest size of a request's body.

    >>> most_bytes(PUSH_OBJECT, 1024) - PIECE_BYTES, most_bytes(PULL_MESSAGES, 1024)
    (65536, 65536)
    """
    if path == PUSH_OBJECT:
        return MOST_REQUEST_BYTES
    if path == PUSH_MESSAGES:
        return _SMALL_BYTES + _BYTES_PER_OBJECT * most_objects(message_mb)
    return _SMALL_BYTES
