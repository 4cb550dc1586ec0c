"""A head fitted to public examples."""

from __future__ import annotations

import math

import numpy as np
import pytest
from models.test_label_head import LORA, NAMES, logits_of, only, seeded
from scipy.optimize import minimize
from scipy.special import log_softmax

from fedslm.config import DataConfig, ModelConfig, TaskConfig
from fedslm.errors import ModelError
from fedslm.models import public_head as module
from fedslm.models.label_head import label_head, pooled
from fedslm.models.loaded import LoadedModel, load
from fedslm.models.public_head import public_head
from fedslm.records import AdapterState
from fedslm.tasks import build
from fedslm.tasks.base import Example, Task

TASK = TaskConfig(name="classification", pooling="normalized", max_length=32)
TEXTS = ("fever and cough", "pain in the left knee", "no cough today", "rate of the heart is high")
CLASSES = (0, 1, 0, 2)


@pytest.fixture
def model() -> LoadedModel:
    """The embedded base with a classifier on normalized features."""
    return load.__wrapped__(ModelConfig(base="demo", device="cpu"), LORA, TASK, len(NAMES))


@pytest.fixture
def task() -> Task:
    """Classification with the names' classes."""
    return build(TASK, DataConfig(source="demo"), NAMES)


def prepared(model: LoadedModel, task: Task) -> tuple[Example, ...]:
    """The public examples."""
    rows = [{"text": text, "label": NAMES[at]} for text, at in zip(TEXTS, CLASSES, strict=True)]
    return task.prepare(rows, model.tokenizer).examples


def start_of(model: LoadedModel) -> AdapterState:
    """The start from class names."""
    return label_head(model, NAMES, 32, seeded(model))


def test_it_minimises_what_it_says(model: LoadedModel, task: Task) -> None:
    """SciPy finds the same weights from the formula of the docstring."""
    examples, start = prepared(model, task), start_of(model)
    features = np.concatenate([pooled(model, [each.input_ids]) for each in examples]).astype(float)
    length = math.sqrt(features.shape[1])
    features /= length
    first = only(start, "head", 2).astype(float) * length

    def objective(flat: np.ndarray) -> float:
        weights = flat.reshape(first.shape)
        losses = log_softmax(features @ weights.T, axis=1)[np.arange(len(features)), CLASSES]
        return float(-losses.sum() + 0.05 * np.square(weights - first).sum())

    def gradient(flat: np.ndarray) -> np.ndarray:
        weights = flat.reshape(first.shape)
        chances = np.exp(log_softmax(features @ weights.T, axis=1))
        chances[np.arange(len(features)), CLASSES] -= 1
        return (chances.T @ features + 0.1 * (weights - first)).ravel()

    found = minimize(objective, first.ravel(), jac=gradient, method="L-BFGS-B", options={"gtol": 1e-9})
    head = only(public_head(model, task, examples, start), "head", 2) * length
    assert np.abs(head - found.x.reshape(first.shape)).max() < 1e-3
    assert objective(head.astype(float).ravel()) < objective(first.ravel())


def test_examples_get_their_classes(model: LoadedModel, task: Task) -> None:
    """Whatever the names said, each public example now has its class; only the head's weights change."""
    start = start_of(model)
    state = public_head(model, task, prepared(model, task), start)
    assert [key for key in start if not np.array_equal(start[key], state[key])] == [
        key for key in start if key.endswith("classifier.weight")
    ]
    model.adapter.write(state)
    assert [int(logits_of(model, text).argmax()) for text in TEXTS] == list(CLASSES)


def test_too_many_examples_are_thinned_out(
    model: LoadedModel, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Examples at equal distances are used, so that sorted classes all take part."""
    monkeypatch.setattr(module, "_MOST", 2)
    examples, start = prepared(model, task), start_of(model)
    few = public_head(model, task, examples, start)
    assert few.sha256() == public_head(model, task, (examples[0], examples[-1]), start).sha256()


def test_no_example_is_refused(model: LoadedModel, task: Task) -> None:
    """A start that nothing supports is an error that says what to use instead."""
    with pytest.raises(ModelError, match=r'public examples.*use "labels"'):
        public_head(model, task, (), start_of(model))
