"""Sizes of a base, its adapter and a training step, computed without loading weights."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedslm.config import LoraConfig, ModelConfig, TaskConfig, TrainingConfig
from fedslm.config.tasks import TASKS
from fedslm.models import families, networks, precision
from fedslm.models.adapter import AttachedAdapter, attach
from fedslm.models.base import device_of
from fedslm.tasks.passes import bounded_budget

if TYPE_CHECKING:
    from torch import nn

_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
_FLOAT = 4
_SCALE_OF_4_BITS = 1 / 64 + 4 / (64 * 256)  # one byte per 64 values, one float per 256 of those bytes
_LEAST_WIDTH = 1 << 11  # fewest values that a layer holds per token, even with few classes
_HIDDEN_STATES, _WIDE_STATES, _LOGITS = 14, 4, 5  # kept per layer, per layer, once
_EVALUATED = 2  # copies of the logits at once: the logits and their logarithms


@dataclass(frozen=True)
class Footprint:
    """Sizes of a base with its adapter.

    Attributes:
        model_type: As in ``config.json``.
        family: Name of the architecture, if it is verified.
        parameters: Number of parameters of the base.
        dtype: Precision in which this machine computes.
        base_bytes: Size of the base in this precision, or quantized.
        whole_bytes: Size of the base in float32.
        shapes: Maps the key of each adapter tensor, heads included, to its shape.
        targets: Maps the name of each adapted layer to how many there are.
        heads: Names of new heads, which are trained from scratch.
        activation_bytes: Kept for the backward pass of one record of the maximum length; rough.
        evaluation_bytes: Logits and their copies in one evaluation pass; rough.
        layers: Number of layers; for an encoder-decoder, those of the encoder.
        cached_layers: How many of them are computed once for each record, since they lie below the
            lowest adapted one (:mod:`fedslm.models.cached_layers`).
        cached_bytes: What is kept of a record of the maximum length; 0 if nothing is.
    """

    model_type: str
    family: str | None
    parameters: int
    dtype: str
    base_bytes: int
    whole_bytes: int
    shapes: dict[str, tuple[int, ...]]
    targets: dict[str, int]
    heads: tuple[str, ...]
    activation_bytes: int
    evaluation_bytes: int
    layers: int
    cached_layers: int
    cached_bytes: int


def footprint(
    directory: Path, model: ModelConfig, lora: LoraConfig, task: TaskConfig, num_labels: int
) -> Footprint:
    """Builds a base without weights and computes its sizes.

    Args:
        directory: Directory with ``config.json``; no other file is read.
        model: Precision and checkpointing.
        lora: The adapter.
        task: The task of the network.
        num_labels: Classes; 0 if the task has none.

    Raises:
        ModelError: The architecture does not support the task, or cannot be trained; or this machine
            lacks the device.
    """
    values = families.configuration(directory)
    families.check(values, lora.target_modules, private=False)
    network = networks.on_meta(directory, task, num_labels)
    networks.check_length(network, task)
    count = networks.num_parameters(network)
    dtype = precision.chosen(model, device_of(model), lambda: count)
    model = model.model_copy(update={"dtype": dtype})
    network.requires_grad_(False)
    heads = tuple(name for name, _ in network.named_children() if name in networks.HEAD_NAMES)
    frozen = _frozen(network, heads)
    adapter = attach(network, lora)
    shapes = {key: tuple(each.shape) for key, each in adapter.parameters.items()}
    adapted = [key.split(".lora_A")[0].rsplit(".", 1)[-1] for key in shapes if ".lora_A." in key]
    known = families.PROVED.get(values["model_type"])
    return Footprint(
        model_type=values["model_type"],
        family=known.name if known else None,
        parameters=count,
        dtype=dtype,
        base_bytes=round(sum(count * _bytes(model, kind) for count, kind in frozen)),
        whole_bytes=_FLOAT * sum(count for count, _ in frozen),
        shapes=shapes,
        targets=dict(sorted(Counter(adapted).items())),
        heads=heads,
        activation_bytes=_activations(network, model, task),
        evaluation_bytes=_evaluation(network, task, num_labels, device_of(model).type),
        layers=networks.num_layers(directory),
        **_cached(adapter, model, task),
    )


@dataclass(frozen=True)
class Memory:
    """Memory that one process needs for training, in bytes, without libraries.

    Attributes:
        base: The frozen base.
        adapter: The adapter in float32, including frozen factors.
        optimizer: Gradients, sums and the optimizer's state.
        gradients: One gradient for each record of a pass (private training).
        activations: Activations of one pass; rough.
        evaluation: One pass over public records, instead of the last three; rough.
    """

    base: int
    adapter: int
    optimizer: int
    gradients: int
    activations: int
    evaluation: int

    @property
    def total(self) -> int:
        """The peak: a process either trains or evaluates."""
        training = self.optimizer + self.gradients + self.activations
        return self.base + self.adapter + max(training, self.evaluation)


def memory(
    sizes: Footprint,
    shapes: Mapping[str, tuple[int, ...]],
    trained: frozenset[str],
    training: TrainingConfig,
    *,
    records: int,
    private: bool,
) -> Memory:
    """Estimates the memory that training needs.

    Args:
        sizes: The base's sizes.
        shapes: The adapter's tensors (Fed-SB: with its cores).
        trained: Keys that are trained.
        training: The optimizer.
        records: Records that share a forward pass.
        private: Whether each record has its own gradient.
    """
    values = parameters(shapes, trained)
    copies = {"adamw": 2, "sgd": 0}[training.optimizer] + (2 if private else 1)
    return Memory(
        base=sizes.base_bytes,
        adapter=_FLOAT * parameters(shapes, frozenset(shapes)),
        optimizer=_FLOAT * copies * values,
        gradients=_FLOAT * values * records if private else 0,
        activations=sizes.activation_bytes * records,
        evaluation=sizes.evaluation_bytes,
    )


def machine(model: ModelConfig) -> tuple[str, int | None]:
    """Returns the device on which clients compute and its memory in bytes (None if unknown).

    Raises:
        ModelError: This machine has no such device.
    """
    import torch

    device = device_of(model)
    if device.type == "cuda":
        return "cuda", int(torch.cuda.mem_get_info(device)[1])
    return device.type, memory_here()


def memory_here() -> int | None:
    """Returns this machine's memory in bytes; None if it is unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not on Windows
        return None


def parameters(shapes: Mapping[str, tuple[int, ...]], keys: frozenset[str]) -> int:
    """Returns the number of values in some tensors.

    >>> parameters({"a": (2, 3), "b": (4,)}, frozenset({"a"}))
    6
    """
    total = 0
    for key in keys:
        size = 1
        for length in shapes[key]:
            size *= length
        total += size
    return total


def _frozen(network: nn.Module, heads: tuple[str, ...]) -> list[tuple[int, str]]:
    """Returns each frozen tensor's size and kind: a linear layer, a table or the rest."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    output = networks.inner(network).get_output_embeddings()
    precise = set(networks.inner(network)._keep_in_fp32_modules or ())
    seen: set[int] = set()
    found = []
    for name, module in network.named_modules():
        if name.split(".")[0] in heads:
            continue
        for which, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            kind = "rest"
            if isinstance(module, nn.Embedding) or module is output:
                kind = "table"
            elif isinstance(module, nn.Linear | Conv1D) and which == "weight":
                kind = "rest" if precise & set(name.split(".")) else "linear"
            found.append((parameter.numel(), kind))
    return found


def _bytes(model: ModelConfig, kind: str) -> float:
    """Returns the bytes of one value of a frozen tensor."""
    plain = _BYTES[model.dtype]
    match model.quantization, kind:
        case ("none", _) | (_, "rest"):
            return plain
        case "int8", "linear":
            return 1.0
        case "int4", "linear":
            return 0.5 + _SCALE_OF_4_BITS
    return min(plain, 2.0)


def _activations(network: Any, model: ModelConfig, task: TaskConfig) -> int:
    """Estimates the bytes that one record of the maximum length keeps for the backward pass."""
    config: Any = network.config
    length, hidden = task.max_length, int(config.hidden_size)
    wide = getattr(config, "intermediate_size", None) or getattr(config, "d_ff", None) or 4 * hidden
    layers = int(config.num_hidden_layers)
    each = _HIDDEN_STATES * hidden + _WIDE_STATES * int(wide)
    values = layers * hidden + each if model.gradient_checkpointing else layers * each
    size = _BYTES[model.dtype]
    written = task.max_target_length or task.max_length
    kind, logits = TASKS[task.name], 0
    if kind.network == "encoder-decoder":
        length += written
        logits = written * int(config.vocab_size)
    if kind.network == "decoder":
        logits = length * int(config.vocab_size)
    return round(kind.rows_per_example * (length * values * size + _LOGITS * logits * _FLOAT))


def _cached(adapter: AttachedAdapter, model: ModelConfig, task: TaskConfig) -> dict[str, int]:
    """Returns how many layers are computed once for each record, and what that keeps."""
    from fedslm.models.cached_layers import prefix_of

    kept = not model.gradient_checkpointing and device_of(model).type == "cpu"
    prefix = prefix_of(adapter) if kept else None
    if prefix is None:
        return {"cached_layers": 0, "cached_bytes": 0}
    tokens = TASKS[task.name].rows_per_example * task.max_length
    size = tokens * prefix.width * int(_BYTES[model.dtype])
    return {"cached_layers": len(prefix.below), "cached_bytes": size}


def _evaluation(network: Any, task: TaskConfig, num_labels: int, device: str) -> int:
    """Estimates the bytes of one evaluation pass's logits, or of one layer's states.

    The pass size is that of :mod:`fedslm.tasks.passes`. Without gradients, a layer's activations are
    freed when the next layer has run.
    """
    length, width = task.max_length, num_labels or int(network.config.vocab_size)
    kind = TASKS[task.name]
    if kind.network == "encoder-decoder":
        length = max(length, task.max_target_length or 0)  # the longer one counts in a pass
    if kind.has_rejected:
        width *= 2  # with and without the adapter
    rows = kind.rows_per_example
    tokens = rows * max(length, bounded_budget(width, device, rows))
    return _EVALUATED * _FLOAT * tokens * max(width, _LEAST_WIDTH)
