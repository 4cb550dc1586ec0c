"""A node's side of Flower's Fleet API: messages in, replies out, over TLS and with the node's key.

It stands in place of Flower's SuperNode and its launcher. Whatever application bundle the server sends,
no code of it is run: the bundle's hash is computed here and held against the approved ones, and the
message goes to this node's own fedslm, in a worker that keeps its base model.
"""

from __future__ import annotations

import logging
import math
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Error, Message

import fedslm
from fedslm.deployment.bundle import sha256_of
from fedslm.errors import FederationError

logger = logging.getLogger(__name__)
_NOT_APPROVED, _LONGEST = 7, 32
_SHORTEST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.1, 30.0
_REACH_SECONDS, _DAY_SECONDS = 10.0, 86_400.0
_FETCHED_SECONDS = 5.0  # the server asks for replies every second or two
Answer = Callable[[Message, int], Message]
GoesOn = Callable[[float], bool]
T = TypeVar("T")


@dataclass
class Link:
    """A connection to a SuperLink.

    Attributes:
        node_id: The node's number there.
        calls: Flower's functions for one node: receive, send, get_run, get_fab, pull_object,
            push_object, confirm.
        approved: Hashes of the application bundles whose messages are answered.
        most_bytes: Largest message.
    """

    node_id: int
    calls: tuple[Any, ...]
    approved: frozenset[str]
    most_bytes: int
    _bundles: dict[int, tuple[str, str]] = field(default_factory=dict)
    _replied: float | None = None

    def serve(self, answer: Answer, goes_on: GoesOn, poll_seconds: float) -> None:
        """Answers messages, one at a time, until it is told to stop; a message under way is finished.

        The last reply has a few seconds to be fetched before this returns: Flower's server gives no
        reply of a node that it knows to be gone, but an error in its place.

        A message's tensors come and go in pieces of 5 MiB. If the connection breaks, it is tried again
        until the message is of no use any more, and what is here already is not pulled again. (One gap
        is Flower's: the server gives a message's outline out once, and the few bytes may be lost.)

        Args:
            answer: Turns (message, run) into its reply; raises nothing.
            goes_on: Waits for so many seconds, or shorter; False to end.
            poll_seconds: How long to wait, at most, when there is nothing to do: a server that just got
                an answer is likely to ask again.
        """
        import httpx
        from flwr.supercore.run import RunNotRunningException

        wait_seconds, heard = 0.0, time.monotonic()
        while goes_on(wait_seconds):
            wait_seconds = poll_seconds
            try:
                if self._answered(answer, goes_on):
                    wait_seconds, heard = 0.0, time.monotonic()
                else:
                    idle_seconds = time.monotonic() - heard
                    wait_seconds = min(poll_seconds, max(_SHORTEST_WAIT_SECONDS, idle_seconds / 5))
            except RunNotRunningException:  # Flower's own; it passes by Exception
                logger.warning("a message is dropped: its run is over")
            except httpx.TransportError as error:
                logger.warning("the server cannot be reached: %s", error)
            except Exception:  # the server is outside: whatever comes from it, the node goes on
                logger.exception("a message could not be answered")
        if self._replied is not None:
            time.sleep(max(0.0, self._replied + _FETCHED_SECONDS - time.monotonic()))

    def _answered(self, answer: Answer, goes_on: GoesOn) -> bool:
        """Answers the next message; False if there is none."""
        received = self.calls[0]()
        if received is None:
            return False
        outline, tree = received
        outline.metadata.__dict__["_message_id"] = tree.object_id
        metadata = outline.metadata
        patience = Patience(until_of(metadata.created_at, metadata.ttl), goes_on)
        reply = patience.call(lambda: self._refused(outline, metadata.run_id))
        if reply is None:
            reply = answer(self._pulled(tree, metadata.run_id, patience), metadata.run_id)
        patience.call(lambda: self._send(reply, metadata.run_id))
        self._replied = time.monotonic()
        return True

    def _pulled(self, tree: Any, run_id: int, patience: Patience) -> Message:
        """A message with all its objects, if they are not too large."""
        from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree

        _, _, _, _, pull_object, _, confirm = self.calls
        pulled_bytes = 0

        def pull(identifier: str) -> bytes:
            nonlocal pulled_bytes
            content: bytes = patience.call(lambda: pull_object(run_id, identifier))
            pulled_bytes += len(content)
            if pulled_bytes > self.most_bytes:
                raise FederationError(f"a message has more than message_mb={self.most_bytes >> 20} MiB")
            return content

        message = pull_and_inflate_object_from_tree(
            tree,
            pull,
            lambda identifier: patience.call(lambda: confirm(run_id, identifier)),
            return_type=Message,
            initial_backoff=_SHORTEST_WAIT_SECONDS,  # the server tells of a message before all is there
        )
        message.metadata.__dict__["_message_id"] = tree.object_id
        return message

    def _refused(self, outline: Message, run_id: int) -> Message | None:
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
        return Message(Error(code=_NOT_APPROVED, reason=reason), reply_to=outline)

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


@dataclass(frozen=True)
class Patience:
    """How long a broken connection is tried again.

    Attributes:
        until: Time (seconds since 1970) after which it is of no use.
        goes_on: Waits for so many seconds, or shorter; False to give up.
    """

    until: float
    goes_on: GoesOn

    def call(self, call: Callable[[], T]) -> T:
        """Calls again while the connection breaks, or while a reply's upload has timed out.

        Flower tries most of it again by itself, but gives up where a connection breaks within TLS.

        Args:
            call: May be repeated.

        Raises:
            httpx.TransportError: There was no connection until then, or the node is to stop.
        """
        import httpx
        from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

        wait_seconds = 1.0
        while True:
            try:
                return call()
            except (httpx.TransportError, ObjectPushError) as error:
                if time.time() + wait_seconds > self.until:
                    raise
                logger.warning("the connection broke (%s); again in %g s", error, wait_seconds)
                if not self.goes_on(wait_seconds):
                    raise
                wait_seconds = min(2 * wait_seconds, _LONGEST_WAIT_SECONDS)


def until_of(created_at: float, ttl: float) -> float:
    """When a message is of no use any more: what the server says, but within a day.

    >>> until_of(time.time(), float("inf")) - time.time() <= 86400.0
    True
    """
    latest = time.time() + _DAY_SECONDS
    until = created_at + ttl
    return min(until, latest) if math.isfinite(until) else latest


def is_there(address: str, authority: str) -> bool:
    """Whether a server can be reached now: Flower's own call would wait for it, or end the process.

    One with a wrong certificate is there: that it is refused, whoever connects then says.

    Args:
        address: Host and port.
        authority: The certificate that the server is known by, PEM.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    context = ssl.create_default_context(cadata=authority)
    try:
        with (
            socket.create_connection((host, int(port)), _REACH_SECONDS) as plain,
            context.wrap_socket(plain, server_hostname=host),
        ):
            return True
    except ssl.SSLCertVerificationError:
        return True
    except OSError as error:
        logger.debug("%s cannot be reached: %s", address, error)
        return False


def step_in(address: str, authority: bytes, key: ec.EllipticCurvePrivateKey, node_id: int) -> None:
    """Has the server forget an earlier process of this node: one that was killed said no goodbye.

    Else the server takes the node for connected, refuses it, and waits for its answers, for a minute.
    What the server says to it does not matter: whoever connects then hears what is wrong.

    Args:
        address: Host and port.
        authority: The certificate that the server is known by, PEM.
        key: The node's key.
        node_id: The node's number at the SuperLink.
    """
    import httpx
    from flwr.proto.fleet_pb2 import DeactivateNodeRequest
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    interceptors: list[Any] = [
        RuntimeVersionHttpInterceptor(component_name="fedslm"),
        NodeAuthHttpInterceptor(key, key.public_key()),
    ]
    with (
        FleetHttpClient.from_server_address(
            address, insecure=False, root_certificates=authority, interceptors=interceptors
        ) as client,
        suppress(httpx.HTTPError, RuntimeError),
    ):
        client.DeactivateNode(DeactivateNodeRequest(node_id=node_id))


@contextmanager
def connected(
    address: str, authority: bytes, key: ec.EllipticCurvePrivateKey
) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Connects to a SuperLink, and stays known there by heartbeats; waits while it is not there.

    Args:
        address: Host and port.
        authority: The certificate that the server is known by, PEM.
        key: The node's key.

    Yields:
        The node's number, and Flower's functions for it: what a :class:`Link` is made of.
    """
    from flwr.supernode.fleet_http_connection import http_request_response

    with http_request_response(
        address,
        insecure=False,
        root_certificates=authority,
        authentication_keys=(key, key.public_key()),
    ) as (node_id, *calls):
        yield node_id, tuple(calls)
