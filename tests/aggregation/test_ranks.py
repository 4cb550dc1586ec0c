"""Tests of cropping an adapter to a client's rank and padding it back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedslm.aggregation.ranks import crop, pad, rank_of
from fedslm.errors import FederationError
from fedslm.records import AdapterState

A, B, R = "q.lora_A.weight", "q.lora_B.weight", "q.lora_R.weight"
DELTA_A, DELTA_B, HEAD = "q.delta_A.weight", "q.delta_B.weight", "score.weight"
RANKED = (A, B, R)


def adapter(seed: int, *, rank: int = 4, height: int = 5, width: int = 6) -> AdapterState:
    """A random adapter with every part, none of whose values is zero."""
    generator = np.random.default_rng(seed)
    shapes = {
        A: (rank, width),
        B: (height, rank),
        R: (rank, rank),
        DELTA_A: (7, width),
        DELTA_B: (height, 7),
        HEAD: (3, height),
    }
    return AdapterState(
        {key: generator.uniform(1, 2, shape).astype(np.float32) for key, shape in shapes.items()}
    )


sizes = st.integers(1, 6)


@settings(max_examples=25, deadline=None)
@given(rank=sizes, held=sizes, height=sizes, width=sizes, seed=st.integers(0, 99))
def test_a_client_holds_the_leading_block(
    rank: int, held: int, height: int, width: int, seed: int
) -> None:
    """A's first rows, B's first columns, R's leading block; D and heads whole; a rank above is all."""
    whole = adapter(seed, rank=rank, height=height, width=width)
    part = crop(whole, held)
    kept = min(rank, held)
    np.testing.assert_array_equal(part[A], whole[A][:kept, :])
    np.testing.assert_array_equal(part[B], whole[B][:, :kept])
    np.testing.assert_array_equal(part[R], whole[R][:kept, :kept])
    for key in (DELTA_A, DELTA_B, HEAD):
        np.testing.assert_array_equal(part[key], whole[key])
    assert rank_of(part) == kept
    assert rank_of(whole) == rank


@settings(max_examples=25, deadline=None)
@given(rank=sizes, held=sizes, seed=st.integers(0, 99))
def test_padding_goes_back(rank: int, held: int, seed: int) -> None:
    """Padded, a cropped adapter has the whole's shapes, its own values and zeros; cropped again, itself."""
    held = min(rank, held)
    whole = adapter(seed, rank=rank)
    part = crop(whole, held)
    back = pad(part, whole)
    assert back.shapes == whole.shapes
    assert all(back[key].dtype == np.float32 for key in back)
    assert crop(back, held).sha256() == part.sha256()
    for key in RANKED:
        assert np.count_nonzero(back[key]) == part[key].size


@settings(max_examples=25, deadline=None)
@given(rank=sizes, held=sizes, seed=st.integers(0, 99))
def test_padding_keeps_the_product(rank: int, held: int, seed: int) -> None:
    """Padding adds nothing to B·A nor to B·R·A, and only zeros to a norm."""
    whole = adapter(seed, rank=rank)
    part = crop(whole, min(rank, held))
    back = pad(part, whole)
    np.testing.assert_allclose(back[B] @ back[A], part[B] @ part[A], rtol=1e-6)
    np.testing.assert_allclose(back[B] @ back[R] @ back[A], part[B] @ part[R] @ part[A], rtol=1e-6)
    flat = np.concatenate([part[key].astype(float).ravel() for key in part])
    assert back.norm() == pytest.approx(float(np.sqrt(np.sum(flat**2))), rel=1e-6)


def test_nothing_to_pad_or_crop_stays() -> None:
    """At the full rank both give the same bits."""
    whole = adapter(0)
    assert crop(whole, 4).sha256() == whole.sha256()
    assert pad(whole, whole).sha256() == whole.sha256()


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        (A, (5, 6)),
        (A, (4, 7)),
        (B, (6, 4)),
        (B, (5, 5)),
        (R, (4, 5)),
        (HEAD, (4, 5)),
        (A, (4,)),
        (A, (4, 6, 1)),
        ("other.lora_A.weight", (4, 6)),
    ],
)
def test_what_does_not_fit_is_refused(key: str, shape: tuple[int, ...]) -> None:
    """A tensor that is larger, of another dimension or unknown is an error that names it."""
    with pytest.raises(FederationError, match=key):
        pad(AdapterState({key: np.ones(shape, np.float32)}), adapter(0))


def test_an_adapter_without_factors_has_no_rank() -> None:
    """The rank is that of the factors, whichever is there; heads and D have none."""
    whole = adapter(0)
    assert rank_of(whole.select({HEAD, DELTA_A, DELTA_B})) == 0
    assert rank_of(AdapterState({})) == 0
    for key in RANKED:
        assert rank_of(whole.select({key, DELTA_A})) == 4
