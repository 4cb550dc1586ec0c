"""Tests of the frozen data."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedslm.errors import ModelError, PrivacyError
from fedslm.records import AdapterState, Event

_ARRAYS = hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
_STATES = st.dictionaries(st.text(min_size=1, max_size=5), _ARRAYS, max_size=4).map(AdapterState)


def state(**tensors: list[float]) -> AdapterState:
    """A state of float32 vectors."""
    return AdapterState({key: np.array(value, np.float32) for key, value in tensors.items()})


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int32, ">f4"])
def test_only_native_float32_is_accepted(dtype: object) -> None:
    """Any other type is refused with the tensor's name, not converted."""
    with pytest.raises(ModelError, match="tensor a has dtype"):
        AdapterState({"a": np.zeros(2, dtype)})


def test_keys_are_sorted_whatever_their_order() -> None:
    """Order and hash do not depend on how a state was put together."""
    one, other = state(b=[1.0], a=[2.0]), state(a=[2.0], b=[1.0])
    assert list(one) == list(other) == ["a", "b"]
    assert one.sha256() == other.sha256()


def test_later_changes_of_the_mapping_do_not_matter() -> None:
    """A state keeps its own mapping."""
    tensors = {"a": np.zeros(1, np.float32)}
    kept = AdapterState(tensors)
    tensors["b"] = np.zeros(1, np.float32)
    assert list(kept) == ["a"]


def test_sizes() -> None:
    """Parameters, bytes and shapes add up over the tensors."""
    kept = AdapterState({"a": np.zeros((2, 3), np.float32), "b": np.zeros((), np.float32)})
    assert (len(kept), kept.num_parameters, kept.num_bytes) == (2, 7, 28)
    assert kept.shapes == {"a": (2, 3), "b": ()}


def test_hash_is_over_keys_shapes_and_little_endian_bytes() -> None:
    """The hash is what its docstring says, computed here by hand."""
    kept = AdapterState({"b": np.array([[1.5, -2.0]], np.float32), "a": np.zeros(1, np.float32)})
    by_hand = b"a(1,)" + b"\0\0\0\0" + b"b(1, 2)" + b"\0\0\xc0\x3f" + b"\0\0\0\xc0"
    assert kept.sha256() == hashlib.sha256(by_hand).hexdigest()


def test_hash_does_not_depend_on_memory_layout() -> None:
    """A transposed view hashes as its copy does."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    copied = AdapterState({"a": np.ascontiguousarray(array)})
    assert AdapterState({"a": array}).sha256() == copied.sha256()


@pytest.mark.parametrize(
    "other",
    [
        {"a": np.array([[1, 2.0000002]], np.float32)},
        {"a": np.array([[1], [2]], np.float32)},
        {"a": np.array([1, 2], np.float32)},
        {"c": np.array([[1, 2]], np.float32)},
        {"a": np.array([[1, 2]], np.float32), "b": np.zeros(0, np.float32)},
        {},
    ],
)
def test_hash_tells_values_shapes_and_keys_apart(other: dict[str, np.ndarray]) -> None:
    """A change of one bit, of a shape or of a key changes the hash."""
    kept = AdapterState({"a": np.array([[1, 2]], np.float32)})
    assert AdapterState(other).sha256() != kept.sha256()


@given(whole=_STATES, data=st.data())
def test_a_state_is_the_union_of_its_parts(whole: AdapterState, data: st.DataObject) -> None:
    """Selecting some keys and merging the others in again gives the same bytes."""
    some = data.draw(st.sets(st.sampled_from(sorted(whole)))) if len(whole) else set()
    part, rest = whole.select(some), whole.select(set(whole) - some)
    assert set(part) == some
    assert rest.merged(part).sha256() == whole.sha256()
    assert part.num_parameters + rest.num_parameters == whole.num_parameters


def test_merging_replaces() -> None:
    """The other state's tensors win, and neither state changes."""
    one, other = state(a=[1.0], b=[2.0]), state(b=[3.0], c=[4.0])
    merged = one.merged(other)
    assert {key: float(merged[key][0]) for key in merged} == {"a": 1.0, "b": 3.0, "c": 4.0}
    assert float(one["b"][0]) == 2.0


@pytest.mark.parametrize(
    ("value", "finite"), [(0.0, True), (np.nan, False), (np.inf, False), (-np.inf, False)]
)
def test_one_bad_value_makes_a_state_unusable(value: float, finite: bool) -> None:
    """A single NaN or infinity, in any tensor, is seen."""
    assert state(a=[1.0, 2.0], b=[0.0, value]).is_finite() is finite


def test_records_are_frozen() -> None:
    """Nobody changes what was charged."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Event(0.1, 1.0, 1).steps = 0  # type: ignore[misc]


@pytest.mark.parametrize(
    "values",
    [
        (0.01, 0.0, 1),
        (0.01, -1.0, 1),
        (0.01, math.nan, 1),
        (0.01, math.inf, 1),
        (0.0, 1.0, 1),
        (-0.01, 1.0, 1),
        (1.01, 1.0, 1),
        (math.nan, 1.0, 1),
        (0.01, 1.0, 0),
        (0.01, 1.0, -5),
        (0.01, 1.0, 2.5),
        (0.01, 1.0, math.nan),
        ("0.1", 1.0, 1),
        (0.1, None, 1),
        (0.1, 1.0, "1"),
        (True, 1.0, 1),
        (0.1, True, 1),
        (0.1, 1.0, True),
        (0.1, 1.0, np.int64(1)),
        (0.1, 10**400, 1),
        (0.1, 1.0, 10**400),
    ],
    ids=repr,
)
def test_an_event_that_means_nothing_cannot_be_made(values: tuple[Any, Any, Any]) -> None:
    """No accountant sees an event out of its range or of other types: it cannot be made."""
    with pytest.raises(PrivacyError, match="sample_rate"):
        Event(*values)


def test_a_state_in_one_buffer_is_pickled_once() -> None:
    """And is one buffer again; states that are not stay so."""
    values = np.arange(1000, dtype=np.float32)
    state = AdapterState.of_flat(values, {"b": (20, 30), "a": (400,)})
    content = pickle.dumps(state)
    assert len(content) < 1.2 * values.nbytes
    again = copy.deepcopy(state)
    assert again.sha256() == state.sha256()
    assert np.shares_memory(again.flat, again["b"])
    pieces = copy.deepcopy(AdapterState({"a": values[:3].copy()}))
    assert (pieces.flat, pieces["a"].tolist()) == (None, [0.0, 1.0, 2.0])
