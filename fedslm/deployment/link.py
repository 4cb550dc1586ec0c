"""A node's side of Flower's Fleet API: messages in, replies out, over TLS and with the node's key.

It stands in place of Flower's SuperNode and its launcher. Whatever application bundle the server sends,
no code of it is run: the bundle's hash is computed here and held against the approved ones, and the
message goes to this node's own fedslm, in a worker that keeps its base model.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Error, Message

import fedslm
from fedslm.deployment.bundle import sha256_of

logger = logging.getLogger(__name__)
_NOT_APPROVED, _LONGEST = 7, 32
Answer = Callable[[Message, int], Message]


@dataclass
class Link:
    """A connection to a SuperLink.

    Attributes:
        node_id: The node's number there.
        calls: Flower's functions for one node: receive, send, get_run, get_fab, pull_object,
            push_object, confirm.
        approved: Hashes of the application bundles whose messages are answered.
    """

    node_id: int
    calls: tuple[Any, ...]
    approved: frozenset[str]
    _bundles: dict[int, tuple[str, str]] = field(default_factory=dict)

    def serve(self, answer: Answer, stop: threading.Event, poll_seconds: float) -> None:
        """Answers messages, one at a time, until it is told to stop.

        Args:
            answer: Turns (message, run) into its reply; raises nothing.
            stop: Set to end.
            poll_seconds: How long to wait when there is nothing to do.
        """
        while not stop.is_set():
            if not self._serve_one(answer):
                stop.wait(poll_seconds)

    def _serve_one(self, answer: Answer) -> bool:
        """Receives, answers and sends one message; False if there was none that could be answered."""
        from flwr.supercore.run import RunNotRunningException

        try:
            found = self._received()
            if found is None:
                return False
            message, run_id = found
            self._send(self._refused(message, run_id) or answer(message, run_id), run_id)
        except RunNotRunningException:  # Flower's own; it passes by Exception
            logger.warning("a message is dropped: its run is over")
            return False
        except Exception:  # the server is outside: whatever comes from it, the node goes on
            logger.exception("a message could not be received, or its reply not be sent")
            return False
        return True

    def _received(self) -> tuple[Message, int] | None:
        """The next message, whole."""
        from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree

        receive, _, _, _, pull_object, _, confirm = self.calls
        received = receive()
        if received is None:
            return None
        outline, tree = received
        run_id = outline.metadata.run_id
        message = pull_and_inflate_object_from_tree(
            tree,
            lambda identifier: pull_object(run_id, identifier),
            lambda identifier: confirm(run_id, identifier),
            return_type=Message,
        )
        message.metadata.__dict__["_message_id"] = tree.object_id
        return message, run_id

    def _refused(self, message: Message, run_id: int) -> Message | None:
        """The answer to a message of a bundle that is not approved; None if it is."""
        if run_id not in self._bundles:
            _, _, get_run, get_fab, _, _, _ = self.calls
            run = get_run(run_id)
            content = get_fab(run.fab_hash, run_id).content
            self._bundles = {run_id: (sha256_of(content), str(run.fab_version)[:_LONGEST])}
        found, version = self._bundles[run_id]
        if found in self.approved:
            return None
        reason = (
            f"the application bundle {found[:16]} (it says fedslm {version!r}) is not approved by this "
            f"node's operator; this node runs fedslm {fedslm.__version__}"
        )
        logger.error("run %d is refused: %s; its whole hash is %s", run_id, reason, found)
        return Message(Error(code=_NOT_APPROVED, reason=reason), reply_to=message)

    def _send(self, reply: Message, run_id: int) -> None:
        """Sends a reply and its objects."""
        from flwr.app.message import remove_content_from_message
        from flwr.supercore.inflatable.inflatable_object import (
            get_all_nested_objects,
            get_object_tree,
            no_object_id_recompute,
        )
        from flwr.supercore.inflatable.inflatable_utils import push_objects

        _, send, _, _, _, push_object, _ = self.calls
        reply.metadata.__dict__["_message_id"] = reply.object_id
        with no_object_id_recompute():
            wanted, session = send(remove_content_from_message(reply), get_object_tree(reply), 0.0)
            push_objects(
                get_all_nested_objects(reply),
                lambda identifier, content: push_object(run_id, session, identifier, content),
                object_ids_to_push=wanted,
            )


@contextmanager
def connected(
    address: str, authority: bytes, key: ec.EllipticCurvePrivateKey, approved: frozenset[str]
) -> Iterator[Link]:
    """Connects to a SuperLink, and stays known there by heartbeats; waits while it is not there.

    Args:
        address: Host and port.
        authority: The certificate that the server is known by, PEM.
        key: The node's key.
        approved: Hashes of approved bundles.
    """
    from flwr.supernode.fleet_http_connection import http_request_response

    with http_request_response(
        address,
        insecure=False,
        root_certificates=authority,
        authentication_keys=(key, key.public_key()),
    ) as (node_id, *calls):
        yield Link(node_id, tuple(calls), approved)
