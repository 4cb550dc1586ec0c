"""A node's way to its server: whether it is there, and how long a broken connection is tried again."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from fedslm.deployment import authority, link


@contextmanager
def listening(context: ssl.SSLContext | None) -> Iterator[str]:
    """A port that speaks TLS, or (None) hangs up on whoever comes; gives its address."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with suppress(OSError):
            while True:
                taken, _ = listener.accept()
                with suppress(OSError), taken:
                    if context is not None:
                        context.wrap_socket(taken, server_side=True).close()

    threading.Thread(target=serve, daemon=True).start()
    with listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def certified(directory: Path) -> tuple[str, ssl.SSLContext]:
    """An authority, and a server's side of TLS that it vouches for."""
    directory.mkdir()
    authority.create_authority(directory, "t", 2)
    authority.issue_server(directory, ["127.0.0.1"], 2)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / authority.SERVER, directory / authority.SERVER_KEY)
    return (directory / authority.AUTHORITY).read_text(), context


def test_whether_a_server_is_there(tmp_path: Path) -> None:
    """One that speaks TLS is, whoever vouches for it; a closed port and one that hangs up are not."""
    own, context = certified(tmp_path / "own")
    _, stranger = certified(tmp_path / "stranger")
    for spoken, is_there in ((context, True), (stranger, True), (None, False)):
        with listening(spoken) as address:
            assert link.is_there(address, own) is is_there
    assert not link.is_there(address, own)
    assert not link.is_there("nowhere.invalid:443", own)


def test_a_broken_connection_is_tried_again() -> None:
    """With longer and longer waits, until the call works; not beyond its time; another error is not tried."""
    waits: list[float] = []
    errors: list[Exception] = [httpx.ReadError("cut"), httpx.ConnectError("[SSL] cut")] * 4

    def call() -> str:
        if errors:
            raise errors.pop()
        return "here"

    def goes_on(seconds: float) -> bool:
        waits.append(seconds)
        return True

    patience = link.Patience(time.time() + 3600, goes_on)
    assert patience.call(call) == "here"
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    errors.append(httpx.ReadError("cut"))
    with pytest.raises(httpx.ReadError):
        link.Patience(time.time() + 0.5, goes_on).call(call)
    errors.append(ValueError("something else"))
    with pytest.raises(ValueError, match="something else"):
        patience.call(call)


def test_a_node_that_is_to_stop_has_no_patience() -> None:
    """Whatever time the server gives a message: at most a day, and not beyond the node's own end."""
    calls = []

    def call() -> None:
        calls.append(1)
        raise httpx.ConnectError("nobody there")

    with pytest.raises(httpx.ConnectError):
        link.Patience(time.time() + 3600, lambda _: False).call(call)
    assert len(calls) == 1
    for ttl in (1e12, float("inf"), float("nan")):
        assert link.until_of(time.time(), ttl) <= time.time() + 86_400
    assert link.until_of(100.0, 50.0) == 150.0
