"""A head from the names of its classes, and normalized features."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.extras import load_with

from fedslm.adapter_keys import part_of
from fedslm.aggregation.methods import moving_keys
from fedslm.config import LoraConfig, ModelConfig, TaskConfig
from fedslm.errors import ModelError
from fedslm.models import label_head as module
from fedslm.models.initial import initial_state
from fedslm.models.label_head import label_head, spoken
from fedslm.models.loaded import LoadedModel, load
from fedslm.models.pooling import scaled
from fedslm.records import AdapterState

NAMES = ("card arrival", "lost_or-stolen card", "exchange rate", "top up failed", "age limit")
LORA = LoraConfig(rank=1, alpha=1.0, target_modules=("3.output.dense",))


@pytest.fixture
def model() -> LoadedModel:
    """The embedded base with a classifier on normalized features."""
    base = ModelConfig(base="demo", device="cpu")
    task = TaskConfig(name="classification", pooling="normalized", max_length=32)
    return load.__wrapped__(base, LORA, task, len(NAMES))


def seeded(model: LoadedModel) -> AdapterState:
    """The adapter before training."""
    shapes = {key: tuple(each.shape) for key, each in model.adapter.parameters.items()}
    return initial_state(shapes, 0)


def only(state: AdapterState, part: str, dimensions: int) -> np.ndarray:
    """The one tensor of a part."""
    (key,) = [key for key in state if part_of(key) == part and state[key].ndim == dimensions]
    return state[key]


def logits_of(model: LoadedModel, text: str) -> torch.Tensor:
    """Logits of one text, (classes,)."""
    encoded = model.tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        network = model.adapter.network
        return network(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits[
            0
        ]


def test_features_have_one_length() -> None:
    """√width for every text, whatever its mean; a mean of zero stays zero; half precision stays half."""
    features = scaled(torch.tensor([[3.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1e-3, 0.0, 0.0, 0.0]]))
    assert torch.allclose(features.norm(dim=1), torch.tensor([2.0, 0.0, 2.0]))
    assert scaled(torch.ones(1, 4, dtype=torch.bfloat16)).dtype is torch.bfloat16


def test_a_class_name_has_its_logit(model: LoadedModel) -> None:
    """The text of a class name gets logit 8 for its class, which is the largest."""
    model.adapter.write(label_head(model, NAMES, 32, seeded(model)))
    for number, name in enumerate(NAMES):
        logits = logits_of(model, spoken(name))
        assert int(logits.argmax()) == number
        assert math.isclose(float(logits[number]), 8.0, rel_tol=1e-3)


def test_a_name_without_letters_starts_at_zero(model: LoadedModel) -> None:
    """A number says nothing about a class; if no name says something, the whole head is zero."""
    start = seeded(model)
    head = only(label_head(model, ("0", "1", "2", "fever", "4"), 32, start), "head", 2)
    assert np.flatnonzero(np.abs(head).sum(axis=1)).tolist() == [3]
    assert not only(label_head(model, ("0", "1", "2", "3", "4"), 32, start), "head", 2).any()


def test_only_many_names_give_a_center(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of the names' features from the limit on; below it zero. A center is never trained."""
    assert not only(label_head(model, NAMES, 32, seeded(model)), "center", 1).any()
    monkeypatch.setattr(module, "_FOR_A_CENTER", len(NAMES))
    state = label_head(model, NAMES, 32, seeded(model))
    center = only(state, "center", 1)
    assert 0.1 < np.linalg.norm(center) <= math.sqrt(len(center)) + 1e-3
    moving = moving_keys("fedit", state)
    assert not any(part_of(key) == "center" for key in moving)
    assert any(part_of(key) == "head" for key in moving)
    model.adapter.write(state)  # the names keep their classes with the center, too
    assert [int(logits_of(model, spoken(name)).argmax()) for name in NAMES] == list(range(len(NAMES)))


def test_other_features_are_refused(family_directory: Callable[[str, str], Path]) -> None:
    """Without a center there is nothing to be scaled."""
    native = load_with(family_directory("bert", "classification"), "classification", LoraConfig(rank=1))
    with pytest.raises(ModelError, match="normalized"):
        label_head(native, NAMES, 32, seeded(native))


def test_a_trained_adapter_changes_no_start(model: LoadedModel) -> None:
    """The start is a function of base and names: `fedslm evaluate` computes it again after training."""
    start = label_head(model, NAMES, 32, seeded(model))
    with torch.no_grad():
        for key, parameter in model.adapter.parameters.items():
            parameter.add_(0.3 if part_of(key) != "center" else 1.0)
    again = label_head(model, NAMES, 32, seeded(model))
    assert again.sha256() == start.sha256()
