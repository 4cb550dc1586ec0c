"""Every task's loss under the private step: one clipped gradient for each record, whatever its rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.families import (
    SHAPES,
    UNKNOWN_TOKEN,
    alone,
    clipped,
    example_of,
    flat,
    gradient,
    load_family,
    one_step,
    ready,
    record_plan,
    task_of,
    user_plan,
)

from fedslm.aggregation.methods import trained_keys
from fedslm.privacy.encoding import grid_of
from fedslm.privacy.plan import WEAKEST_FIRST, Passes
from fedslm.tasks.base import Example
from fedslm.tasks.tokens import IGNORED
from fedslm.training.batches import forward

FamilyDirectory = Callable[[str, str], Path]
KINDS = [
    ("bert", "multi-label"),
    ("bert", "token-classification"),
    ("llama", "causal-lm"),
    ("llama", "instruction"),
    ("llama", "preference"),
    ("t5", "seq2seq"),
]
CLIP = 0.05


def examples_for(name: str, count: int) -> list[Example]:
    """Records of very different lengths."""
    generator = np.random.default_rng(5)
    return [one(name, generator, int(length)) for length in generator.integers(4, 16, count)]


def one(name: str, generator: np.random.Generator, length: int) -> Example:
    """One record; for tasks with a prompt its first two tokens are that."""
    plain = example_of(name, generator, length)
    ids = plain.input_ids
    asked = (IGNORED,) * 2
    match name:
        case "multi-label":
            return replace(plain, targets=tuple(int(x) for x in generator.integers(0, 2, 3)))
        case "instruction":
            return replace(plain, targets=(*asked, *ids[2:]))
        case "preference":
            other = (*ids[:2], *(int(x) for x in generator.integers(9, 1700, length)))
            worse = Example(other, targets=(*asked, *other[2:]))
            return replace(plain, targets=(*asked, *ids[2:]), rejected=worse)
    return plain


@pytest.mark.parametrize("passes", WEAKEST_FIRST)
@pytest.mark.parametrize(("family", "name"), KINDS)
def test_the_sum_is_that_of_clipped_gradients(
    family: str, name: str, passes: Passes, family_directory: FamilyDirectory
) -> None:
    """Before the noise: each record's own gradient by plain autograd, clipped, added up."""
    model, task = load_family(family_directory(family, name), name), task_of(name)
    examples = examples_for(name, 5)
    own = [gradient(model, task, example) for example in examples]
    assert all(np.linalg.norm(each) > 0 for each in own)
    for clip in (CLIP, 1e4):
        plan = record_plan(1e-6, clip, passes=passes)
        seen = one_step(model, task, plan, alone(examples), 3, shapes=SHAPES)
        expected = sum(clipped(each, clip) for each in own)
        atol = 2e-6 * max(1.0, abs(expected).max()) + len(own) * grid_of(clip)
        np.testing.assert_allclose(seen.exact, expected, atol=atol)


@pytest.mark.parametrize("passes", WEAKEST_FIRST)
@pytest.mark.parametrize(("family", "name"), KINDS)
def test_a_patient_is_clipped_once(
    family: str, name: str, passes: Passes, family_directory: FamilyDirectory
) -> None:
    """The gradients of a patient's records are added before the clip, also where a record has two rows."""
    model, task = load_family(family_directory(family, name), name), task_of(name)
    examples = examples_for(name, 5)
    own = [gradient(model, task, example) for example in examples]
    units = [examples[:3], examples[3:]]
    expected = clipped(sum(own[:3]), CLIP) + clipped(sum(own[3:]), CLIP)
    plan = user_plan(1e-6, CLIP, passes=passes)
    seen = one_step(model, task, plan, units, 8, shapes=SHAPES)
    np.testing.assert_allclose(seen.exact, expected, atol=2e-6)


@pytest.mark.parametrize("passes", WEAKEST_FIRST)
def test_a_record_without_labels_adds_nothing(
    passes: Passes, family_directory: FamilyDirectory
) -> None:
    """Its pass has no position to predict: alone its gradient is zero, and others are as without it."""
    model, task = (
        load_family(family_directory("llama", "instruction"), "instruction"),
        task_of("instruction"),
    )
    good = examples_for("instruction", 3)
    empty = replace(good[0], targets=(IGNORED,) * len(good[0].input_ids))
    plan = record_plan(1e-6, CLIP, passes=passes)
    assert not np.any(one_step(model, task, plan, alone([empty]), 8, shapes=SHAPES).exact)
    with_it = one_step(model, task, plan, alone([*good, empty]), 8, shapes=SHAPES).exact
    without = one_step(model, task, plan, alone(good), 8, shapes=SHAPES).exact
    np.testing.assert_allclose(with_it, without, atol=2e-6)


def test_a_broken_pair_counts_as_zero(family_directory: FamilyDirectory) -> None:
    """A pair whose rejected answer cannot be computed adds nothing, and the others are as without it."""
    model, task = (
        load_family(family_directory("llama", "preference"), "preference"),
        task_of("preference"),
    )
    good = examples_for("preference", 2)
    bad = replace(good[0], rejected=Example((9, UNKNOWN_TOKEN, 9), targets=(IGNORED, 9, 9)))
    plan = record_plan(1e-6, CLIP, passes="shared")
    with_it = one_step(model, task, plan, alone([*good, bad]), 8).exact
    without = one_step(model, task, plan, alone(good), 8).exact
    np.testing.assert_allclose(with_it, without, atol=2e-6)


def test_the_reference_is_the_base_and_leaves_frozen_tensors_frozen(
    family_directory: FamilyDirectory,
) -> None:
    """Preference compares with the model without its adapter; what FFA freezes stays frozen meanwhile."""
    model, task = (
        load_family(family_directory("llama", "preference"), "preference"),
        task_of("preference"),
    )
    state = ready(model)
    trained = trained_keys("ffa", state)
    model.adapter.train_only(set(trained))
    examples = examples_for("preference", 2)
    logits, batch = forward(model, task, examples)
    flags = {key: p.requires_grad for key, p in model.adapter.parameters.items()}
    assert {key for key, on in flags.items() if on} == trained
    model.adapter.write(type(state)({key: np.zeros_like(state[key]) for key in state}))
    plain, _ = forward(model, task, examples)
    assert torch.equal(batch["base_logits"], plain)
    assert not torch.allclose(logits, plain, atol=1e-3)


def test_dpo_gradients_are_those_of_the_formula(family_directory: FamilyDirectory) -> None:
    """The gradient agrees with one of −log σ(β·(…)) written out from log-softmax, computed apart."""
    model, task = (
        load_family(family_directory("llama", "preference"), "preference"),
        task_of("preference"),
    )
    (example,) = examples_for("preference", 1)
    found = gradient(model, task, example)
    ready(model)
    model.adapter.network.zero_grad()
    gains = []
    for side in (example, example.rejected):
        assert side is not None
        ids = torch.tensor([side.input_ids])
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad(), model.adapter.disabled():
            base = model.adapter.network(**inputs).logits
        tuned = model.adapter.network(**inputs).logits
        at = [number for number, target in enumerate(side.targets) if target != IGNORED]
        picked = [logits.log_softmax(-1)[0, [a - 1 for a in at]] for logits in (tuned, base)]
        wanted = ids[0, at].unsqueeze(-1)
        gains.append((picked[0] - picked[1]).gather(1, wanted).sum())
    loss = torch.log1p(torch.exp(-0.1 * (gains[0] - gains[1])))
    loss.backward()
    np.testing.assert_allclose(
        found, flat(p.grad for p in model.adapter.parameters.values()), atol=1e-6
    )
