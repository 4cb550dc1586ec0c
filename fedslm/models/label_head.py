"""First weights of a classifier, and the center of its features, from the public names of its classes.

Only the names and the base are used: no record, so nothing is spent. A sentence encoder places a class
name near the texts of the class; the names of many classes together show the direction that all of its
features share.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from fedslm.adapter_keys import part_of
from fedslm.errors import ModelError
from fedslm.models.activations import evaluating
from fedslm.models.loaded import LoadedModel
from fedslm.models.pooling import scaled
from fedslm.records import AdapterState, FloatArray
from fedslm.tasks.base import Tokens, pad_inputs, tokenise

_LOGIT = 8.0  # logit of a text that has exactly the features of a class name
_FOR_A_CENTER = 20  # classes: the mean over few names is about the classes, not about the encoder


def label_head(
    model: LoadedModel, labels: Sequence[str], max_length: int, initial: AdapterState
) -> AdapterState:
    """Replaces the head's weights by the classes' directions, and the center by the names' mean.

    With fewer than 20 named classes the center stays zero. A class whose name has no letter starts at
    zero.

    Args:
        model: The loaded model, with ``task.pooling = "normalized"``; its adapter is not used.
        labels: Class names, which are public.
        max_length: Most tokens of a name.
        initial: The seeded adapter.

    Returns:
        The adapter in which a text with a class name's features has logit 8 for that class.

    Raises:
        ModelError: The adapter has no center: its features are not normalized.
    """
    center_key, weight = head_keys(initial)
    named = [number for number, label in enumerate(labels) if re.search(r"[^\W\d_]", label)]
    head = np.zeros_like(initial[weight])
    if not named:
        return initial.merged(AdapterState({weight: head}))
    names = tokenise([spoken(labels[number]) for number in named], model.tokenizer, max_length)
    features = np.concatenate([pooled(model, [each.input_ids]) for each in names])
    center = np.zeros_like(initial[center_key])
    if len(named) >= _FOR_A_CENTER:
        center = features.mean(axis=0)
    width = features.shape[1]
    directions = features - center
    directions *= math.sqrt(width) / np.linalg.norm(directions, axis=1, keepdims=True).clip(1e-12)
    head[named] = _LOGIT / width * directions
    return initial.merged(AdapterState({weight: head, center_key: center}))


def head_keys(initial: AdapterState) -> tuple[str, str]:
    """Returns the keys of the center and of the head's weights.

    Raises:
        ModelError: The adapter has no center: its features are not normalized.
    """
    keys = {part: [key for key in initial if part_of(key) == part] for part in ("center", "head")}
    weights = [key for key in keys["head"] if initial[key].ndim == 2]
    if len(keys["center"]) != 1 or len(weights) != 1:
        raise ModelError('a start other than task.head="random" needs task.pooling="normalized"')
    return keys["center"][0], weights[0]


def spoken(label: str) -> str:
    """Returns a class name as words.

    >>> spoken("Refund_not-showingUp")
    'Refund not showing Up'
    """
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", re.sub(r"[_\-./]+", " ", label)).strip()


def pooled(model: LoadedModel, texts: Sequence[Tokens]) -> FloatArray:
    """Features of tokenised texts by the base without its adapter, (texts, width), of length √width."""
    import torch

    network: Any = model.adapter.network.get_base_model()  # type: ignore[operator]
    batch = pad_inputs(texts, int(model.tokenizer.pad_token_id))
    inputs = {key: tensor.to(model.device) for key, tensor in batch.items()}
    with torch.no_grad(), evaluating(network), model.adapter.disabled(), _precision(model):
        found: FloatArray = scaled(network.mean(**inputs).float()).cpu().numpy()
    return found


def _precision(model: LoadedModel) -> AbstractContextManager[Any]:
    """Computes in the precision of the base."""
    import torch

    if not model.is_rounded:
        return nullcontext()
    return torch.autocast(model.device.type, dtype=model.dtype)
