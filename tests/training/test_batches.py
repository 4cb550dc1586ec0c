"""Logical batches cut into micro-batches, and sums that do not depend on the cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.families import alone, examples_of, load_family, random_state, ready, task_of
from support.kinds import KINDS, example_of

from fedslm.models.loaded import LoadedModel
from fedslm.tasks.base import Example, Task, Tensors
from fedslm.tasks.tokens import IGNORED
from fedslm.training.batches import forward, micro_batches
from fedslm.training.evaluation import count
from fedslm.training.steps import PlainStep

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
def test_evaluation_does_not_depend_on_its_passes(
    family_directory: Callable[[str, str], Path],
    architecture: str,
    task_name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Counts over 11 examples are the same in passes of one, a few and all, and none is counted twice."""
    model, task = load_family(family_directory(architecture, task_name), task_name), task_of(task_name)
    examples, adapter = examples_of(11, seed=2), random_state(model)

    def counted(tokens: int, *parts: list[Example]) -> list[dict[str, np.ndarray]]:
        for name in ("CPU_TOKENS", "GPU_TOKENS"):
            monkeypatch.setattr(f"fedslm.tasks.passes.{name}", tokens)
        return [count(model, task, part, adapter) for part in parts]

    (one,) = counted(1, examples)
    halves = counted(40, examples[:5], examples[5:])
    for other in (
        *counted(40, examples),
        *counted(10_000, examples),
        {name: halves[0][name] + halves[1][name] for name in one},
    ):
        assert other.keys() == one.keys()
        for name in one:
            np.testing.assert_allclose(other[name], one[name], rtol=1e-5, err_msg=name)
    assert counted(40, []) == [{}]


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

    def see(*given: Any) -> None:
        seen.append(given[2]["input_ids"].numel() * model.vocabulary)
        assert given[3].logits.numel() < seen[-1]  # nothing is computed for a last token

    hook = model.adapter.network.register_forward_hook(see, with_kwargs=True)
    try:
        found = count(model, task, examples, adapter)
    finally:
        hook.remove()
    held = seen if name != "preference" else [a + b for a, b in zip(seen[::2], seen[1::2], strict=True)]
    assert max(held) == most
    for key, value in whole.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-5, err_msg=key)


@settings(deadline=None)
@given(UNITS, st.integers(1, 10), st.integers(1, 60))
def test_micro_batches_respect_the_tokens_unless_one_unit_has_more(
    lengths: list[list[int]], size: int, tokens: int
) -> None:
    """A piece of several units is padded to at most ``tokens``, and no other limit is lifted by that."""
    for part in micro_batches(numbered(lengths), size, tokens=tokens):
        records = [example for unit in part for example in unit]
        padded = len(records) * max(example.length for example in records)
        assert len(part) == 1 or (padded <= tokens and len(records) <= size)


@pytest.mark.parametrize(
    ("architecture", "name", "rows"),
    [("bert", "classification", 1), ("llama", "preference", 2)],
)
def test_a_plain_step_keeps_the_token_budget(
    architecture: str,
    name: str,
    rows: int,
    family_directory: Callable[[str, str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No pass pads to more tokens, rows of one record counted, and the step is that of one pass."""
    model, task = load_family(family_directory(architecture, name), name), task_of(name)
    examples = [replace(conversation(name, 3, 2 + at, at), target=at % 3) for at in range(9)]
    after, seen = [], []
    hook = model.adapter.network.register_forward_hook(
        lambda *given: seen.append(given[2]["input_ids"].numel()), with_kwargs=True
    )
    try:
        for tokens in (30, 1, 10_000):
            for device in ("CPU", "GPU"):
                monkeypatch.setattr(f"fedslm.tasks.passes.{device}_TOKENS", tokens)
            ready(model)
            parameters = list(model.adapter.parameters.values())
            seen.clear()
            step = PlainStep(model, task, torch.optim.SGD(parameters, lr=0.1), 32)
            step(alone(examples))
            assert max(seen) <= max(tokens, rows * 13)
            assert (len(set(seen)) == 1) == (tokens == 10_000)
            after.append(torch.cat([p.detach().flatten() for p in parameters]))
    finally:
        hook.remove()
    for other in after[1:]:
        torch.testing.assert_close(other, after[0], rtol=1e-5, atol=1e-6)


def test_a_batch_of_nothing_has_no_pieces() -> None:
    """No units, no forward pass."""
    assert list(micro_batches([], 4)) == []
    assert [len(part) for part in micro_batches(alone(examples_of(5)), 2)] == [2, 2, 1]


DECODING = ["causal-lm", "instruction", "preference"]


def conversation(name: str, asked: int, answered: int, number: int) -> Example:
    """An example with a prompt of its own length; without labels if nothing is answered."""
    ids = tuple(int(x) for x in np.random.default_rng(number).integers(9, 1700, asked + answered))
    targets = (*(IGNORED,) * asked, *ids[asked:])
    if name == "causal-lm":
        return Example(ids, targets=tuple(1 + at // 2 for at in range(len(ids))))
    worse = Example(ids[::-1], targets=(*(IGNORED,) * asked, *ids[::-1][asked:]))
    return Example(ids, targets=targets, rejected=worse if name == "preference" else None)


def with_gradient(
    model: LoadedModel, task: Task, examples: list[Example], *, keep_all: bool
) -> tuple[torch.Tensor, torch.Tensor, Tensors]:
    """Losses, the adapter's gradient of their sum, and the batch."""
    ready(model)
    model.adapter.network.zero_grad()
    logits, batch = forward(model, task, examples, keep_all=keep_all)
    losses = task.per_example_loss(logits, batch)
    losses.sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.adapter.parameters.values()])
    return losses.detach(), gradient, {**batch, "logits": logits.detach()}


@pytest.mark.parametrize("name", DECODING)
def test_only_positions_with_labels_have_logits(
    name: str, family_directory: Callable[[str, str], Path]
) -> None:
    """Losses, gradients, scores and statistics are those of all positions, from as many as needed."""
    model, task = load_family(family_directory("llama", "causal-lm"), "causal-lm"), KINDS[name]
    sizes = [(6, 2), (9, 4), (7, 1)]  # labels are predicted at positions 5, 6 and 8 to 11
    examples = [conversation(name, *size, number) for number, size in enumerate(sizes)]
    few, all_of_them = (
        with_gradient(model, task, examples, keep_all=keep_all) for keep_all in (False, True)
    )
    torch.testing.assert_close(few[:2], all_of_them[:2], rtol=1e-5, atol=1e-6)
    rows = len(examples) * task.rows_per_example
    assert all_of_them[2]["logits"].shape == (rows, 13, model.vocabulary)
    kept = 12 if name == "causal-lm" else 6
    assert few[2]["logits"].shape == (rows, kept, model.vocabulary)
    assert few[2]["labels"].shape == (rows, kept)
    found = [
        {
            **task.statistics(batch["logits"], batch),
            "score": task.per_example_score(batch["logits"], batch),
        }
        for batch in (few[2], all_of_them[2])
    ]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["instruction", "preference"])
def test_a_batch_without_labels_has_no_gradient(
    name: str, family_directory: Callable[[str, str], Path]
) -> None:
    """Where no row has a label, the loss is one that nothing can change."""
    model, task = load_family(family_directory("llama", "causal-lm"), "causal-lm"), KINDS[name]
    examples = [conversation(name, 6, 0, number) for number in range(2)]
    losses, gradient, batch = with_gradient(model, task, examples, keep_all=False)
    assert batch["logits"].shape[1] == 1
    assert bool(torch.isfinite(losses).all())
    assert not gradient.any()


@pytest.mark.parametrize(
    ("architecture", "name"),
    [("bert", "classification"), ("llama", "token-classification"), ("t5", "seq2seq")],
)
def test_other_networks_compute_all_their_logits(
    architecture: str, name: str, family_directory: Callable[[str, str], Path]
) -> None:
    """A classifier, a tagger and an encoder-decoder are given what they were."""
    model, task = load_family(family_directory(architecture, name), name), task_of(name)
    examples = examples_of(3, name=name)
    (few, batch), (all_of_them, _) = (
        forward(model, task, examples, keep_all=keep_all) for keep_all in (False, True)
    )
    assert "logits_to_keep" not in batch
    assert torch.equal(few, all_of_them)
