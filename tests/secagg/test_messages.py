"""Tests of the messages: each has one encoding, and nothing else is read."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedslm.errors import FederationError
from fedslm.secagg import messages
from fedslm.secagg.cohort import Cohort
from fedslm.secagg.messages import (
    BOX_BYTES,
    MOST_MESSAGE_BYTES,
    InputHead,
    InputRequest,
    KeysRequest,
    PublicKeys,
    Shares,
    SharesRequest,
    SurvivorsRequest,
    SurvivorsSignature,
    Unmask,
    UnmaskRequest,
    decode,
    encode,
)

HASH, SIGNATURE, SHARE, BOX = "ab" * 32, "cd" * 64, "0f" * 33, "1e" * BOX_BYTES
KEYS = PublicKeys(1, HASH, "12" * 32, HASH, SIGNATURE)
ALL: list[Any] = [
    KEYS,
    KeysRequest(Cohort("run", 1, 1, (0, 1, 2), 2, 0, 4, HASH, HASH)),
    SharesRequest(HASH, (replace(KEYS, client=0), KEYS)),
    Shares(HASH, 1, {0: BOX, 2: BOX}),
    InputRequest(HASH, {0: BOX, 2: BOX}),
    InputHead(HASH, 1, ()),
    SurvivorsRequest(HASH, (0, 1)),
    SurvivorsSignature(HASH, 1, SIGNATURE),
    UnmaskRequest(HASH, {0: SIGNATURE, 1: SIGNATURE}),
    Unmask(HASH, 1, {0: SHARE, 1: SHARE}, {}),
]
BY_KIND = {each.kind: each for each in ALL}


@pytest.mark.parametrize("kind", BY_KIND)
def test_a_message_is_read_as_it_was(kind: str) -> None:
    """And only as a message of its own kind."""
    message = BY_KIND[kind]
    content = encode(message)
    assert decode(type(message), content) == message
    for other in ALL:
        if other.kind != kind:
            with pytest.raises(FederationError):
                decode(type(other), content)


@pytest.mark.parametrize("kind", BY_KIND)
def test_a_message_has_one_encoding(kind: str) -> None:
    """Spaces, another order, doubled or further keys, booleans for numbers, another version: refused."""
    message = BY_KIND[kind]
    content = encode(message)
    values = json.loads(content)
    wrong = [
        json.dumps(values).encode(),
        json.dumps(dict(reversed(values.items())), separators=(",", ":")).encode(),
        content[:-1] + b',"version":1}',
        content[:-1] + b',"zzz":1}',
        content.replace(b'"version":1', b'"version":true'),
        content.replace(b'"version":1', b'"version":1.0'),
        content.replace(b'"version":1', b'"version":2'),
        content.replace(b'"version":1', b'"version":01'),
        content + b" ",
        content + content,
        content.decode().encode("utf-16"),
        content.replace(b'"kind"', b'"k\\u0069nd"'),
    ]
    for bad in wrong:
        with pytest.raises(FederationError):
            decode(type(message), bad)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to each value in a message."""
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [path, *(found for key, each in inner for found in _paths(each, (*path, key)))]


_ODD = [None, True, -1, 10**30, 0.5, "", "zz", HASH.upper(), [], {}, [[]], [[0]], [[0, 1, 2]], "٣" * 64]


@pytest.mark.parametrize("kind", BY_KIND)
def test_every_value_has_a_type_and_bounds(kind: str) -> None:
    """Each value, at each depth, replaced by odd ones or left out: refused, or the same message."""
    message = BY_KIND[kind]
    for path in _paths(json.loads(encode(message)))[1:]:
        for odd in _ODD:
            values = json.loads(encode(message))
            place = values
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = odd
            content = json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
            try:
                found = decode(type(message), content)
            except FederationError:
                continue
            assert encode(found) == content
            assert odd == [] or path[-1] == "run"  # an empty list is a list
        values = json.loads(encode(message))
        place = values
        for key in path[:-1]:
            place = place[key]
        if isinstance(place, dict):
            del place[path[-1]]
            content = json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
            with pytest.raises(FederationError):
                decode(type(message), content)


@pytest.mark.parametrize(
    "message",
    [
        SurvivorsRequest(HASH, (1, 0)),
        SurvivorsRequest(HASH, (1, 1)),
        SurvivorsRequest(HASH, tuple(range(257))),
        SharesRequest(HASH, (KEYS, KEYS)),
        SharesRequest(HASH, (KEYS, replace(KEYS, client=0))),
    ],
)
def test_clients_are_named_once_and_in_order(message: Any) -> None:
    """A node that is named twice would count twice."""
    with pytest.raises(FederationError):
        decode(type(message), encode(message))


def test_a_client_is_not_paired_twice() -> None:
    """The same for signatures and shares: the last would silently count."""
    twice = encode(BY_KIND["unmask-request"]).replace(b"[1,", b"[0,")
    with pytest.raises(FederationError, match="once"):
        decode(UnmaskRequest, twice)


@given(st.binary(max_size=300), st.sampled_from(ALL))
def test_any_bytes_are_refused(content: bytes, message: Any) -> None:
    """Nothing but a FederationError."""
    with pytest.raises(FederationError):
        decode(type(message), content)


@given(st.data(), st.sampled_from(ALL))
def test_changed_bytes_are_refused_or_canonical(data: st.DataObject, message: Any) -> None:
    """One changed byte gives an error, or another message in its only encoding."""
    content = bytearray(encode(message))
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = decode(type(message), bytes(content))
    except FederationError:
        return
    assert encode(found) == bytes(content)


@pytest.mark.parametrize(
    "content", [b"[" * 200_000, b"1" * 10_000, b"null", b"[]", b'{"kind":"keys"}', b""]
)
def test_deep_and_large_values(content: bytes) -> None:
    """Nested lists and long numbers end in the same error."""
    with pytest.raises(FederationError):
        decode(PublicKeys, content)


def test_long_messages_are_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound comes first; and only bytes are read."""
    monkeypatch.setattr(messages.json, "loads", lambda _: pytest.fail("parsed"))
    for content in (b" " * (MOST_MESSAGE_BYTES + 1), bytearray(8), "text", None):
        with pytest.raises(FederationError, match="at most"):
            decode(PublicKeys, content)  # type: ignore[arg-type]


def test_the_largest_messages_fit() -> None:
    """With 256 nodes every message is within the bound."""
    clients = tuple(range(256))
    largest = [
        SharesRequest(HASH, tuple(replace(KEYS, client=client) for client in clients)),
        Shares(HASH, 1, dict.fromkeys(clients, BOX)),
        UnmaskRequest(HASH, dict.fromkeys(clients, SIGNATURE)),
        Unmask(HASH, 1, dict.fromkeys(clients, SHARE), {}),
    ]
    for message in largest:
        assert decode(type(message), encode(message)) == message
