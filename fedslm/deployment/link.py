"""A node's side of Flower's Fleet API: messages in, replies out, over TLS and with the node's key.

It replaces Flower's SuperNode and its launcher. No code of an application bundle from the server is
ever run: the bundle's hash is computed here and checked against the approved ones, and the message goes
to this node's own fedslm, in a worker that keeps its base model.
"""

from __future__ import annotations

import hashlib
import logging
import math
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from flwr.app import Error, Message

import fedslm
from fedslm.deployment.bundle import sha256_of
from fedslm.deployment.certificates import certificate_at
from fedslm.deployment.fleet import NotKnown
from fedslm.errors import FederationError
from fedslm.protocol.inflating import Limits, inflated, objects_of
from fedslm.protocol.lifetime import DAY_SECONDS, work_seconds

logger = logging.getLogger(__name__)
_NOT_APPROVED, _LONGEST = 7, 32
_SHORTEST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.1, 30.0
_PIECE_BYTES = 5 << 20
_LATEST_SECONDS, _LONGEST_NAME = 1e11, 128
_METADATA = ("run_id", "src_node_id", "dst_node_id", "message_type", "group_id", "created_at", "ttl")
_FETCHED_SECONDS = 5.0  # the server asks for replies every second or two
Answer = Callable[[Message, int], Message]
GoesOn = Callable[[float], bool]
Leaves = Callable[[], bool]
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

    @property
    def limits(self) -> Limits:
        """Limits on a message: pieces of 5 MiB, and a few other objects."""
        return Limits(self.most_bytes, most_objects=min(4096, 64 + self.most_bytes // _PIECE_BYTES))

    def serve(
        self,
        answer: Answer,
        goes_on: GoesOn,
        poll_seconds: float,
        leaves: Leaves = lambda: True,
    ) -> None:
        """Answers messages one at a time until it is stopped; a message in progress is finished.

        After the last reply this waits a few seconds before it returns, so that the reply can be
        fetched: for a disconnected node, Flower's server returns an error instead of its reply.

        A message's tensors are transferred in pieces of 5 MiB. If the connection breaks, it is retried
        until the message has expired, and data that were already received are not pulled again. If a
        message's outline was lost in transit, the guard delivers it again.

        Args:
            answer: Turns (message, run) into its reply; raises nothing.
            goes_on: Waits for up to the given number of seconds; False to end.
            poll_seconds: Longest time to wait when there is nothing to do: a server that just got an
                answer is likely to send a request again.
            leaves: Waits until the reply may leave; False if it must not be sent. Called after each
                call of ``answer``, also if that raised.

        Raises:
            NotKnown: The server no longer knows this node's key.
        """
        import httpx
        from flwr.supercore.run import RunNotRunningException

        wait_seconds, heard, breaks = 0.0, time.monotonic(), 0
        while goes_on(wait_seconds):
            wait_seconds = poll_seconds
            try:
                if self._answered(answer, goes_on, leaves):
                    wait_seconds, heard = 0.0, time.monotonic()
                else:
                    idle_seconds = time.monotonic() - heard
                    wait_seconds = min(poll_seconds, max(_SHORTEST_WAIT_SECONDS, idle_seconds / 5))
                breaks = 0
            except RunNotRunningException:  # Flower's own; not a subclass of Exception
                logger.warning("a message is dropped: its run is over")
            except httpx.TransportError as error:
                level = logging.DEBUG if breaks else logging.WARNING
                logger.log(level, "the server cannot be reached: %s; trying again", error)
                wait_seconds = max(poll_seconds, min(2.0**breaks, _LONGEST_WAIT_SECONDS))
                breaks = min(breaks + 1, 5)
            except NotKnown:
                raise
            except FederationError as error:
                logger.warning("a message is refused: %s", error)
            except Exception:  # the server is untrusted: the node continues on any error
                logger.exception("a message could not be answered")
        if self._replied is not None:
            time.sleep(max(0.0, self._replied + _FETCHED_SECONDS - time.monotonic()))

    def _answered(self, answer: Answer, goes_on: GoesOn, leaves: Leaves = lambda: True) -> bool:
        """Answers the next message; False if there is none."""
        received = self.calls[0]()
        if received is None:
            return False
        outline, tree = received
        metadata = outline.metadata
        check_outline(outline)
        limits = self.limits
        identifiers = objects_of(tree, limits)
        metadata.__dict__["_message_id"] = tree.object_id
        patience = Patience(until_of(metadata.created_at, work_seconds(metadata.ttl)), goes_on)
        reply = patience.call(lambda: self._refused(outline, metadata.run_id))
        if reply is None:
            contents = self._pulled(identifiers, metadata.run_id, patience)
            patience.call(lambda: self.calls[6](metadata.run_id, tree.object_id))
            message = inflated(tree.object_id, contents, limits)
            _check_same(message, outline)
            try:
                reply = answer(message, metadata.run_id)
            finally:
                may_leave = leaves()
            if not may_leave:
                logger.warning("the node stops before its reply may leave; nothing is sent")
                return True
        patience.call(lambda: self._send(reply, metadata.run_id))
        self._replied = time.monotonic()
        return True

    def _pulled(self, identifiers: list[str], run_id: int, patience: Patience) -> dict[str, bytes]:
        """Pulls a message's objects; refuses them if they are too large together."""
        from flwr.supercore.inflatable.inflatable_utils import pull_objects

        pull_object = self.calls[4]
        pulled_bytes = 0

        def pull(identifier: str) -> bytes:
            nonlocal pulled_bytes
            content: bytes = patience.call(lambda: pull_object(run_id, identifier))
            pulled_bytes += len(content)
            if pulled_bytes > self.most_bytes:
                raise FederationError(f"a message has more than message_mb={self.most_bytes >> 20} MiB")
            if hashlib.sha256(content).hexdigest() != identifier:
                raise FederationError("an object of a message does not match its identifier")
            return content

        return pull_objects(
            identifiers,
            pull,
            initial_backoff=_SHORTEST_WAIT_SECONDS,  # the server announces a message early
        )

    def _refused(self, outline: Message, run_id: int) -> Message | None:
        """The error reply to a message of a bundle that is not approved; None if it is approved."""
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
    """Time limit for retries of a broken connection.

    Attributes:
        until: Time (seconds since 1970) after which retries stop.
        goes_on: Waits for up to the given number of seconds; False to give up.
    """

    until: float
    goes_on: GoesOn

    def call(self, call: Callable[[], T]) -> T:
        """Retries a call while the connection breaks, or while a reply's upload has timed out.

        Flower retries most failures itself, but gives up if a connection breaks within TLS.

        Args:
            call: May be repeated.

        Raises:
            httpx.TransportError: There was no connection until then, or the node must stop.
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


def check_outline(outline: Message) -> None:
    """Refuses a message whose metadata no honest server writes, before anything of it is pulled.

    Raises:
        FederationError: A time is not valid, a name is too long, or it already contains content.
    """
    metadata = outline.metadata
    times = {"created_at": metadata.created_at, "ttl": metadata.ttl}
    for key, value in times.items():
        if not (math.isfinite(value) and 0 < value <= _LATEST_SECONDS):
            raise FederationError(f"a message's {key}={value!r} must be in (0, {_LATEST_SECONDS:g}] s")
    for key in ("message_type", "group_id", "reply_to_message_id"):
        if len(getattr(metadata, key)) > _LONGEST_NAME:
            raise FederationError(f"a message's {key} is longer than {_LONGEST_NAME} characters")
    if outline.has_content() and len(outline.content):
        raise FederationError("a message's description contains records; they must be objects")


def _check_same(message: Message, outline: Message) -> None:
    """Refuses a message whose metadata differ from those of its outline.

    Its identifier is set to the outline's: the reply refers to it.
    """
    inner, outer = message.metadata, outline.metadata
    for key in _METADATA:
        if getattr(inner, key) != getattr(outer, key):
            raise FederationError(f"a message's {key} differs from its description's")
    inner.__dict__["_message_id"] = outer.message_id


def until_of(created_at: float, ttl: float) -> float:
    """When a message expires: the time that the server set, but within a day.

    >>> until_of(time.time(), float("inf")) - time.time() <= 86400.0
    True
    """
    latest = time.time() + DAY_SECONDS
    until = created_at + ttl
    return min(until, latest) if math.isfinite(until) else latest


def is_there(address: str, authority: str) -> bool:
    """Whether a server can be reached now: Flower's own call would wait for it, or end the process.

    A server with a wrong certificate counts as reachable: the connection attempt then reports it.

    Args:
        address: Host and port.
        authority: Certificate of the server's authority, PEM.
    """
    try:
        certificate_at(address, authority)
    except ssl.SSLCertVerificationError:
        return True
    except OSError as error:
        logger.debug("%s cannot be reached: %s", address, error)
        return False
    return True
