"""A node's way to its server: whether it is there, and how long a broken connection is tried again."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from support.places import certified

import fedslm
from fedslm.deployment import bundle as bundles
from fedslm.deployment import link
from fedslm.deployment.bundle import sha256_of
from fedslm.engines.local import LocalGrid
from fedslm.errors import FederationError
from fedslm.workers import InlinePool


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


def message(**changes: object) -> Message:
    """What a server sends, with some of its metadata changed."""
    made = Message(RecordDict({"x": ConfigRecord({"a": 1})}), 2, "train", ttl=60.0, group_id="1")
    for key, value in changes.items():
        made.metadata.__dict__[f"_{key}"] = value
    return made


def node_with(
    inner: Message, outline: Message, most_bytes: int = 1 << 20, sent: list[str] | None = None
) -> link.Link:
    """A node whose server has one message, whose outline may say something else."""
    from flwr.app.message import remove_content_from_message
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

    objects = {key: each.deflate() for key, each in get_all_nested_objects(inner).items()}
    queue = [(remove_content_from_message(outline), get_object_tree(inner))]

    def send(*_: object) -> tuple[set[str], str]:
        if sent is not None:
            sent.append("send")
        return set(), "session"

    calls = (
        lambda: queue.pop() if queue else None,
        send,
        lambda _: SimpleNamespace(fab_hash="x", fab_version="1"),
        lambda *_: SimpleNamespace(content=b"bundle"),
        lambda _, identifier: objects[identifier],
        lambda *_: None,
        lambda *_: None,
    )
    return link.Link(2, calls, frozenset({sha256_of(b"bundle")}), most_bytes)


def answered(inner: Message, outline: Message, most_bytes: int = 1 << 20) -> list[Message]:
    """What a node takes of a server's message."""
    taken: list[Message] = []

    def answer(asked: Message, _: int) -> Message:
        taken.append(asked)
        return Message(RecordDict({}), reply_to=asked)

    node_with(inner, outline, most_bytes)._answered(answer, lambda _: True)
    return taken


def order_of(leaves: bool, *, raises: bool = False) -> list[str]:
    """What a node does with one message, in order; its reply may leave or not, or cannot be made."""
    done: list[str] = []
    asked = message()

    def answer(asked: Message, _: int) -> Message:
        done.append("answer")
        if raises:
            raise ValueError
        return Message(RecordDict({}), reply_to=asked)

    def may_leave() -> bool:
        done.append("wait")
        return leaves

    with suppress(ValueError):
        node_with(asked, asked, sent=done)._answered(answer, lambda _: True, may_leave)
    return done


def test_a_reply_waits_before_it_is_sent() -> None:
    """It is sent after the wait, or not at all; an answer that could not be made waits as well."""
    LocalGrid(1, InlinePool())
    assert order_of(True) == ["answer", "wait", "send"]
    assert order_of(False) == ["answer", "wait"]
    assert order_of(True, raises=True) == ["answer", "wait"]


WRONG_METADATA = {
    "ttl NaN": {"ttl": float("nan")},
    "ttl infinite": {"ttl": float("inf")},
    "ttl negative": {"ttl": -1.0},
    "ttl huge": {"ttl": 1e300},
    "created NaN": {"created_at": float("nan")},
    "created negative": {"created_at": -1.0},
    "created huge": {"created_at": 1e300},
    "long group": {"group_id": "x" * 129},
    "long type": {"message_type": "train." + "x" * 200},
    "long reply": {"reply_to_message_id": "x" * 129},
}


@pytest.mark.parametrize("changes", WRONG_METADATA.values(), ids=WRONG_METADATA)
def test_metadata_that_no_honest_server_writes(changes: dict[str, object]) -> None:
    """Times that are none and names that are too long: refused before anything is pulled or computed."""
    LocalGrid(1, InlinePool())  # tells Flower who sends
    with pytest.raises(FederationError, match="a message's"):
        answered(message(**changes), message(**changes))


def test_a_message_is_what_its_outline_says() -> None:
    """An honest one is taken, by its outline's identifier; one that says something else is refused."""
    LocalGrid(1, InlinePool())
    honest = message()
    (taken,) = answered(honest, honest)
    assert taken.metadata.message_id == honest.object_id
    for changes in ({"ttl": 61.0}, {"group_id": "2"}, {"dst_node_id": 3}, {"message_type": "evaluate"}):
        other = message(created_at=honest.metadata.created_at, **changes)
        with pytest.raises(FederationError, match="differs from its description"):
            answered(other, honest)


def test_objects_are_held_to_the_largest_message() -> None:
    """Beyond message_mb nothing more is pulled, and objects are what their identifiers say."""
    LocalGrid(1, InlinePool())
    large = message()
    large.content["y"] = ArrayRecord({"a": Array("uint8", (3 << 20,), "safetensors", bytes(3 << 20))})
    with pytest.raises(FederationError, match="more than message_mb=1 MiB"):
        answered(large, large)
    assert len(answered(large, large, 4 << 20)) == 1


def test_a_bundle_of_another_version_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server of another version alone sends a bundle that no node of this one has approved."""
    usual = bundles.bundle()
    monkeypatch.setattr(fedslm, "__version__", "0.0.9")
    bundles.bundle.cache_clear()
    try:
        assert sha256_of(bundles.bundle()) != sha256_of(usual)
    finally:
        bundles.bundle.cache_clear()
