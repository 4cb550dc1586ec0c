"""Logical batches cut into micro-batches, and the forward pass that all loops share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch

from fedslm.models.loaded import LoadedModel
from fedslm.tasks.base import Example, Task, Tensors


def micro_batches(examples: Sequence[Example], size: int) -> Iterator[list[Example]]:
    """Cuts a logical batch into pieces of similar length; a sum over it does not care.

    >>> [len(part) for part in micro_batches([Example((1,)), Example((1, 2)), Example((3,))], 2)]
    [2, 1]
    """
    ordered = sorted(examples, key=lambda example: len(example.input_ids))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def forward(
    model: LoadedModel, task: Task, examples: Sequence[Example]
) -> tuple[torch.Tensor, Tensors]:
    """Runs the model on one micro-batch.

    Returns:
        Logits, and the batch on the model's device.
    """
    collated = task.collate(examples, int(model.tokenizer.pad_token_id))
    batch = {key: tensor.to(model.device) for key, tensor in collated.items()}
    dtype = next(model.adapter.network.parameters()).dtype
    mixed = dtype != torch.float32
    with torch.autocast(model.device.type, dtype=dtype) if mixed else nullcontext():
        output = model.adapter.network(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        )
    return output.logits, batch
