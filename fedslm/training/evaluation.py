"""Statistics of an adapter on examples that are not used for training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fedslm.models.loaded import LoadedModel
from fedslm.records import AdapterState
from fedslm.tasks.base import Example, Task
from fedslm.tasks.passes import evaluation_budget, passes
from fedslm.training.batches import forward

Statistics = dict[str, NDArray[np.float64]]


def statistics(
    model: LoadedModel,
    task: Task,
    examples: Sequence[Example],
    adapter: AdapterState,
    *,
    again: bool = False,
) -> Statistics:
    """Computes the task's statistics of each example.

    Args:
        model: The loaded model; its adapter is overwritten.
        task: The task that is evaluated.
        examples: Any number.
        adapter: The whole adapter.
        again: Whether the same examples are evaluated again in this process: then
            :attr:`fedslm.models.loaded.LoadedModel.cached_layers` save time.

    Returns:
        Name to an array of shape (examples, …), in the order of the examples; empty without examples.
    """
    model.adapter.write(adapter)
    model.adapter.network.eval()
    tokens = evaluation_budget(task, model.vocabulary, model.device.type)
    order: list[int] = []
    parts: dict[str, list[torch.Tensor]] = {}
    with torch.inference_mode():
        for chosen in passes(examples, tokens):
            order += chosen
            some = [examples[number] for number in chosen]
            logits, batch = forward(model, task, some, layers=model.cached_layers if again else None)
            for name, values in task.statistics(logits, batch).items():
                parts.setdefault(name, []).append(values)
    back = np.argsort(order)
    whole = {name: torch.cat(values) for name, values in parts.items()}  # one transfer for each
    return {name: values.cpu().double().numpy()[back] for name, values in whole.items()}


def count(
    model: LoadedModel,
    task: Task,
    examples: Sequence[Example],
    adapter: AdapterState,
    *,
    again: bool = False,
) -> Statistics:
    """Sums the task's statistics over the examples.

    Args:
        model: The loaded model; its adapter is overwritten.
        task: The task that is evaluated.
        examples: Any number.
        adapter: The whole adapter.
        again: See :func:`statistics`.

    Returns:
        Sums, for :meth:`fedslm.tasks.base.Task.metrics`; empty without examples.
    """
    found = statistics(model, task, examples, adapter, again=again)
    return {name: values.sum(axis=0) for name, values in found.items()}
