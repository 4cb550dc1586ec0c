"""What a message may hold at most, on both sides: nothing from outside raises another error, or much memory."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save
from support.messages import ADAPTER, REPLY, SETUP, as_record

from fedslm.errors import FederationError, PolicyRefused
from fedslm.protocol import bounds
from fedslm.protocol.messages import Reply, Request
from fedslm.protocol.setup import Setup
from fedslm.protocol.tensors import from_arrays

REQUEST = Request(SETUP, 3, ADAPTER)
MOST_MB = 120.0  # over what an empty message takes: a setup of 2 MiB as Python's objects
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=12,
)
SETUP_KEYS = sorted(json.loads(SETUP.to_json()))


def changed(**values: Any) -> str:
    """A setup with some fields changed."""
    return json.dumps({**json.loads(SETUP.to_json()), **values})


def section(name: str, **values: Any) -> str:
    """A setup with some values of a section changed."""
    return changed(**{name: {**json.loads(SETUP.to_json())[name], **values}})


def refusal(work: Callable[[], object]) -> str:
    """Why something is refused; empty if it is not. Any other error is the test's."""
    try:
        work()
    except (FederationError, PolicyRefused) as error:
        return str(error)
    return ""


WRONG_SETUPS = {
    "too long": " " * bounds.MOST_SETUP_BYTES + SETUP.to_json(),
    "deep": "[" * 100_000,
    "digits": "9" * 10_000,
    "NaN": changed(seed=float("nan")),
    "unknown": changed(more=1),
    "run_id": changed(run_id="x" * 201),
    "run_id's type": changed(run_id=7),
    "directory": changed(directory="x" * 4097),
    "plan": changed(plan="x" * 4097),
    "hash": changed(base_sha256="0" * 65),
    "boolean seed": changed(seed=True),
    "negative seed": changed(seed=-1),
    "huge seed": changed(seed=10**30),
    "labels": changed(labels=["x"] * 10_001),
    "long label": changed(labels=["x" * 201]),
    "label's type": changed(labels=[7]),
    "labels' type": changed(labels={"a": "b"}),
    "no section": changed(model=None),
    "infinite": section("training", learning_rate=float("inf")),
    "huge": section("training", batch_size=10**13),
    "modules": section("lora", target_modules=["x"] * 10_001),
    "ranks": section("lora", client_ranks=[1] * 10_001),
    "ranks in one text": section("lora", client_ranks=",".join(["1"] * 10_000) + ",1"),
    "long prompt": section("task", prompt="x" * 20_001),
    "deep section": section("task", prompt=[[[[["x"]]]]]),
}


def test_a_number_beyond_all_bounds_is_one_error() -> None:
    """A whole number that is no float, too: a FederationError, not one of Python's."""
    for value in (10**400, -(10**400), float("nan"), float("inf"), 10**13):
        with pytest.raises(FederationError, match="too large"):
            bounds.moderate({"a": [value]}, "training")
    bounds.moderate({"a": [10**12, -1.5, 0]}, "training")


@pytest.mark.parametrize("text", WRONG_SETUPS.values(), ids=WRONG_SETUPS)
def test_a_setup_out_of_bounds_is_refused(text: str) -> None:
    """Each field of a setup has a bound; the error is short and repeats little of what came."""
    with pytest.raises(FederationError) as caught:
        Setup.from_json(text)
    assert len(str(caught.value)) <= 300


def test_the_largest_honest_setup_is_taken() -> None:
    """Ten thousand labels and a prompt of twenty thousand characters are allowed."""
    labels = [f"{number:0150d}" for number in range(10_000)]
    text = changed(labels=labels, task={**SETUP.task.model_dump(mode="json"), "prompt": "x" * 20_000})
    assert Setup.from_json(text).labels == tuple(labels)


@pytest.mark.parametrize("key", ["round", "turn"])
@pytest.mark.parametrize("value", [0, -1, 1_000_001, True, 1.0, "1", [1]])
def test_a_round_out_of_bounds_is_refused(key: str, value: Any) -> None:
    """Rounds and turns are whole numbers from 1 to a million."""
    records = REQUEST.to_records()
    records.config_records["request"][key] = value
    with pytest.raises(FederationError, match=f"{key} must be a whole number from 1 to 1000000"):
        Request.from_records(records)


@pytest.mark.parametrize("record", [ConfigRecord({}), MetricRecord({}), ArrayRecord({})])
def test_a_request_has_no_other_record(record: Any) -> None:
    """A record that no server of this version sends is refused."""
    with pytest.raises(FederationError, match="unknown 'more'"):
        Request.from_records(RecordDict({**REQUEST.to_records(), "more": record}))
    records = REQUEST.to_records()
    records.config_records["request"]["more"] = 1
    with pytest.raises(FederationError, match="unknown 'more'"):
        Request.from_records(records)


def tensors(header: Any, data: bytes = b"") -> ArrayRecord:
    """A safetensors content with a header of one's own."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return as_record(struct.pack("<Q", len(raw)) + raw + data)


def one(**values: Any) -> dict[str, Any]:
    """A header of one tensor."""
    return {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **values}}


WRONG_TENSORS = {
    "long header": as_record(struct.pack("<Q", 1 << 60) + b"{}"),
    "longer than allowed": tensors(b"{" + b" " * (2 << 20) + b"}"),
    "list": tensors([]),
    "bytes": tensors(b"\xff\xff"),
    "deep": tensors(b"[" * 10_000),
    "many": tensors(
        {str(n): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(8_193)}
    ),
    "name": tensors({"x" * 257: one()["a"]}, bytes(4)),
    "type": tensors(one(dtype="F64"), bytes(4)),
    "type's type": tensors(one(dtype=["F32"]), bytes(4)),
    "axes": tensors(one(shape=[1] * 5), bytes(4)),
    "axis": tensors(one(shape=[1 << 60]), bytes(4)),
    "negative axis": tensors(one(shape=[-1]), bytes(4)),
    "boolean axis": tensors(one(shape=[True]), bytes(4)),
    "half axis": tensors(one(shape=[1.0]), bytes(4)),
    "claim": tensors(one(shape=[1 << 20], data_offsets=[0, 4 << 20]), bytes(4)),
    "offsets": tensors(one(data_offsets=[0, 8]), bytes(8)),
    "one offset": tensors(one(data_offsets=[0]), bytes(4)),
    "metadata": tensors({**one(), "__metadata__": {"a": "b"}}, bytes(4)),
    "more of a tensor": tensors(one(more=1), bytes(4)),
    "rest": tensors(one(), bytes(8)),
    "overlap": tensors({**one(), "b": one()["a"]}, bytes(8)),
    "gap": tensors({**one(), "b": one(data_offsets=[8, 12])["a"]}, bytes(8)),
    "no beginning": tensors(one(data_offsets=[4, 8]), bytes(4)),
    "array's type": ArrayRecord(
        {"tensors": Array("float32", (len(save(ADAPTER.tensors)),), "safetensors", b"")}
    ),
}


@pytest.mark.parametrize("record", WRONG_TENSORS.values(), ids=WRONG_TENSORS)
def test_a_header_that_is_not_sound_is_refused(record: ArrayRecord) -> None:
    """Number, names, number types, shapes and sizes are looked at before anything is allocated."""
    with pytest.raises(FederationError) as caught:
        from_arrays(record)
    assert len(str(caught.value)) <= 300
    with pytest.raises(FederationError, match="cannot be read"):
        Reply.from_records(RecordDict({**REPLY.to_records(), "delta": record}))


@pytest.mark.parametrize("padding", range(8))
def test_tensors_are_views_of_the_received_bytes_wherever_they_begin(padding: int) -> None:
    """As safetensors reads them; in one buffer that NumPy and BLAS can use."""
    header = {
        "b": {"dtype": "F32", "shape": [1, 2], "data_offsets": [4, 12]},
        "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
    }
    raw = json.dumps(header).encode() + b" " * padding
    values = np.array([1.0, -2.0, 3.0], "<f4")
    content = struct.pack("<Q", len(raw)) + raw + values.tobytes()
    state = from_arrays(as_record(content))
    assert {key: tensor.tolist() for key, tensor in state.tensors.items()} == {
        key: tensor.tolist() for key, tensor in load(content).items()
    }
    assert state.flat is not None
    assert state.flat.flags.aligned
    assert np.shares_memory(state.flat, state["b"])


def test_tensors_in_another_order_are_read_and_have_no_buffer() -> None:
    """Their values are in the order of the keys, whatever the order of the bytes."""
    header = {
        "a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
    }
    state = from_arrays(tensors(header, np.array([1.0, 2.0], "<f4").tobytes()))
    assert (state["a"].tolist(), state["b"].tolist(), state.flat) == ([2.0], [1.0], None)


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=400)
    | st.binary(max_size=64).map(lambda tail: save({"a": np.ones(3, np.float32)}) + tail)
)
def test_any_bytes_are_tensors_or_refused(content: bytes) -> None:
    """Whatever bytes come in the place of tensors: they are read, or a FederationError says no."""
    assert len(refusal(lambda: from_arrays(as_record(content)))) <= 300


def test_another_version_is_refused_by_name() -> None:
    """Also if its setup has other fields than this version's: the version is compared first."""
    values = {**json.loads(SETUP.to_json()), "version": "9.9.9", "new": 1}
    del values["labels"]
    refused = refusal(lambda: Setup.from_json(json.dumps(values)))
    assert refused.startswith("server runs 9.9.9, this client ")


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(SETUP_KEYS), JSON)
def test_any_value_of_a_setup_is_taken_or_refused(key: str, value: Any) -> None:
    """Whatever JSON stands in a field: the setup is read, or an error of ours says no."""
    assert len(refusal(lambda: Setup.from_json(changed(**{key: value})))) <= 300


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(
        ["status", "round", "reason", "delta_sha256", "weight", "statement", "metric", "x"]
    ),
    st.integers(-(2**63), 2**63 - 1)
    | st.floats()
    | st.text(max_size=30)
    | st.binary(max_size=9)
    | st.lists(st.floats(), max_size=3),
)
def test_any_value_of_a_reply_is_taken_or_refused(key: str, value: Any) -> None:
    """Whatever a node puts into a field: the reply is read, or a FederationError says no."""
    records = REPLY.to_records()
    records.config_records["reply"][key] = value
    assert len(refusal(lambda: Reply.from_records(records))) <= 350


HEAVY: dict[str, Callable[[], object]] = {
    "labels": lambda: Setup.from_json(changed(labels=["x"] * 10**6)),
    "lists": lambda: Setup.from_json("[" + "[]," * 650_000 + "[]]"),
    "objects": lambda: Setup.from_json("[" + "{}," * 650_000 + "{}]"),
    "keys": lambda: Setup.from_json("{" + ",".join(f'"{n}":0' for n in range(180_000)) + "}"),
    "header": lambda: from_arrays(tensors(b"[" + b"[]," * 650_000 + b"[]]")),
    "claim": lambda: from_arrays(WRONG_TENSORS["claim"]),
    "claim of terabytes": lambda: from_arrays(
        tensors(one(shape=[1 << 40], data_offsets=[0, 4 << 40]), bytes(4))
    ),
}


def measure() -> None:
    """Prints how much memory each heavy message takes while it is refused, in MB."""
    from support.peaks import growth_of

    def refused(work: Callable[[], object]) -> None:
        with pytest.raises(FederationError):
            work()

    print(
        json.dumps({name: growth_of(lambda work=work: refused(work)) for name, work in HEAVY.items()})
    )


def test_a_heavy_message_is_refused_in_little_memory() -> None:
    """A million labels, nested lists and headers that claim terabytes stay below a bound."""
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    code = f"import sys; sys.path[:0] = {paths!r}; import test_bounds; test_bounds.measure()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == set(HEAVY)
    assert max(found.values()) < MOST_MB, found
