"""Tests of what a request and a reply hold."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from safetensors.numpy import save
from support.messages import ADAPTER, REPLY, SETUP, as_record

from fedslm.errors import FederationError
from fedslm.protocol.messages import Reply, Request
from fedslm.protocol.setup import Setup
from fedslm.protocol.tensors import from_arrays, to_arrays
from fedslm.records import AdapterState


def without_adapter(reply: Reply) -> dict[str, Any]:
    """All other values."""
    return {key: value for key, value in vars(reply).items() if key not in ("delta", "num_bytes")}


def test_setup_round_trip() -> None:
    """A client is told exactly what the server was told."""
    assert Setup.from_json(SETUP.to_json()) == SETUP


def test_equal_setups_are_one() -> None:
    """A client keeps what it prepared for a setup, so that equal setups must hash alike."""
    assert hash(Setup.from_json(SETUP.to_json())) == hash(SETUP)


def test_request_round_trip() -> None:
    """Setup, round and every bit of the adapter arrive."""
    again = Request.from_records(Request(SETUP, 3, ADAPTER).to_records())
    assert (again.setup, again.round) == (SETUP, 3)
    assert again.adapter.sha256() == ADAPTER.sha256()
    assert again.adapter.shapes == ADAPTER.shapes


def test_reply_round_trip() -> None:
    """Every value, the statement, the metric and every bit of the adapter arrive."""
    again = Reply.from_records(REPLY.to_records())
    assert without_adapter(again) == without_adapter(REPLY)
    assert again.delta is not None
    assert again.delta.sha256() == ADAPTER.sha256()
    assert again.delta.shapes == ADAPTER.shapes


@pytest.mark.parametrize("status", ["refused", "failed"])
def test_a_reply_without_an_adapter_round_trip(status: Any) -> None:
    """A client that has nothing to send says why."""
    reply = Reply(status, 2, reason="budget exhausted: ε = 8")
    assert Reply.from_records(reply.to_records()) == reply


def test_a_reply_that_asks_for_time_round_trip() -> None:
    """It says after how many seconds the node answers."""
    reply = Reply("needs-time", 2, reason="this node answers after 300 s", answer_after_seconds=300.0)
    assert Reply.from_records(reply.to_records()) == reply


@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, -math.inf, 0.0, -1.0, 86_400.1, 1e300, 300, True, "300", [300.0], None],
)
def test_a_time_that_no_policy_has_is_refused(value: Any) -> None:
    """Not a number, none, or more than a day; and one that is missing, or goes with another status."""
    reply = Reply("needs-time", 2, answer_after_seconds=300.0)
    records = reply.to_records()
    values = records.config_records["reply"]
    if value is None:
        del values["answer_after_seconds"]
    else:
        values["answer_after_seconds"] = value
    with pytest.raises(FederationError, match="answer_after_seconds"):
        Reply.from_records(records)
    values["answer_after_seconds"], values["status"] = 300.0, "refused"
    with pytest.raises(FederationError, match="answer_after_seconds goes with"):
        Reply.from_records(records)


def test_arrays_round_trip() -> None:
    """Tensors arrive in sorted order with their bits; a view arrives as what it shows."""
    again = from_arrays(to_arrays(ADAPTER))
    assert list(again) == ["a", "b"]
    np.testing.assert_array_equal(again["a"], ADAPTER["a"])


def test_other_number_types_are_refused() -> None:
    """What is not float32 is not converted."""
    with pytest.raises(FederationError, match="must be F32"):
        from_arrays(as_record(save({"a": np.zeros(2)})))


def test_tensors_are_a_handful_of_objects() -> None:
    """Flower carries every object in requests of its own: their number does not grow with the tensors."""
    counts = []
    for number in (1, 100):
        state = AdapterState({str(key): np.full(3, key, np.float32) for key in range(number)})
        counts.append(len(get_all_nested_objects(to_arrays(state))))
        assert from_arrays(to_arrays(state)).sha256() == state.sha256()
    assert counts[0] == counts[1]


def test_an_empty_message_is_no_reply() -> None:
    """A message without a reply is refused."""
    with pytest.raises(FederationError, match="cannot be read"):
        Reply.from_records(RecordDict({}))
    with pytest.raises(FederationError, match="cannot be read"):
        Reply.from_records(RecordDict({"reply": ConfigRecord({})}))


@pytest.mark.parametrize("key", sorted(set(REPLY.to_records().config_records["reply"]) - {"metric"}))
def test_a_reply_needs_every_value(key: str) -> None:
    """No value has a silent default (a metric is absent unless it was asked)."""
    records = REPLY.to_records()
    del records.config_records["reply"][key]
    with pytest.raises(FederationError, match="cannot be read"):
        Reply.from_records(records)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("status", "fine"),
        ("status", ""),
        ("status", 7),
        ("status", "ok" * 200),
        ("round", 1.5),
        ("round", "x"),
        ("round", "1"),
        ("round", True),
        ("round", -1),
        ("round", 1_000_001),
        ("reason", "x" * 1_001),
        ("reason", 7),
        ("delta_sha256", "0" * 65),
        ("base_sha256", "0" * 65),
        ("statement", "x" * 8_193),
        ("weight", "1.0"),
        ("weight", True),
        ("weight", math.nan),
        ("weight", 1e13),
        ("weight", [1.0]),
        ("more", "x"),
        ("weight", "heavy"),
        ("weight", b"\0"),
        ("weight", ""),
        ("metric", [0.5]),
        ("metric", [0.5, 1.0, 2.0]),
        ("metric", [math.nan, 1.0]),
        ("metric", [1.0, math.inf]),
        ("metric", ["0.5", "1"]),
        ("metric", 0.5),
        ("metric", "[0.5, 1.0]"),
    ],
)
def test_a_value_that_means_nothing_is_refused(key: str, value: Any) -> None:
    """One bad value makes a reply unusable; a metric that is not two finite numbers never reaches a sum."""
    records = REPLY.to_records()
    records.config_records["reply"][key] = value
    with pytest.raises(FederationError, match="cannot be read"):
        Reply.from_records(records)


def _pickled() -> bytes:
    """What NumPy writes of an object."""
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}]), allow_pickle=True)
    return file.getvalue()


_GOOD = save({"a": np.ones(3, np.float32)})
_BAD = {
    "empty": as_record(b""),
    "nonsense": as_record(b"nonsense"),
    "pickle": as_record(_pickled()),
    "cut": as_record(_GOOD[:-1]),
    "too long": as_record(_GOOD + b"x"),
    "huge header": as_record(b"\xff" * 8 + _GOOD[8:]),
    "huge tensor": as_record(_GOOD.replace(b"[3]", b"[99999999999999]")),
    "another shape": as_record(_GOOD.replace(b"[3]", b"[2]")),
    "no number type": as_record(_GOOD.replace(b"F32", b"F99")),
    "another name": as_record(_GOOD, "others"),
    "float64": as_record(save({"a": np.ones(3)})),
    "an array of Flower's": ArrayRecord({"a": Array(np.ones(3, np.float32))}),
    "more": ArrayRecord({**as_record(_GOOD), "a": Array(np.ones(3, np.float32))}),
}


@pytest.mark.parametrize("record", _BAD.values(), ids=_BAD)
def test_tensors_that_cannot_be_read_are_refused(record: ArrayRecord) -> None:
    """Whatever a client sends for its tensors, the server says no and goes on."""
    assert Reply.from_records(RecordDict({**REPLY.to_records(), "delta": as_record(_GOOD)})).delta
    with pytest.raises(FederationError, match="cannot be read"):
        Reply.from_records(RecordDict({**REPLY.to_records(), "delta": record}))


def test_no_object_of_a_request_can_be_foreseen() -> None:
    """Flower believes whoever announces an object's name first: the same request never has one name twice."""
    request = Request(SETUP, 3, ADAPTER, frozen=ADAPTER)
    names = [set(get_all_nested_objects(request.to_records())) for _ in range(2)]
    assert not names[0] & names[1]
    again = Request.from_records(request.to_records())
    assert again.adapter.sha256() == again.frozen.sha256() == ADAPTER.sha256()
    assert not again.control


def test_no_refusal_can_be_foreseen() -> None:
    """Two replies that say the same have no record in common."""
    names = [set(get_all_nested_objects(Reply("refused", 3, "why").to_records())) for _ in range(2)]
    assert not names[0] & names[1]


@pytest.mark.parametrize("key", ["", "zz" * 32, "00" * 31, 7, "00" * 33])
def test_a_key_that_is_none(key: Any) -> None:
    """A request whose tensors cannot be read is refused."""
    records = Request(SETUP, 3, ADAPTER).to_records()
    records["request"]["key"] = key
    with pytest.raises(FederationError, match="key"):
        Request.from_records(records)
