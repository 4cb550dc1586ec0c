"""Tests of how much a forward pass holds, and of which records share one."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.kinds import KINDS

from fedslm.tasks.base import Example
from fedslm.tasks.passes import (
    CPU_TOKENS,
    GPU_TOKENS,
    MOST_LOGITS,
    bounded_budget,
    evaluation_budget,
    passes,
    together,
    token_budget,
)


@given(st.lists(st.integers(1, 2048), max_size=100), st.integers(1, 1 << 14))
def test_a_pass_is_bounded_and_every_example_is_in_one(lengths: list[int], tokens: int) -> None:
    """Padded tokens stay within the budget unless one example exceeds it; none is lost."""
    examples = [Example((1,) * length) for length in lengths]
    found = list(passes(examples, tokens))
    assert sorted(number for part in found for number in part) == list(range(len(lengths)))
    for part in found:
        padded = len(part) * max(lengths[number] for number in part)
        assert len(part) == 1 or padded <= tokens


SIZES = st.lists(st.tuples(st.integers(1, 7), st.integers(1, 40)), max_size=30)


@given(SIZES, st.integers(1, 300), st.integers(1, 20))
def test_units_share_a_pass_while_both_limits_allow_it(
    sizes: list[tuple[int, int]], tokens: int, records: int
) -> None:
    """A pass of several units keeps both limits; the next unit, the shortest left, would break one."""

    def fits(part: list[int]) -> bool:
        total = sum(sizes[number][0] for number in part)
        return total <= records and total * max(sizes[number][1] for number in part) <= tokens

    found = list(together(sizes, tokens, records))
    flat = [number for part in found for number in part]
    assert flat == sorted(range(len(sizes)), key=lambda number: sizes[number][1])
    assert all(fits(part) or len(part) == 1 for part in found)
    for part, following in pairwise(found):
        assert not fits([*part, following[0]])


def test_a_gpu_has_more_to_do_at_once() -> None:
    """A CPU's pass is small and every other device's large; rows of one record share the budget."""
    assert token_budget("cpu") == CPU_TOKENS < token_budget("cuda") == GPU_TOKENS
    assert token_budget("mps") == GPU_TOKENS
    assert token_budget("cpu", rows=2) == CPU_TOKENS // 2


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_wide_vocabulary_means_fewer_tokens(device: str) -> None:
    """A pass without gradients holds no more logits than are allowed, in all rows of a record."""
    assert bounded_budget(2, device) == token_budget(device)
    assert bounded_budget(1 << 17, device) == 1 << 7
    assert bounded_budget(1 << 17, device, rows=2) == 1 << 6


@pytest.mark.parametrize(
    ("kind", "width"),
    [("classification", 3), ("token-classification", 5), ("causal-lm", 1e6), ("preference", 4e6)],
)
def test_an_evaluation_counts_what_its_pass_holds(kind: str, width: float) -> None:
    """Classes, or the vocabulary; a preference holds two answers, each with and without the adapter."""
    rows = KINDS[kind].rows_per_example
    expected = min(CPU_TOKENS // rows, int(MOST_LOGITS // width))
    assert evaluation_budget(KINDS[kind], 10**6, "cpu") == expected
