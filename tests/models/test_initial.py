"""The adapter before training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.extras import load_with, random_deltas
from support.families import examples_of, load_family, task_of

from fedslm.adapter_keys import key_of, layers_of, part_of
from fedslm.config import LoraConfig
from fedslm.models.initial import initial_state
from fedslm.training.batches import forward


def test_factor_a_has_orthonormal_rows(family_directory: Callable[[str, str], Path]) -> None:
    """A·Aᵀ = I, B = 0, and the same seed gives the same bits."""
    model = load_family(family_directory("bert", "classification"), "classification")
    shapes = model.adapter.read().shapes
    state = initial_state(shapes, 5)
    for key in state:
        if "lora_A" in key:
            np.testing.assert_allclose(state[key] @ state[key].T, np.eye(len(state[key])), atol=1e-6)
        if "lora_B" in key:
            assert not state[key].any()
    assert state.sha256() == initial_state(shapes, 5).sha256() != initial_state(shapes, 6).sha256()


def test_a_core_starts_at_zero_between_orthonormal_factors(
    family_directory: Callable[[str, str], Path],
) -> None:
    """With a core B has orthonormal columns, R is zero, A and head are as without; it answers as the base."""
    directory, name = family_directory("bert", "classification"), "classification"
    model = load_with(directory, name, LoraConfig(rank=3), core=True)
    shapes = model.adapter.read().shapes
    state = initial_state(shapes, 5)
    without = initial_state({k: v for k, v in shapes.items() if part_of(k) != "lora_R"}, 5)
    for layer in layers_of(state):
        up, core = state[key_of(layer, "lora_B")], state[key_of(layer, "lora_R")]
        np.testing.assert_allclose(up.T @ up, np.eye(3), atol=1e-6)
        assert not core.any()
    for key in without:
        assert part_of(key) == "lora_B" or np.array_equal(state[key], without[key])
    plain = load_with(directory, name, LoraConfig(rank=3))
    plain.adapter.write(without)
    model.adapter.write(state)
    task, examples = task_of(name), examples_of(3)
    with torch.no_grad():
        expected = forward(plain, task, examples)[0]
        torch.testing.assert_close(forward(model, task, examples)[0], expected, atol=0, rtol=0)


@pytest.mark.parametrize(("rank", "width"), [(3, 8), (5, 4)])
def test_a_rank_beyond_the_width_leaves_zeros(rank: int, width: int) -> None:
    """There are only as many orthonormal rows or columns as the layer is wide; the rest is zero."""
    shapes = {"q.lora_A.weight": (rank, width), "q.lora_B.weight": (width, rank)}
    state = initial_state({**shapes, "q.lora_R.weight": (rank, rank)}, 0)
    expected = np.diag([1.0] * min(rank, width) + [0.0] * (rank - min(rank, width)))
    down, up = state["q.lora_A.weight"], state["q.lora_B.weight"]
    np.testing.assert_allclose(down @ down.T, expected, atol=1e-6)
    np.testing.assert_allclose(up.T @ up, expected, atol=1e-6)


def test_there_is_no_delta_at_the_start(family_directory: Callable[[str, str], Path]) -> None:
    """The shapes of a trained adapter give the same start, without the deltas that training left."""
    model = load_with(family_directory("gpt2", "causal-lm"), "causal-lm", LoraConfig(rank=3))
    shapes = model.adapter.read().shapes
    trained = {**shapes, **random_deltas(model).shapes}
    assert initial_state(trained, 1).sha256() == initial_state(shapes, 1).sha256()
