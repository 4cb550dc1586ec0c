"""Network outputs for examples: logits, and next-token probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fedslm.inference.trained import Trained, computing
from fedslm.tasks.base import Example, Tokens, pad_inputs
from fedslm.tasks.passes import evaluation_budget, passes
from fedslm.training.batches import forward


def logits_of(trained: Trained, examples: Sequence[Example]) -> list[NDArray[np.float32]]:
    """Returns logits of each example, in order: (classes,), or (tokens, classes) for tagging."""
    found: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(examples)
    model, task = trained.model, trained.task
    tokens = evaluation_budget(task, model.vocabulary, model.device.type)
    with torch.inference_mode():
        for chosen in passes(examples, tokens):
            logits, _ = forward(model, task, [examples[at] for at in chosen])
            for at, row in zip(chosen, logits.float().cpu().numpy(), strict=True):
                found[at] = row
    return found


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Returns probabilities from logits."""
    values = np.exp(logits.astype(np.float64) - float(logits.max()))
    shares: NDArray[np.float64] = values / values.sum()
    return shares


def next_chances(trained: Trained, sequences: Sequence[Tokens]) -> NDArray[np.float64]:
    """Returns the probabilities of the next token, shape (sequences, vocabulary)."""
    model = trained.model
    found = np.empty((len(sequences), 0))
    tokens = evaluation_budget(trained.task, model.vocabulary, model.device.type)
    for chosen in passes([Example(ids) for ids in sequences], tokens):
        batch = pad_inputs([sequences[at] for at in chosen], int(model.tokenizer.pad_token_id))
        last = torch.tensor([len(sequences[at]) - 1 for at in chosen])
        if model.keeps_positions:
            batch["logits_to_keep"], last = torch.unique(last, return_inverse=True)
        with computing(model):
            inputs = {key: each.to(model.device) for key, each in batch.items()}
            logits = model.adapter.network(**inputs).logits
        for row, (at, column) in enumerate(zip(chosen, last.tolist(), strict=True)):
            shares = softmax(logits[row, column].float().cpu().numpy())
            if not found.size:
                found = np.empty((len(sequences), len(shares)))
            found[at] = shares
    return found
