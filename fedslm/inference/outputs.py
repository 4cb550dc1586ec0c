"""What a network gives for examples: logits, and chances of the next token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fedslm.inference.trained import Trained, computing
from fedslm.tasks.base import Example, Tokens, pad_inputs
from fedslm.training.batches import forward

_BATCH_SIZE = 32


def logits_of(trained: Trained, examples: Sequence[Example]) -> list[NDArray[np.float32]]:
    """Logits of each example, in order: (classes,), or (tokens, classes) where words are tagged."""
    found: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(examples)
    order = sorted(range(len(examples)), key=lambda number: examples[number].length)
    with torch.inference_mode():
        for start in range(0, len(order), _BATCH_SIZE):
            chosen = order[start : start + _BATCH_SIZE]
            logits, _ = forward(trained.model, trained.task, [examples[at] for at in chosen])
            for at, row in zip(chosen, logits.float().cpu().numpy(), strict=True):
                found[at] = row
    return found


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Probabilities."""
    values = np.exp(logits.astype(np.float64) - float(logits.max()))
    shares: NDArray[np.float64] = values / values.sum()
    return shares


def next_chances(trained: Trained, sequences: Sequence[Tokens]) -> NDArray[np.float64]:
    """Probabilities of the next token, shape (sequences, vocabulary)."""
    model = trained.model
    batch = pad_inputs(sequences, int(model.tokenizer.pad_token_id))
    with computing(model):
        logits = model.adapter.network(**{k: each.to(model.device) for k, each in batch.items()}).logits
    last = [logits[row, len(ids) - 1].float().cpu().numpy() for row, ids in enumerate(sequences)]
    return np.stack([softmax(each) for each in last])
