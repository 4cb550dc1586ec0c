"""Tests of how examples share a pass without gradients."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.kinds import KINDS

from fedslm.tasks.base import Example
from fedslm.tasks.passes import MOST_EXAMPLES, MOST_LOGITS, passes, width_of


@given(st.lists(st.integers(1, 2048), max_size=100), st.integers(1, 1 << 18), st.integers(1, 64))
def test_a_pass_is_bounded_and_every_example_is_in_one(
    lengths: list[int], width: int, size: int
) -> None:
    """Padded tokens × width stay within the bound unless one example exceeds it; none is lost."""
    examples = [Example((1,) * length) for length in lengths]
    found = list(passes(examples, width, size))
    assert sorted(number for part in found for number in part) == list(range(len(lengths)))
    for part in found:
        padded = len(part) * max(lengths[number] for number in part)
        assert len(part) <= size
        assert len(part) == 1 or padded * width <= MOST_LOGITS


def test_a_wide_vocabulary_means_fewer_records() -> None:
    """128 tokens: 32 records of 30,000 classes of text or of 1,000 tokens, but two of 49,152 tokens."""
    examples = [Example((1,) * 128)] * 64
    sizes = {width: max(map(len, passes(examples, width))) for width in (2, 1000, 49_152)}
    assert sizes == {2: MOST_EXAMPLES, 1000: MOST_EXAMPLES, 49_152: 2}


def test_long_texts_mean_fewer_records() -> None:
    """Of few classes a layer's states are the most: 16 records of 512 tokens, one of 8,192."""
    sizes = [max(map(len, passes([Example((1,) * n)] * 64, 2))) for n in (256, 512, 8192, 16_384)]
    assert sizes == [MOST_EXAMPLES, 16, 1, 1]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("classification", 3), ("token-classification", 5), ("causal-lm", 1000), ("preference", 4000)],
)
def test_width_is_what_the_pass_holds(kind: str, expected: int) -> None:
    """Classes, or the vocabulary; a preference holds two answers, each by two models."""
    assert width_of(KINDS[kind], 1000) == expected
