"""A unit's gradient is its own: no other record of a batch shapes it, whatever adapter a server sends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.families import examples_of, load_family, random_state, task_of

from fedslm.models.loaded import LoadedModel
from fedslm.privacy.plan import ExamplePlan
from fedslm.records import AdapterState
from fedslm.tasks.base import Example
from fedslm.training.local import enter_training
from fedslm.training.steps import stepping

PLAN = ExamplePlan(8.0, 1e-5, 1.0, 1.0, 0.5, 1, 1)


@pytest.fixture(scope="module")
def model(family_directory: Callable[[str, str], Path]) -> LoadedModel:
    """A tiny BERT classifier."""
    return load_family(family_directory("bert", "classification"), "classification", "mean")


def clipped_sum(
    model: LoadedModel, plan: ExamplePlan, state: AdapterState, examples: list[Example]
) -> torch.Tensor:
    """The sum of one real step before the noise, in float64."""
    model.adapter.write(state)
    model.adapter.train_only(set(state))
    enter_training(model)
    optimizer = torch.optim.SGD(list(model.adapter.parameters.values()), lr=1e-9)
    seen: list[torch.Tensor] = []

    def look(private: Any) -> None:
        seen.append(torch.cat([p.summed_grad.double().flatten() for p in private.params]))

    task = task_of("classification")
    with stepping(model, task, plan, optimizer, 64) as step:
        step.optimizer.attach_step_hook(look)  # type: ignore[attr-defined]
        step([[example] for example in examples])
    return seen[0]


def moves(model: LoadedModel, plan: ExamplePlan, scale: float) -> float:
    """Largest move of the sum, in clip norms, when one long record joins twelve short ones."""
    start = random_state(model)
    state = AdapterState({k: (scale * v).astype(np.float32) for k, v in start.tensors.items()})
    others = [replace(each, input_ids=each.input_ids[:7]) for each in examples_of(12)]
    extra = replace(examples_of(1, seed=3)[0], input_ids=tuple(range(5, 35)))
    with_it = clipped_sum(model, plan, state, [*others, extra])
    return float((with_it - clipped_sum(model, plan, state, others)).norm()) / plan.clip_norm


@pytest.mark.parametrize("scale", [1.0, 1e2, 1e4])
def test_one_record_moves_the_sum_by_at_most_the_clip_norm(model: LoadedModel, scale: float) -> None:
    """Also under an adapter so large that rounding decides everything."""
    assert moves(model, PLAN, scale) <= 1 + 1e-5


def test_passes_that_are_shared_couple_records(model: LoadedModel) -> None:
    """With shared passes a hostile adapter breaks the bound: this is why policies refuse it by default."""
    shared = replace(PLAN, passes="shared")
    assert max(moves(model, shared, scale) for scale in (1e2, 1e3, 1e4, 1e5)) > 1.01


def test_an_honest_adapter_keeps_the_bound_in_shared_passes(model: LoadedModel) -> None:
    """With an adapter of ordinary size the coupling is a rounding error."""
    assert moves(model, replace(PLAN, passes="shared"), 1.0) <= 1 + 1e-4
