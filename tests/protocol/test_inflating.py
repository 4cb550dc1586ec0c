"""From objects to a message: what Flower would join to terabytes is refused before it is joined."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from hypothesis import given, settings
from hypothesis import strategies as st
from support.messages import ADAPTER, SETUP
from support.peaks import growth_of
from support.served import context_of

from fedslm.engines.local import LocalGrid
from fedslm.errors import FederationError
from fedslm.protocol.inflating import Limits, inflated, objects_of
from fedslm.protocol.messages import Request
from fedslm.protocol.tensors import to_arrays
from fedslm.records import AdapterState
from fedslm.workers import InlinePool

LIMITS = Limits(16 << 20)
Contents = dict[str, bytes]


def taken_apart(content: RecordDict) -> tuple[str, Contents]:
    """A message's objects, as they are sent."""
    LocalGrid(1, InlinePool())  # tells Flower who sends
    message = Message(content, context_of(0).node_id, "train")
    contents = {key: each.deflate() for key, each in get_all_nested_objects(message).items()}
    return message.object_id, contents


def replaced(contents: Contents, kind: str, change: Any) -> Contents:
    """The objects with the body of one of a kind changed; its identifier stays."""
    found = dict(contents)
    for key, content in contents.items():
        head, _, body = content.partition(b"\0")
        if head.startswith(kind.encode() + b" "):
            body = change(body)
            found[key] = head.rpartition(b" ")[0] + b" %d\0" % len(body) + body
            return found
    raise AssertionError(f"no {kind}")


def listing(count: int) -> Any:
    """An array that lists its piece so many times."""
    return lambda body: json.dumps({**json.loads(body), "arraychunk_ids": [0] * count}).encode()


def zeros(size: int) -> RecordDict:
    """A message with so many values."""
    state = AdapterState({"a": np.zeros(size, np.float32)})
    return RecordDict({"adapter": to_arrays(state), "x": ConfigRecord({"a": 1})})


def test_an_honest_message_is_built() -> None:
    """A request of several pieces, some of which are equal, arrives to the last bit."""
    request = Request(SETUP, 3, AdapterState({**ADAPTER.tensors, "z": np.zeros(3 << 20, np.float32)}))
    identifier, contents = taken_apart(request.to_records())
    again = Request.from_records(inflated(identifier, contents, LIMITS).content)
    assert again.adapter.sha256() == request.adapter.sha256()


def test_pieces_are_counted_as_often_as_they_are_listed() -> None:
    """5 MB that an array lists 10^5 times (500 GB) are refused at once, in no memory."""
    identifier, contents = taken_apart(zeros(1 << 20))
    bomb = replaced(contents, "Array", listing(100_000))

    def refused() -> None:
        with pytest.raises(
            FederationError, match="the arrays of a message have more than 16777216 bytes"
        ):
            inflated(identifier, bomb, LIMITS)

    began = time.monotonic()
    assert growth_of(refused) < 30
    assert time.monotonic() - began < 20


def test_an_array_of_arrays_is_refused() -> None:
    """Flower joins an array that an array lists: 1 MiB that is listed 100 times is never joined."""
    identifier, contents = taken_apart(zeros(1 << 18))
    ((name, inner),) = ((k, each) for k, each in contents.items() if each.startswith(b"Array "))
    body = json.dumps({**json.loads(inner.partition(b"\0")[2]), "arraychunk_ids": [0] * 100}).encode()
    outer = f"Array {'f' * 64} {len(body)}\0".encode() + body

    def refused() -> None:
        with pytest.raises(FederationError, match="cannot be read"):
            inflated(identifier, {**contents, "f" * 64: inner, name: outer}, LIMITS)

    assert growth_of(refused) < 30


@pytest.mark.parametrize("kind", ["ArrayRecord", "RecordDict"])
def test_arrays_are_counted_as_often_as_they_are_named(kind: str) -> None:
    """An array of 1 MiB that a message names 10^3 times would be hashed 10^3 times: it is refused."""
    identifier, contents = taken_apart(zeros(1 << 18))

    def many(body: bytes) -> bytes:
        name = next(iter(json.loads(body).values()))
        return json.dumps({str(number): name for number in range(1000)} | json.loads(body)).encode()

    with pytest.raises(FederationError, match="the arrays of a message have more than 16777216 bytes"):
        inflated(identifier, replaced(contents, kind, many), LIMITS)


def test_a_message_has_few_records() -> None:
    """Values of a ConfigRecord take many times the memory of their bytes: 17 records are refused."""
    content = RecordDict({str(number): ConfigRecord({"a": number}) for number in range(17)})
    with pytest.raises(FederationError, match="more than 16 records"):
        inflated(*taken_apart(content), LIMITS)


def test_records_have_bounds_of_their_own() -> None:
    """A ConfigRecord of 3 MB, and a list of names of 1 MB, are refused before they are parsed."""
    large = RecordDict({"x": ConfigRecord({"a": "b" * (3 << 20)})})
    identifier, contents = taken_apart(large)
    with pytest.raises(FederationError, match="a ConfigRecord of a message has more than"):
        inflated(identifier, contents, LIMITS)
    identifier, contents = taken_apart(zeros(8))
    padded = replaced(contents, "RecordDict", lambda body: body + b" " * (1 << 20))
    with pytest.raises(FederationError, match="a RecordDict of a message has more than"):
        inflated(identifier, padded, LIMITS)


WRONG = {
    "no array": ("Array", lambda _: b"[]"),
    "an index beyond": ("Array", lambda body: body.replace(b"[0]", b"[7]")),
    "deep": ("Array", lambda _: b"[" * 100_000),
    "another child": ("RecordDict", lambda body: body.replace(b"adapter", b"x")),
    "no dictionary": ("RecordDict", lambda _: b"7"),
    "no message": ("Message", lambda _: b"\xff\xff\xff"),
    "no record": ("ConfigRecord", lambda _: b"\xff\xff\xff"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_built_is_refused(name: str) -> None:
    """Whatever is wrong with an object, it is a FederationError with a short text."""
    identifier, contents = taken_apart(zeros(8))
    with pytest.raises(FederationError) as caught:
        inflated(identifier, replaced(contents, *WRONG[name]), LIMITS)
    assert len(str(caught.value)) <= 300


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 9), st.floats(0, 1), st.binary(max_size=20))
def test_any_bytes_are_built_or_refused(number: int, place: float, put: bytes) -> None:
    """Bytes changed anywhere in any object: a message comes out, or a FederationError."""
    identifier, contents = taken_apart(zeros(8))
    key = list(contents)[number % len(contents)]
    start = int(place * len(contents[key]))
    contents[key] = contents[key][:start] + put + contents[key][start + 3 :]
    with suppress(FederationError):
        assert isinstance(inflated(identifier, contents, LIMITS), Message)


def tree(depth: int, width: int = 1) -> ObjectTree:
    """A tree of objects."""
    children = [tree(depth - 1, width) for _ in range(width)] if depth > 1 else []
    return ObjectTree(object_id="0" * 64, children=children)


def test_a_tree_is_bounded_before_it_is_pulled() -> None:
    """Number, depth and identifiers; an object that is named twice is pulled once."""
    honest = Message(Request(SETUP, 3, ADAPTER).to_records(), 2, "train")
    found = objects_of(get_object_tree(honest), LIMITS)
    assert len(found) == len(set(found)) == len(get_all_nested_objects(honest))
    assert objects_of(tree(2, 9), LIMITS) == ["0" * 64]
    for wrong, reason in (
        (tree(2, 4096), "more than 4096 objects"),
        (tree(9), "more than 8 levels"),
        (ObjectTree(object_id="x"), "has no identifier"),
    ):
        with pytest.raises(FederationError, match=reason):
            objects_of(wrong, LIMITS)
