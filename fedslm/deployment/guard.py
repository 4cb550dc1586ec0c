"""Flower's SuperLink behind a guard.

Run as ``python -m fedslm.deployment.guard MESSAGE_MB flower-superlink``, and Flower's own arguments.
The guard is the outermost layer of the SuperLink's web application. Every request of a node passes
through it first; the Control and Runtime APIs, which nobody can reach through the proxy, are passed on
unchanged.

Formal guarantees, for every path below ``/v1/fleet`` (``tests/deployment/test_guard.py``):

- Only POST to one of ``fleet_api.PATHS``, spelt exactly so, reaches Flower.
- No byte of a body is read before its stated length is within ``fleet_api.most_bytes`` and the headers
  prove an admitted key: a signature over a time that is at most 305 seconds old. A revoked key is not
  admitted.
- A body is read up to its stated length and for at most ten minutes. Of one node at most eight objects,
  one message and eight other requests are read at a time.
- A body that reaches Flower complies with the rules of :mod:`fedslm.deployment.guard_rules`, and is
  unchanged.
- A node that asks for its next instruction gets one all of which has been uploaded, or whose upload was
  not finished within three minutes; if there is none, the guard answers so itself.
- A refusal that leaves a body unread closes the connection.
- If the guard itself fails, the request does not reach Flower.
"""

from __future__ import annotations

import asyncio
import binascii
import logging
import re
import sys
import time
from base64 import b64decode
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any

from fedslm.deployment import fleet_api
from fedslm.deployment.guard_records import Records
from fedslm.deployment.guard_rules import RULED, Refused, Rules
from fedslm.deployment.journal import JsonLines
from fedslm.errors import RunError

logger = logging.getLogger(__name__)
_BODY_SECONDS, _SAY_SECONDS, _REMEMBERED = 600.0, 10.0, 1000
_REQUESTS_PER_NODE, _MOST_FILES = 8, 16_384
_LONGEST_HEADER = 2048
_HOST = re.compile(rb"[A-Za-z0-9.:_\[\]-]{1,260}")
_LENGTH = re.compile(rb"[0-9]{1,12}")
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class Guard:
    """An ASGI application that passes only the allowed requests of nodes.

    Args:
        app: The SuperLink's application.
        records: The SuperLink's stored records.
        message_mb: Largest reply of a node, in MiB.
    """

    def __init__(self, app: App, records: Records, message_mb: int) -> None:
        self._app, self._records, self._message_mb = app, records, message_mb
        self._rules = Rules(records, message_mb)
        self._turns: dict[tuple[int, str], asyncio.Semaphore] = {}
        self._said: OrderedDict[tuple[str, str], tuple[float, int]] = OrderedDict()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
        elif scope["type"] != "http" or not scope["path"].lower().startswith("/v1/fleet"):
            await self._app(scope, receive, send)
        else:
            await self._guarded(scope, receive, send)

    async def _guarded(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answers a node, or a client that claims to be one."""
        who, is_read = str((scope.get("client") or ("?",))[0]), False
        try:
            length = self._length(scope)
            node = await asyncio.to_thread(self._authenticated, scope)
            who = f"node {node}"
            async with self._turn(node, scope["path"]):
                body = await _body(receive, length)
                is_read = True
                if scope["path"] in RULED:
                    await asyncio.to_thread(self._rules.check, scope["path"], body, node)
                if scope["path"] == fleet_api.PUSH_MESSAGES:
                    send = self._remembering(send, body, node)
                if await self._has_nothing_for(node, scope["path"]):
                    await _answer_nothing(send)
                else:
                    await self._app(scope, _again(body, receive), send)
        except Refused as refused:
            self._say(who, scope["path"], refused)
            await _answer(send, refused, is_last=not is_read)
        except _Gone:
            logger.debug("%s broke off", who)

    def _length(self, scope: Message) -> int:
        """Checks a request's first line and headers, and returns its stated length."""
        path = scope["path"]
        if path not in fleet_api.PATHS or scope.get("query_string") or scope.get("root_path"):
            raise Refused(404, "there is no such path for a node")
        if scope.get("raw_path", path.encode()) != path.encode():
            raise Refused(404, "a path is written without escapes")
        if scope["method"] != "POST":
            raise Refused(405, "a node sends POST requests")
        headers = scope["headers"]
        if not _HOST.fullmatch(_header(headers, b"host")):
            raise Refused(400, "the host header is not a host")
        if any(name == b"transfer-encoding" for name, _ in headers):
            raise Refused(411, "a body has a stated length")
        text = _header(headers, b"content-length")
        if not _LENGTH.fullmatch(text):
            raise Refused(411, "a body has a stated length")
        most = fleet_api.most_bytes(path, self._message_mb)
        if int(text) > most:
            raise Refused(413, f"a body of this path has at most {most} bytes")
        return int(text)

    def _authenticated(self, scope: Message) -> int:
        """The node whose key signed the time; needs nothing of the body."""
        from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
        from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
        from flwr.supercore.date import now
        from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature

        headers = scope["headers"]
        try:
            key = b64decode(_header(headers, FLEET_HTTP_PUBLIC_KEY_HEADER.encode()), validate=True)
            signature = b64decode(_header(headers, FLEET_HTTP_SIGNATURE_HEADER.encode()), validate=True)
            stamp = _header(headers, TIMESTAMP_HEADER.encode())
            age = (now() - datetime.fromisoformat(stamp.decode("ascii"))).total_seconds()
        except (ValueError, TypeError, binascii.Error, OverflowError) as error:
            raise Refused(401, "the headers do not name a node") from error
        if not key:
            raise Refused(401, "the headers do not name a node")
        node = self._records.node_of(key)
        if node is None:
            raise Refused(401, "the node's key is not admitted, or was revoked")
        if not -SYSTEM_TIME_TOLERANCE < age < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE:
            raise Refused(401, f"the node's clock and the server's differ by {abs(age):.0f} s; use NTP")
        if not verify_signature(bytes_to_public_key(key), stamp, signature):
            raise Refused(401, "the signature is not the node's")
        return node

    async def _has_nothing_for(self, node: int, path: str) -> bool:
        """True if a request asks for the next instruction, and none is to be given yet.

        Nearly all requests of connected nodes are these, every second or so for each node. Flower's own
        answer, through its layers and with a write to the database, takes twice the time or more. And
        it gives the instructions of a round to all nodes before the first object is uploaded: their
        requests for objects that are not there yet would compete with the upload.
        """
        if path != fleet_api.PULL_MESSAGES:
            return False
        return not await asyncio.to_thread(self._records.can_give, node)

    def _remembering(self, send: Send, body: bytes, node: int) -> Send:
        """Passes on Flower's answer to a pushed message, and records the session that it opens."""
        pieces: list[bytes] = []
        is_good = False

        async def remember(message: Message) -> None:
            nonlocal is_good
            if message["type"] == "http.response.start":
                is_good = message["status"] == 200
            else:
                pieces.append(message.get("body", b""))
                if is_good and not message.get("more_body", False):
                    self._rules.opened(body, b"".join(pieces), node)
            await send(message)

        return remember

    def _turn(self, node: int, path: str) -> asyncio.Semaphore:
        """The semaphore of a node's request before its body is read; large ones do not block others."""
        kind = path if path in (fleet_api.PUSH_OBJECT, fleet_api.PUSH_MESSAGES) else ""
        most = 1 if kind == fleet_api.PUSH_MESSAGES else _REQUESTS_PER_NODE
        return self._turns.setdefault((node, kind), asyncio.Semaphore(most))

    def _say(self, who: str, path: str, refused: Refused) -> None:
        """Logs a refusal; once in ten seconds for each sender and reason."""
        key, now = (who, refused.reason), time.monotonic()
        last, more = self._said.pop(key, (-_SAY_SECONDS, 0))
        is_due = now - last >= _SAY_SECONDS
        self._said[key] = (now, 0) if is_due else (last, more + 1)
        while len(self._said) > _REMEMBERED:
            self._said.popitem(last=False)
        if is_due:
            again = f" ({more} more before)" if more else ""
            logger.warning("%s: %r is refused: %s%s", who, path[:100], refused.reason, again)


def guarded(app: Any, message_mb: int) -> Guard:
    """Puts the guard around Flower's application.

    Args:
        app: The result of Flower's ``create_app``.
        message_mb: Largest reply of a node, in MiB.

    Raises:
        RunError: The guard does not support this version of Flower.
    """
    import flwr

    try:
        from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

        known = {path for _, path in PROTOBUF_REQUEST_TYPES if path.startswith("/v1/fleet/")}
        if known != {*fleet_api.PATHS, *fleet_api.REFUSED_PATHS}:
            raise ValueError(f"its Fleet API has the paths {sorted(known)}")
        records = Records(app.state.linkstate_factory.state())
        records.check()
        return Guard(app, records, message_mb)
    except Exception as error:  # on any error, the SuperLink must not start without its guard
        version = getattr(flwr, "__version__", "")
        raise RunError(
            f"flwr {version} is not as the guard knows it: {error}; install the version that "
            "constraints.txt names"
        ) from error


def main(arguments: Sequence[str]) -> None:
    """Runs the SuperLink until it is stopped.

    Args:
        arguments: The largest reply in MiB, the word ``flower-superlink``, and Flower's own arguments.
    """
    import uvicorn
    from flwr.supercore.http_logging import get_uvicorn_log_config
    from flwr.supercore.logger import console_handler
    from flwr.superlink.cli.flower_superlink import (
        SuperLinkLifespan,
        _parse_superlink_lifespan_config,
    )
    from flwr.superlink.main import create_app

    message_mb, *sys.argv = arguments  # Flower reads its arguments from there
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.getLogger("fedslm").addHandler(handler)
    _allow_files()
    config = _parse_superlink_lifespan_config()
    uvicorn.run(
        app=guarded(create_app(config, SuperLinkLifespan), int(message_mb)),
        host=config.host,
        port=config.port,
        access_log=True,
        log_config=get_uvicorn_log_config(console_handler.level),
        ssl_keyfile=config.ssl_keyfile,
        ssl_certfile=config.ssl_certfile,
        timeout_keep_alive=75,  # longer than the proxy keeps a connection: it closes first
        workers=1,
    )


class _Gone(Exception):
    """The other side closed the connection."""


async def _body(receive: Receive, length: int) -> bytes:
    """Reads a body of a stated length."""
    pieces, size, is_more = [], 0, True
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            while is_more:
                message = await receive()
                if message["type"] != "http.request":
                    raise _Gone
                pieces.append(message.get("body", b""))
                size, is_more = size + len(pieces[-1]), message.get("more_body", False)
                if size > length:
                    raise Refused(413, "the body is longer than its stated length")
    except TimeoutError as error:
        raise Refused(408, f"the body did not come within {_BODY_SECONDS:g} s") from error
    if size != length:
        raise Refused(400, "the body is shorter than its stated length")
    return b"".join(pieces)


def _again(body: bytes, receive: Receive) -> Receive:
    """Returns a body that was read already, and then all further messages."""
    waiting = [body]

    async def replay() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return replay


async def _answer(send: Send, refused: Refused, *, is_last: bool) -> None:
    """Answers with one line; the last answer closes the connection.

    A connection with an unread body cannot be reused. Uvicorn would keep its buffers (about 0.4 MB) for
    the whole keep-alive time if the other side then resets it.
    """
    body = f"{refused.reason}\n".encode()
    headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode())]
    headers += [(b"connection", b"close")] if is_last else []
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _answer_nothing(send: Send) -> None:
    """Answers with an empty protobuf message: there is no instruction."""
    headers = [(b"content-type", b"application/protobuf"), (b"content-length", b"0")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


def _header(headers: Sequence[tuple[bytes, bytes]], name: bytes) -> bytes:
    """A header that occurs once and is not long; otherwise empty."""
    found = [value for key, value in headers if key.lower() == name]
    return found[0] if len(found) == 1 and len(found[0]) <= _LONGEST_HEADER else b""


def _allow_files() -> None:
    """Raises this process's limit of open files to the maximum: each node keeps one connection."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    with suppress(OSError, ValueError):  # a service may forbid it: then fewer connections are possible
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


if __name__ == "__main__":
    main(sys.argv[1:])
