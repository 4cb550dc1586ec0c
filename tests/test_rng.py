"""Tests of the only place where seeds are derived."""

from __future__ import annotations

import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedslm.rng import seed_of, stream

_INDICES = st.lists(st.integers(0, 10**6), max_size=3).map(tuple)


@given(st.integers(0, 2**64), st.text("abcdef-", min_size=1, max_size=8), _INDICES)
def test_seeds_fit_everywhere_and_repeat(seed: int, purpose: str, indices: tuple[int, ...]) -> None:
    """A seed is in [0, 2**63), which torch takes too, and depends on its arguments only."""
    value = seed_of(seed, purpose, *indices)
    assert 0 <= value < 2**63
    assert seed_of(seed, purpose, *indices) == value


@given(st.lists(st.tuples(st.integers(0, 99), st.sampled_from("ab"), _INDICES), unique=True))
def test_no_two_purposes_share_a_seed(arguments: list[tuple[int, str, tuple[int, ...]]]) -> None:
    """Different seeds, purposes or indices give different seeds: (1, 2) is not (12,)."""
    assert len({seed_of(seed, purpose, *i) for seed, purpose, i in arguments}) == len(arguments)


def test_seeds_are_the_same_on_every_machine_and_version() -> None:
    """A seed is 63 bits of SHA-256 over the joined arguments: a stored run can always be repeated."""
    digest = hashlib.sha256(b"7\x1fbatches\x1f3\x1f1").digest()
    assert seed_of(7, "batches", 3, 1) == int.from_bytes(digest[:8], "big") // 2


def test_streams_repeat_and_differ() -> None:
    """The same arguments give the same numbers, others give unrelated ones."""
    one, same = stream(0, "batches", 1), stream(0, "batches", 1)
    np.testing.assert_array_equal(one.random(100), same.random(100))
    others = [stream(0, "batches", 2), stream(0, "cohort", 1), stream(1, "batches", 1)]
    draws = [stream(0, "batches", 1).random(10_000), *(other.random(10_000) for other in others)]
    correlation = np.corrcoef(draws) - np.eye(len(draws))
    assert np.abs(correlation).max() < 0.05  # five standard deviations


def test_streams_do_not_touch_the_global_generator() -> None:
    """Somebody else's seeded numbers stay as they were."""
    np.random.seed(3)
    expected = np.random.random()
    np.random.seed(3)
    stream(0, "x").random(5)
    assert np.random.random() == expected
