"""Times a training pass in float32 and in bfloat16 on this machine: to advise, never to decide.

A base with random weights takes the passes, since their time does not depend on the values: nothing is
downloaded. For a deep base, networks of one and of six layers are timed, and the time of all layers is
extrapolated, since they are alike.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, TypeVar

import torch

from fedslm.config import LoraConfig, ModelConfig, TaskConfig
from fedslm.errors import TrainingError
from fedslm.models import footprint, networks, precision
from fedslm.models.adapter import attach
from fedslm.models.base import device_of
from fedslm.models.loaded import LoadedModel
from fedslm.tasks.base import Task
from fedslm.training.batches import forward
from fedslm.training.local import enter_training
from fedslm.training.threads import one_thread

_FEW, _SOME = 1, 6  # layers
_WORK, _EMULATED = 5e9, 5e8  # parameters x tokens of a pass
_LEAST_TOKENS = 32
_SECONDS, _LEAST_TURNS, _MOST_TURNS = 2.0, 2, 12  # the first turn is no measure
_SHARE, _BYTES = 0.25, 4  # of the machine's memory; bytes of a parameter
_GAIN = 1.1  # a smaller difference is not worth a setting
_K = TypeVar("_K")


@dataclass(frozen=True)
class Trial:
    """What is timed.

    Attributes:
        directory: Directory with ``config.json``; no other file is read.
        model: The base; its device, quantization and checkpointing count.
        lora: The adapter.
        task: The task of the network.
        learning: The same task, which makes records up.
        records: Records in a pass.
    """

    directory: Path
    model: ModelConfig
    lora: LoraConfig
    task: TaskConfig
    learning: Task
    records: int


@dataclass(frozen=True)
class Variant:
    """Precision and storage of a base."""

    dtype: Literal["float32", "bfloat16"]
    quantization: Literal["none", "int8", "int4"] = "none"

    @property
    def name(self) -> str:
        """The name in a table, such as "int8 in bfloat16"."""
        return self.dtype if self.quantization == "none" else f"{self.quantization} in {self.dtype}"


@dataclass(frozen=True)
class Speed:
    """The time of one forward and backward pass.

    Attributes:
        seconds: Variant to seconds: processor time of one thread on a CPU, wall time elsewhere.
        records: Records in the pass.
        tokens: Tokens of a record; fewer than the task allows if the base is slow here.
        quantization: Storage of the base in the config.
    """

    seconds: Mapping[Variant, float]
    records: int
    tokens: int
    quantization: Literal["none", "int8", "int4"]

    @property
    def gain(self) -> float:
        """How many times as fast as float32 bfloat16 is, in the storage of the config."""
        whole, half = Variant("float32", self.quantization), Variant("bfloat16", self.quantization)
        return self.seconds[whole] / self.seconds[half]

    def as_json(self, dtype: str) -> dict[str, Any]:
        """Returns all of it as JSON values, with the advice for a config that computes in ``dtype``."""
        return {
            "seconds": {variant.name: seconds for variant, seconds in self.seconds.items()},
            "records": self.records,
            "tokens": self.tokens,
            "bfloat16_gain": self.gain,
            "advice": self.advice(dtype),
        }

    def advice(self, dtype: str) -> str:
        """Returns advice for a config that computes in ``dtype`` on this machine; "" if it is right."""
        if dtype == "float32":
            if self.gain < _GAIN:
                return ""
            return (
                'model.dtype="bfloat16" saves time here; it then holds for all clients, so measure on '
                "their machines too"
            )
        if self.gain >= _GAIN:
            return ""
        if self.gain > 1 / _GAIN:
            return "bfloat16 saves memory here, but no time"
        return 'model.dtype="float32" saves time here'


def measure(trial: Trial) -> Speed:
    """Times a pass in float32 and in bfloat16, and in plain float32 too if the base is quantized.

    Takes about two seconds for a base of 100 million parameters, and a few more for a larger one. The
    variants take turns and the fastest turn of each counts: other work on the machine only adds time.

    Raises:
        TrainingError: The base cannot be timed here; the message gives the reason.
    """
    return _timed(trial, tuple(dict.fromkeys([Variant("float32"), *_stored_as(trial)])))


def seconds_per_token(trial: Trial, dtype: str) -> float:
    """Returns the time of a forward and backward pass for each token, in one precision.

    Takes about a second for a base of 100 million parameters; the clock is that of :class:`Speed`.

    Raises:
        TrainingError: As :func:`measure`.
    """
    variant = next(each for each in _stored_as(trial) if each.dtype == dtype)
    speed = _timed(trial, (variant,))
    return speed.seconds[variant] / (speed.records * speed.tokens)


def _stored_as(trial: Trial) -> tuple[Variant, Variant]:
    """Both precisions, in the storage of the config."""
    return Variant("float32", trial.model.quantization), Variant("bfloat16", trial.model.quantization)


def _timed(trial: Trial, variants: tuple[Variant, ...]) -> Speed:
    """Times a pass of each variant.

    Raises:
        TrainingError: The base cannot be timed here; the message gives the reason.
    """
    device, layers = device_of(trial.model), networks.num_layers(trial.directory)
    depths = _depths(layers, trial.lora)
    try:
        records, tokens = _size(trial, device, depths, len(variants))
        examples = [trial.learning.made_up(tokens)] * records

        def one_pass(model: LoadedModel) -> None:
            logits, batch = forward(model, trial.learning, examples)
            trial.learning.per_example_loss(logits, batch).sum().backward()  # type: ignore[no-untyped-call]

        with torch.random.fork_rng(devices=()), one_thread():
            models = {(v, depth): _built(trial, device, v, depth) for v in variants for depth in depths}
            best = fastest(models, one_pass, _clock(device))
    except Exception as error:  # an unusual base or device, or too little memory
        raise TrainingError(f"no pass could be timed: {networks.first(error)}") from error
    seconds = {v: extrapolated({depth: best[v, depth] for depth in depths}, layers) for v in variants}
    return Speed(seconds, records, tokens, trial.model.quantization)


def fastest(
    models: Mapping[_K, LoadedModel], one_pass: Callable[[LoadedModel], None], now: Callable[[], float]
) -> dict[_K, float]:
    """Returns the shortest time of a pass of each model; the models take turns.

    Args:
        models: Any keys to models.
        one_pass: What is timed.
        now: The clock, in seconds.
    """
    best = dict.fromkeys(models, math.inf)
    began = now()
    for turn in range(_MOST_TURNS):
        for key, model in models.items():
            start = now()
            one_pass(model)
            if turn > 0:  # the first compiles kernels and packs weights
                best[key] = min(best[key], now() - start)
        if turn + 1 >= _LEAST_TURNS and now() - began > _SECONDS:
            break
    return best


def extrapolated(seconds: Mapping[int, float], layers: int) -> float:
    """Returns the time of all layers from that of a few, which grows by the same time for each.

    >>> extrapolated({1: 2.0, 3: 3.0}, 5), extrapolated({4: 7.0}, 4)
    (4.0, 7.0)
    """
    few, some = min(seconds), max(seconds)
    if few == some:
        return seconds[some]
    each = (seconds[some] - seconds[few]) / (some - few)
    return seconds[some] + max(0.0, each) * (layers - some)


def _depths(layers: int, lora: LoraConfig) -> tuple[int, ...]:
    """Returns the numbers of layers to time: all of them if targets name some by number."""
    named = any(re.search(r"(^|\.)\d+(\.|$)", target) for target in lora.target_modules)
    return (layers,) if named or layers <= _SOME else (_FEW, _SOME)


def _size(
    trial: Trial, device: torch.device, depths: tuple[int, ...], variants: int
) -> tuple[int, int]:
    """Returns records and tokens of a pass that is short enough, if all models fit into memory."""
    with torch.device("meta"):
        parameters = [
            networks.num_parameters(_untrained(trial, torch.float32, depth)) for depth in depths
        ]
    held = footprint.machine(trial.model)[1]
    needed = _BYTES * variants * sum(parameters)
    if held is not None and needed > _SHARE * held:
        raise TrainingError(f"it would take {needed / 1e9:.0f} GB of memory")
    work = (_WORK if precision.is_native(device) else _EMULATED) / parameters[-1]
    records = max(1, min(trial.records, int(work / trial.task.max_length)))
    return records, min(trial.task.max_length, max(_LEAST_TOKENS, int(work / records)))


def _untrained(trial: Trial, dtype: torch.dtype, depth: int) -> torch.nn.Module:
    """Returns a network of some layers, with random weights."""
    return networks.untrained(trial.directory, trial.task, len(trial.learning.labels), dtype, depth)


def _built(trial: Trial, device: torch.device, variant: Variant, depth: int) -> LoadedModel:
    """Returns a model of a variant with an adapter, ready to train."""
    dtype = getattr(torch, variant.dtype)
    network = _untrained(trial, dtype, depth).requires_grad_(False)
    if variant.quantization == "none":
        network = network.to(device)
    else:
        from fedslm.models.quantized import quantize

        quantize(network, variant.quantization, dtype, device)
    adapter = attach(network, trial.lora)
    if trial.model.gradient_checkpointing:
        networks.checkpoint_activations(network)
    no_tokenizer: Any = SimpleNamespace(pad_token_id=0)
    model = LoadedModel(adapter, no_tokenizer, device, "", dtype)
    enter_training(model)
    return model


def _clock(device: torch.device) -> Callable[[], float]:
    """Returns a clock: of this process, which other work on the CPU does not move, or of the wall."""
    if device.type == "cpu":
        return time.process_time

    def now() -> float:
        torch.accelerator.synchronize()
        return time.perf_counter()

    return now
