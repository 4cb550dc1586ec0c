"""Signed requests and replies: whatever is changed, moved, kept or sent again, is not believed."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedslm.errors import FederationError
from fedslm.privacy.keys import public_hex, signature_of
from fedslm.protocol import envelopes
from fedslm.protocol.envelopes import (
    ENVELOPE,
    SEAL,
    Envelope,
    RequestHeader,
    content_sha256,
    enclosed,
    is_answer,
    opened,
    sealed,
    seen_of,
)

OPERATOR, NODE, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([n] * 32)) for n in (1, 2, 3))
ME = public_hex(NODE.public_key())
SEEN = ((7, "ab" * 32),)
ASKED = RequestHeader("run", 5, 3, "train", 60.0)


def array(values: Any = (1.0, 2.0), **changes: Any) -> Array:
    """An array of a message."""
    made = np.asarray(values, dtype=np.float32)
    kept = {"dtype": "float32", "shape": made.shape, "stype": "numpy", "data": made.tobytes()}
    return Array(**{**kept, **changes})


def records(**more: Any) -> RecordDict:
    """A message's content."""
    config = ConfigRecord({"round": 3, "name": "x", "rate": 0.1, "raw": b"\x00", "all": [1, 2]})
    return RecordDict({"request": config, "adapter": ArrayRecord({"w": array()}), **more})


def request(content: RecordDict | None = None, **changes: Any) -> tuple[RecordDict, str]:
    """A signed request for this node; keywords change its envelope before it is signed."""
    content = content or records()
    envelope = ASKED.envelope(ME, 1, content_sha256(content), SEEN)
    return enclosed(content, dataclasses.replace(envelope, **changes), OPERATOR)


def open_(content: RecordDict, **changes: Any) -> Envelope:
    """Opens a request as the node that it is for."""
    wanted = {"node": ME, "grid_run": 5, "kind": "train", **changes}
    return opened(content, OPERATOR.public_key(), **wanted)[0]


def test_a_signed_request_is_opened() -> None:
    """The node learns its index and what was seen of its ledger; the request has a name of its own."""
    content, name = request()
    found, named = opened(content, OPERATOR.public_key(), node=ME, grid_run=5, kind="train")
    assert (found.run, found.round, found.client, found.seen) == ("run", 3, 1, SEEN)
    assert seen_of(content) == SEEN
    assert seen_of(records()) == ()
    assert named == name != request()[1]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"node": public_hex(OTHER.public_key())}, "another node"),
        ({"grid_run": 6}, "another grid_run"),
        ({"kind": "evaluate"}, "another kind"),
    ],
)
def test_a_request_is_for_one_node_run_and_type(changes: dict[str, Any], reason: str) -> None:
    """Given to another node, in another run or as another type, it is refused."""
    with pytest.raises(FederationError, match=reason):
        open_(request()[0], **changes)


def other_content() -> list[tuple[str, RecordDict]]:
    """What somebody may put in place of a request's content."""
    shaped = ArrayRecord({"w": array(shape=(2, 1))})
    typed = ArrayRecord({"w": array(dtype="int32")})
    named = ArrayRecord({"v": array()})
    return [
        ("value", records(adapter=ArrayRecord({"w": array((1.0, 2.5))}))),
        ("shape", records(adapter=shaped)),
        ("dtype", records(adapter=typed)),
        ("name", records(adapter=named)),
        ("more", records(more=ConfigRecord({}))),
        ("config", records(request=ConfigRecord({"round": 4}))),
        ("type", records(request=ConfigRecord({**dict(records()["request"]), "round": 3.0}))),
        ("less", RecordDict({"request": records()["request"]})),
    ]


@pytest.mark.parametrize(("name", "content"), other_content(), ids=lambda each: str(each)[:8])
def test_a_signature_is_over_the_whole_content(name: str, content: RecordDict) -> None:
    """A value, a type, a shape, a name or a record that was changed, added or dropped is found out."""
    content[ENVELOPE] = request()[0][ENVELOPE]
    with pytest.raises(FederationError, match="another content"):
        open_(content)


def test_no_two_contents_are_written_alike() -> None:
    """An array called "end" is not the end of its record, with another record after it."""
    one = array(shape=(6,), data=b"arrays")
    name = json.dumps([one.dtype, list(one.shape), one.stype])
    first = RecordDict({"A": ArrayRecord({"end": one})})
    second = RecordDict({"A": ArrayRecord({}), name: ArrayRecord({})})
    assert content_sha256(first) != content_sha256(second)


def test_what_cannot_be_hashed_is_not_an_answer() -> None:
    """One node's reply cannot end a run, whatever its records hold: here a number of 5,000 digits."""
    reply = sealed(records(), "a" * 64, NODE)
    reply["adapter"] = ArrayRecord({"w": array(shape=(10**5000,))})
    assert not is_answer(reply, "a" * 64, NODE.public_key())


def test_records_of_another_type_are_refused() -> None:
    """What the hash does not cover is not there."""
    with pytest.raises(FederationError, match="neither arrays nor config"):
        content_sha256(records(metrics=MetricRecord({"a": 1})))
    with pytest.raises(FederationError, match="16 is the most"):
        content_sha256(RecordDict({str(n): ConfigRecord({}) for n in range(17)}))


FIELDS = [field.name for field in dataclasses.fields(Envelope)]


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_of_an_envelope_is_signed(name: str) -> None:
    """Whatever is put into a field, the request is refused."""
    content, _ = request()
    values = json.loads(str(content[ENVELOPE][ENVELOPE]))
    rubbish = ("x", "", 0, -1, 1.5, None, True, [], {}, [[1, "x"]], 2**70, float("nan"), "00" * 64)
    for value in rubbish:
        if value == values[name] and type(value) is type(values[name]):
            continue
        changed = RecordDict({each: content[each] for each in content})
        changed[ENVELOPE] = ConfigRecord({ENVELOPE: json.dumps({**values, name: value})})
        with pytest.raises(FederationError):
            open_(changed)
    del values[name]
    content[ENVELOPE] = ConfigRecord({ENVELOPE: json.dumps(values)})
    with pytest.raises(FederationError):
        open_(content)


def test_an_unsigned_or_foreign_request_is_refused() -> None:
    """No envelope, one that another key signed, one of no sense, one that is too long."""
    with pytest.raises(FederationError, match="is not signed"):
        open_(records())
    content = records()
    envelope = ASKED.envelope(ME, 1, content_sha256(content), ())
    with pytest.raises(FederationError, match="operator's key"):
        open_(enclosed(content, envelope, OTHER)[0])
    with pytest.raises(FederationError, match="operator's key"):
        open_(enclosed(content, envelope, NODE)[0])
    for text in ("", "[]", "null", "{", "[" * 100_000, "x" * 9000):
        content[ENVELOPE] = ConfigRecord({ENVELOPE: text})
        with pytest.raises(FederationError):
            open_(content)


def test_old_and_early_requests_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """After it has expired, before it was made, and if it claims to be good for ever."""
    content, _ = request()
    now = time.time()
    open_(content)
    for moment, reason in ((now + 61, "expired"), (now - 400, "ahead of this clock")):
        monkeypatch.setattr(envelopes.time, "time", lambda moment=moment: moment)
        with pytest.raises(FederationError, match=reason):
            open_(content)
    monkeypatch.undo()
    for expires in (now + 10**6, 1e300, now - 1):
        with pytest.raises(FederationError, match=r"two days|expired"):
            open_(request(expires=expires)[0])


def test_a_reply_answers_one_request() -> None:
    """Signed by the node, over this content, for this request; nothing else is an answer."""
    _, name = request()
    reply = sealed(records(), name, NODE)
    assert is_answer(reply, name, NODE.public_key())
    assert not is_answer(reply, request()[1], NODE.public_key())
    assert not is_answer(reply, name, OTHER.public_key())
    assert not is_answer(sealed(records(), name, OTHER), name, NODE.public_key())
    assert not is_answer(records(), name, NODE.public_key())
    for kind, content in other_content():
        content[SEAL] = reply[SEAL]
        assert not is_answer(content, name, NODE.public_key()), kind
    for seal in (ConfigRecord({}), ConfigRecord({SEAL: 5}), ConfigRecord({SEAL: "00"})):
        reply[SEAL] = seal
        assert not is_answer(reply, name, NODE.public_key())


def test_a_seal_is_not_part_of_what_is_signed_twice() -> None:
    """Signing again replaces the signature."""
    once, twice = sealed(records(), "a", NODE), sealed(sealed(records(), "b", NODE), "a", NODE)
    assert once[SEAL][SEAL] == twice[SEAL][SEAL]


def test_signatures_have_a_purpose() -> None:
    """What a node signed as a reply, or as anything else, is no request of an operator with its key."""
    content = records()
    envelope = ASKED.envelope(ME, 1, content_sha256(content), ())
    values = {**dataclasses.asdict(envelope), "purpose": "fedslm reply, version 1"}
    del values["signature"]
    forged = dataclasses.replace(envelope, signature=signature_of(OPERATOR, values))
    content[ENVELOPE] = ConfigRecord({ENVELOPE: forged.to_json()})
    with pytest.raises(FederationError, match="operator's key"):
        open_(content)
