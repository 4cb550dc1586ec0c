"""First weights of a classifier from public examples of its classes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fedslm.errors import ModelError
from fedslm.models.label_head import head_keys, pooled
from fedslm.models.loaded import LoadedModel
from fedslm.records import AdapterState, FloatArray
from fedslm.tasks.base import Example, Task
from fedslm.tasks.passes import evaluation_budget, passes

_MOST = 20_000  # examples: the features of all of them are held in memory
_PENALTY = 0.1  # of the squared distance from the start, on features of length 1
_STEPS = 100


def public_head(
    model: LoadedModel, task: Task, examples: Sequence[Example], start: AdapterState
) -> AdapterState:
    """Fits the head's weights to public examples by regression that stays near a start.

    Minimises Σ cross-entropy + 0.05 · ‖W - W₀‖² over the weights W on features of length 1, so few
    examples move the start a little. The bias stays.

    Args:
        model: The loaded model, with ``task.pooling = "normalized"``; its adapter is not used.
        task: Classification.
        examples: PUBLIC examples; of more than 20,000, that many at equal distances are used.
        start: The adapter with a head W₀ and a center (:func:`fedslm.models.label_head.label_head`).

    Raises:
        ModelError: There is no example, features are not finite, or they are not normalized.
    """
    center, weight = head_keys(start)
    if not examples:
        raise ModelError(
            'task.head="public" needs public examples of the classes, and data.public_source and '
            'data.public_split give none that the task can use; use "labels"'
        )
    chosen = [examples[number] for number in _spread(len(examples))]
    features = _centered(_features(model, task, chosen), start[center])
    if not np.isfinite(features).all():
        raise ModelError('public examples give features that are not finite; use task.head="labels"')
    head = _fitted(features, [example.target for example in chosen], start[weight])
    return start.merged(AdapterState({weight: head}))


def _spread(count: int) -> list[int]:
    """Positions of at most ``_MOST`` of ``count`` examples, at equal distances."""
    return [round(each) for each in np.linspace(0, count - 1, min(count, _MOST)).tolist()]


def _features(model: LoadedModel, task: Task, examples: Sequence[Example]) -> FloatArray:
    """Features of the examples, (examples, width)."""
    found: FloatArray | None = None
    for chosen in passes(examples, evaluation_budget(task, model.vocabulary, model.device.type)):
        rows = pooled(model, [examples[number].input_ids for number in chosen])
        if found is None:
            found = np.zeros((len(examples), rows.shape[1]), dtype=np.float32)
        found[chosen] = rows
    if found is None:
        raise ModelError("no public example fits in a pass")
    return found


def _centered(features: FloatArray, center: FloatArray) -> FloatArray:
    """Features as the classifier gets them, here of length 1."""
    moved = features - center
    scaled: FloatArray = moved / np.linalg.norm(moved, axis=1, keepdims=True).clip(1e-12)
    return scaled


def _fitted(features: FloatArray, classes: Sequence[int], start: FloatArray) -> FloatArray:
    """Weights (classes, width) on features of length √width."""
    import torch
    from torch.nn.functional import cross_entropy

    length = math.sqrt(features.shape[1])
    inputs, targets = torch.from_numpy(features).double(), torch.tensor(classes)
    first = torch.from_numpy(start).double() * length
    weights = first.clone().requires_grad_()
    solver = torch.optim.LBFGS([weights], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        solver.zero_grad()
        fit = cross_entropy(inputs @ weights.t(), targets, reduction="sum")
        total = fit + _PENALTY / 2 * (weights - first).square().sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    solver.step(loss)  # type: ignore[no-untyped-call]
    return (weights.detach() / length).float().numpy()
