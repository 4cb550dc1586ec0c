"""Logical batches cut into micro-batches, and sums that do not depend on the cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.families import alone, examples_of, load_family, random_state, task_of
from support.kinds import KINDS, example_of

from fedslm.tasks.base import Example
from fedslm.training.batches import micro_batches
from fedslm.training.evaluation import count

LENGTHS = st.integers(1, 12)
UNITS = st.lists(st.lists(LENGTHS, min_size=1, max_size=7), max_size=12)


def numbered(lengths: list[list[int]]) -> list[list[Example]]:
    """Units of examples of the given lengths, each example with its own target."""
    number = iter(range(10_000))
    return [[Example((1,) * length, next(number)) for length in unit] for unit in lengths]


@settings(deadline=None)
@given(UNITS, st.integers(1, 10))
def test_micro_batches_cover_every_unit_once_and_whole(lengths: list[list[int]], size: int) -> None:
    """Every unit is in exactly one piece, with all its records in their order; no piece is empty."""
    units = numbered(lengths)
    parts = list(micro_batches(units, size))
    assert all(parts)
    covered = [unit for part in parts for unit in part]
    assert sorted(covered, key=lambda unit: unit[0].target) == units


@settings(deadline=None)
@given(UNITS, st.integers(1, 10))
def test_micro_batches_respect_the_size_unless_one_unit_is_larger(
    lengths: list[list[int]], size: int
) -> None:
    """A piece of several units has at most ``size`` records, and none could take the next unit in."""
    parts = list(micro_batches(numbered(lengths), size))
    records = [sum(map(len, part)) for part in parts]
    assert all(total <= size or len(part) == 1 for total, part in zip(records, parts, strict=True))
    for total, following in zip(records, parts[1:], strict=False):
        assert total + len(following[0]) > size


@settings(deadline=None)
@given(UNITS, st.integers(1, 10))
def test_micro_batches_put_similar_lengths_together(lengths: list[list[int]], size: int) -> None:
    """The longest records of the units ascend over the pieces: short ones are not padded to long ones."""
    parts = list(micro_batches(numbered(lengths), size))
    longest = [max(len(e.input_ids) for e in unit) for part in parts for unit in part]
    assert longest == sorted(longest)


@pytest.mark.parametrize(
    ("architecture", "task_name"), [("bert", "classification"), ("llama", "causal-lm")]
)
def test_evaluation_does_not_depend_on_the_batch_size(
    family_directory: Callable[[str, str], Path], architecture: str, task_name: str
) -> None:
    """Counts over 11 examples are the same in batches of 1, 4 and 100, and none is counted twice."""
    model, task = load_family(family_directory(architecture, task_name), task_name), task_of(task_name)
    examples, adapter = examples_of(11, seed=2), random_state(model)
    one = count(model, task, examples, adapter, 1)
    halves = [count(model, task, part, adapter, 4) for part in (examples[:5], examples[5:])]
    for other in (
        count(model, task, examples, adapter, 4),
        count(model, task, examples, adapter, 100),
        {name: halves[0][name] + halves[1][name] for name in one},
    ):
        assert other.keys() == one.keys()
        for name in one:
            np.testing.assert_allclose(other[name], one[name], rtol=1e-5, err_msg=name)
    assert count(model, task, [], adapter, 4) == {}


@pytest.mark.parametrize("name", ["causal-lm", "instruction", "preference"])
def test_an_evaluation_holds_few_logits_at_once(
    name: str, family_directory: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many records there are, no pass exceeds the bound, and the sums are the same."""
    model, task = load_family(family_directory("llama", "causal-lm"), "causal-lm"), KINDS[name]
    examples, adapter = [example_of(name, (5, 6, 7, 8), at) for at in range(32)], random_state(model)
    whole = count(model, task, examples, adapter)
    most, seen = 40 * model.vocabulary, []
    monkeypatch.setattr("fedslm.tasks.passes.MOST_LOGITS", most)
    monkeypatch.setattr("fedslm.tasks.passes.LEAST_WIDTH", 1)  # the vocabulary is tiny
    hook = model.adapter.network.register_forward_hook(
        lambda *given: seen.append(given[2].logits.numel())
    )
    try:
        found = count(model, task, examples, adapter)
    finally:
        hook.remove()
    held = seen if name != "preference" else [a + b for a, b in zip(seen[::2], seen[1::2], strict=True)]
    assert max(held) == most
    for key, value in whole.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-5, err_msg=key)


def test_a_batch_of_nothing_has_no_pieces() -> None:
    """No units, no forward pass."""
    assert list(micro_batches([], 4)) == []
    assert [len(part) for part in micro_batches(alone(examples_of(5)), 2)] == [2, 2, 1]
