"""Splits logical batches into micro-batches, and runs the forward pass that all loops share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import torch

from fedslm.models.cached_layers import CachedLayers
from fedslm.models.loaded import LoadedModel
from fedslm.tasks.base import INPUTS, Example, Task, Tensors
from fedslm.tasks.passes import together
from fedslm.tasks.tokens import at_labels

Unit = Sequence[Example]  # records that are clipped together: one record, or a user's records


def micro_batches(
    units: Sequence[Unit], size: int, *, tokens: float = math.inf
) -> Iterator[list[Unit]]:
    """Splits a logical batch into parts of similar length; a unit is never split.

    Args:
        units: The logical batch.
        size: Most records in a part, unless one unit has more on its own.
        tokens: Most records times the longest in a part, with the same exception.

    >>> short, long = Example((1,)), Example((1, 2))
    >>> [len(part) for part in micro_batches([[short], [long], [short]], 2)]
    [2, 1]
    >>> [len(part) for part in micro_batches([[short, long], [long]], 2)]
    [1, 1]
    >>> [len(part) for part in micro_batches([[short], [long], [short]], 3, tokens=5)]
    [2, 1]
    """
    sizes = [(len(unit), max(example.length for example in unit)) for unit in units]
    for part in together(sizes, tokens, size):
        yield [units[number] for number in part]


def forward(
    model: LoadedModel,
    task: Task,
    examples: Sequence[Example],
    *,
    keep_all: bool = False,
    layers: CachedLayers | None = None,
) -> tuple[torch.Tensor, Tensors]:
    """Runs the model on one micro-batch.

    A decoder computes its output layer only at positions where some row has a label. (An
    encoder-decoder has nothing to save: its decoder reads only targets.) The kept positions depend on
    all rows, so keep every one where rows that share a pass must not affect each other's rounding.

    Args:
        model: The model.
        task: Collates the examples.
        examples: At least one.
        keep_all: Compute the logits of every position, whatever the labels.
        layers: See :func:`run`.

    Returns:
        Logits, and the batch on the model's device, both at the same positions. The batch includes the
        base's own logits if the task compares with them.
    """
    return run(model, task, collated(model, task, examples, keep_all=keep_all), layers)


def collated(
    model: LoadedModel, task: Task, examples: Sequence[Example], *, keep_all: bool = False
) -> Tensors:
    """Collates one micro-batch; see :func:`forward`."""
    batch = task.collate(examples, int(model.tokenizer.pad_token_id))
    return batch if keep_all or task.labels or not model.keeps_positions else at_labels(batch)


def run(
    model: LoadedModel, task: Task, collated: Tensors, layers: CachedLayers | None = None
) -> tuple[torch.Tensor, Tensors]:
    """Runs the model on a collated batch, of whatever shape; see :func:`forward`.

    Args:
        model: The model.
        task: The task.
        collated: The batch.
        layers: The model's layers that are not computed again for a record; None computes all of them.
    """
    batch = {key: tensor.to(model.device) for key, tensor in collated.items()}
    inputs = {key: batch[key] for key in INPUTS if key in batch}
    mixed = model.dtype != torch.float32
    with ExitStack() as stack:
        if mixed:
            stack.enter_context(torch.autocast(model.device.type, dtype=model.dtype))
        if layers is not None:
            stack.enter_context(layers.serving(inputs))
        if task.uses_base:
            with torch.no_grad(), model.adapter.disabled():
                batch["base_logits"] = model.adapter.network(**inputs).logits
        output = model.adapter.network(**inputs)
    return output.logits, batch
