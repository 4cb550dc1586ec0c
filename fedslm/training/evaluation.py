"""Statistics of an adapter on the public evaluation split."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedslm.models.loaded import LoadedModel
from fedslm.records import AdapterState
from fedslm.tasks.base import Example, Task
from fedslm.training.batches import forward, micro_batches


def count(
    model: LoadedModel,
    task: Task,
    examples: Sequence[Example],
    adapter: AdapterState,
    batch_size: int,
) -> dict[str, float]:
    """Adds the task's statistics up over public examples.

    Args:
        model: The loaded model; its adapter is overwritten.
        task: What is measured.
        examples: Public examples.
        adapter: The whole adapter.
        batch_size: Records in one forward pass.

    Returns:
        Sums, for :meth:`fedslm.tasks.base.Task.metrics`; empty without examples.
    """
    model.adapter.write(adapter)
    model.adapter.network.eval()
    total: dict[str, float] = {}
    with torch.inference_mode():
        for part in micro_batches([[example] for example in examples], batch_size):
            logits, batch = forward(model, task, [example for unit in part for example in unit])
            for name, value in task.sums(logits, batch).items():
                total[name] = total.get(name, 0.0) + value
    return total
