"""A node's connection to its server: Flower's Fleet API, with a limit on every answer.

Formal guarantees:
    * An answer is read up to the limit of its call and no further: 6 MiB for a piece of a message,
      11 MiB for an application bundle, 1 MiB for everything else, and ten minutes for each.
    * No redirect is followed and no compressed answer is unpacked.
    * No answer of a server ends or interrupts this process: it becomes an exception, whose text is
      bounded. No answer to a heartbeat ends the heartbeats.
"""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from typing import Any, cast

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from flwr.common.serde import fab_from_proto, message_from_proto, message_to_proto, run_from_proto
from flwr.proto import fleet_pb2, heartbeat_pb2, run_pb2
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.error import FlowerError
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable import inflatable_protobuf_utils as objects
from flwr.supercore.interceptors.http.utils import add_headers
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedslm.deployment.certificates import with_clock
from fedslm.errors import FederationError

logger = logging.getLogger(__name__)
_MIB = 1 << 20
_MOST_BYTES = {"PullObject": 6 * _MIB, "GetFab": 11 * _MIB}  # a piece is 5 MiB, a bundle 10 MB at most
_USUAL_BYTES = _MIB
_READ_SECONDS, _WHOLE_SECONDS = 30.0, 600.0
_LONGEST_TEXT = 200
UNKNOWN_KEY = "the server does not know this node's key: it was revoked, or never admitted"
_TOO_MUCH_SECONDS = 240.0  # the server refuses a difference of five minutes
_OF_A_RUN = {"PullObject", "PushObject", "PushMessages", "GetRun", "GetFab", "ConfirmMessageReceived"}


class NotKnown(FederationError):
    """The server does not know this node's key, or refuses the time of its signature."""


class _Bounded:
    """Sends a request instead of Flower's client, and reads the answer up to its limit."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self.client = httpx.Client(verify=context, timeout=_READ_SECONDS, follow_redirects=False)
        self._version = dict(RuntimeVersionMetadata.from_local_component("SuperNode").as_metadata())

    def intercept(self, context: ProtobufRequestContext, _: ProtobufCall) -> httpx.Response:
        """Sends the request.

        Raises:
            NotKnown: The server does not know the key.
            FederationError: The answer is too long, is compressed, or is an error.
            RunNotRunningException: The run is over.
            httpx.TransportError: The connection broke, or the server is not ready.
        """
        name = context.rpc_method.rpartition("/")[2]
        context.request.headers["accept-encoding"] = "identity"
        add_headers(context.request, self._version)
        response = self.client.send(context.request, stream=True)
        try:
            content = _read(response, _MOST_BYTES.get(name, _USUAL_BYTES), name)
        finally:
            response.close()
        if response.status_code == httpx.codes.UNAUTHORIZED:
            raise NotKnown(_why_refused(response.headers.get("date", "")))
        _check_status(response.status_code, content, name)
        return httpx.Response(200, content=content, request=context.request)


def _read(response: httpx.Response, most: int, name: str) -> bytes:
    """The content of an answer; refuses one that is too long or takes too long."""
    if response.headers.get("content-encoding", "identity") != "identity":
        raise FederationError(f"the server's answer to {name} is compressed")
    content, until = bytearray(), time.monotonic() + _WHOLE_SECONDS
    for piece in response.iter_raw():
        if len(content) + len(piece) > most:
            raise FederationError(f"the server's answer to {name} has more than {most} bytes")
        if time.monotonic() > until:
            raise httpx.ReadTimeout(f"the answer to {name} took more than {_WHOLE_SECONDS:g} s")
        content += piece
    return bytes(content)


def _check_status(status: int, content: bytes, name: str) -> None:
    """Turns an error of the server into an exception."""
    if status == httpx.codes.OK:
        return
    if status == httpx.codes.FORBIDDEN and name in _OF_A_RUN and _is_flowers(content):
        raise RunNotRunningException
    if status >= httpx.codes.INTERNAL_SERVER_ERROR:
        raise httpx.RemoteProtocolError(f"the server answers {status} to {name}")
    said = content[:_LONGEST_TEXT].decode("utf-8", "replace")
    raise FederationError(f"the server answers {status} to {name}: {said!r}")


def _is_flowers(content: bytes) -> bool:
    """Whether an error has the format of Flower's errors."""
    try:
        return FlowerError.from_json(content.decode("utf-8", "replace")) is not None
    except (ValueError, RecursionError):  # the server may send anything
        return False


def _why_refused(date: str) -> str:
    """Why the server does not accept a signature: its time is wrong, or its key is unknown.

    Args:
        date: The time of the server's clock, from its answer.
    """
    try:
        skew = time.time() - parsedate_to_datetime(date).timestamp()
    except (ValueError, OverflowError):
        skew = 0.0
    if abs(skew) > _TOO_MUCH_SECONDS:
        return f"the server refuses this node: this clock is {skew:+.0f} s off; set it by NTP"
    return UNKNOWN_KEY


@contextmanager
def _client(
    address: str, authority: bytes, key: ec.EllipticCurvePrivateKey
) -> Iterator[FleetHttpClient]:
    """Creates Flower's client, with signed requests and bounded answers."""
    context = ssl.create_default_context(cadata=authority.decode("ascii"))
    bounded = _Bounded(context)
    interceptors: list[Any] = [NodeAuthHttpInterceptor(key, key.public_key()), bounded]
    with (
        bounded.client,
        FleetHttpClient(f"https://{address}", interceptors=interceptors, verify=context) as client,
    ):
        yield client


def check_key(address: str, authority: bytes, key: ec.EllipticCurvePrivateKey, node_id: int) -> None:
    """Returns if the server knows a node's key; changes nothing at the server.

    It requests a run that does not exist. The SuperLink checks the key first, and answers a known key
    with a different error.

    Args:
        address: Host and port.
        authority: Certificate of the server's authority, PEM.
        key: The node's key.
        node_id: The node's number at the SuperLink.

    Raises:
        NotKnown: The server does not know it, or this machine's clock is wrong.
        FederationError: The server cannot be asked now, or has another certificate.
    """
    with _client(address, authority, key) as client:
        try:
            client.GetRun(run_pb2.GetRunRequest(node=Node(node_id=node_id), run_id=0))
        except RunNotRunningException:
            return
        except httpx.TransportError as error:
            text = f"{address} does not say whether it knows this key: {with_clock(error)}"
            raise FederationError(text) from error
    raise FederationError(f"{address} does not say whether it knows this key: it found a run 0")


def step_in(address: str, authority: bytes, key: ec.EllipticCurvePrivateKey, node_id: int) -> None:
    """Makes the server forget an earlier process of this node, which was killed without signing off.

    Otherwise the server takes the node for connected, refuses it, and waits for its answers, for a
    minute. The server's response does not matter: the following connection reports any problem.

    Args:
        address: Host and port.
        authority: Certificate of the server's authority, PEM.
        key: The node's key.
        node_id: The node's number at the SuperLink.
    """
    with _client(address, authority, key) as client:
        _say_goodbye(client, node_id)


@contextmanager
def connected(
    address: str, authority: bytes, key: ec.EllipticCurvePrivateKey
) -> Iterator[tuple[int, tuple[Callable[..., Any], ...]]]:
    """Connects to a SuperLink, and stays connected by heartbeats.

    Args:
        address: Host and port.
        authority: Certificate of the server's authority, PEM.
        key: The node's key.

    Yields:
        The node's number, and the functions of :class:`Calls`, from which a
        :class:`fedslm.deployment.link.Link` is made.

    Raises:
        NotKnown: The server does not know the key.
        FederationError: It refuses the node, or has another certificate.
        httpx.TransportError: It cannot be reached.
    """
    with _client(address, authority, key) as client:
        public = public_key_to_bytes(key.public_key())
        try:
            answer = client.ActivateNode(
                fleet_pb2.ActivateNodeRequest(
                    public_key=public, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL
                )
            )
        except httpx.ConnectError as error:
            if "certificate" in str(error).lower():
                raise FederationError(f"{address} is not trusted: {with_clock(error)}") from error
            raise
        calls = Calls(client, Node(node_id=answer.node_id))
        heartbeats = HeartbeatSender(calls.heartbeat)
        heartbeats.start()
        try:
            yield answer.node_id, calls.functions
        finally:
            if heartbeats.is_running:
                heartbeats.stop()
            _say_goodbye(client, answer.node_id)


def _say_goodbye(client: FleetHttpClient, node_id: int) -> None:
    """Tells the server that the node disconnects; the server's response does not matter."""
    with suppress(httpx.HTTPError, FederationError, RuntimeError, ValueError):
        client.DeactivateNode(fleet_pb2.DeactivateNodeRequest(node_id=node_id))


class Calls:
    """The calls of a node to its server.

    Args:
        client: A connection.
        node: The node's number.
    """

    def __init__(self, client: FleetHttpClient, node: Node) -> None:
        self._client, self._node = client, node

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """The functions in the order of Flower's own: :class:`Link` accepts either."""
        return (
            self.receive,
            self.send,
            self.get_run,
            self.get_fab,
            self.pull_object,
            self.push_object,
            self.confirm,
        )

    def heartbeat(self) -> bool:
        """Sends a heartbeat; False if it should be repeated soon."""
        interval = HEARTBEAT_DEFAULT_INTERVAL
        request = heartbeat_pb2.SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=interval)
        try:
            return bool(self._client.SendNodeHeartbeat(request).success)
        except NotKnown:
            return True  # the request for messages fails too, and ends the connection
        except Exception as error:  # on any answer: without heartbeats the node is offline
            logger.debug("a heartbeat failed: %s", error)
            return False

    def receive(self) -> tuple[Any, Any] | None:
        """The next message's outline and its object tree; None if there is no message.

        Raises:
            FederationError: The server returns more than one, or one without its objects.
        """
        answer = self._client.PullMessages(fleet_pb2.PullMessagesRequest(node=self._node))
        messages, trees = answer.messages_list, answer.message_object_trees
        if not messages:
            return None
        if (len(messages), len(trees)) != (1, 1):
            raise FederationError(f"the server gives {len(messages)} messages and {len(trees)} trees")
        return message_from_proto(messages[0]), trees[0]

    def send(self, message: Any, tree: Any, seconds: float) -> tuple[set[str], str]:
        """Sends a reply's outline; returns the objects that the server lacks, and the upload's name."""
        answer = self._client.PushMessages(
            fleet_pb2.PushMessagesRequest(
                node=self._node,
                messages_list=[message_to_proto(message)],
                message_object_trees=[tree],
                clientapp_runtime_list=[seconds],
            )
        )
        return set(answer.objects_to_push), answer.session_id

    def get_run(self, run_id: int) -> Any:
        """Requests the description of a run."""
        answer = self._client.GetRun(run_pb2.GetRunRequest(node=self._node, run_id=run_id))
        return run_from_proto(answer.run)

    def get_fab(self, fab_hash: str, run_id: int) -> Any:
        """Requests a run's application bundle."""
        request = GetFabRequest(node=self._node, hash_str=fab_hash, run_id=run_id)
        return fab_from_proto(self._client.GetFab(request).fab)

    def pull_object(self, run_id: int, object_id: str) -> bytes:
        """Requests one object of a message."""
        pull = objects.make_pull_object_fn_protobuf(self._client.PullObject, self._node, run_id)
        return pull(object_id)

    def push_object(self, run_id: int, session_id: str, object_id: str, content: bytes) -> None:
        """Sends one object of a reply."""
        push = objects.make_push_object_fn_protobuf(
            self._client.PushObject, self._node, run_id, session_id
        )
        push(object_id, content)

    def confirm(self, run_id: int, object_id: str) -> None:
        """Confirms that a message was received."""
        confirm = objects.make_confirm_message_received_fn_protobuf(
            cast(Any, self._client.ConfirmMessageReceived), self._node, run_id
        )
        confirm(object_id)
