"""Attach a LoRA adapter to a base model; read, write and save it as an :class:`AdapterState`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedslm.config import LoraConfig
from fedslm.errors import ModelError
from fedslm.models import families
from fedslm.models.networks import HEAD_NAMES
from fedslm.records import AdapterState, FloatArray
from fedslm.rng import stream

if TYPE_CHECKING:
    from torch import nn

_HEAD_STDDEV = 0.02
_MOST_SHOWN = 12


@dataclass(frozen=True)
class AttachedAdapter:
    """A PEFT model and its trainable tensors.

    Attributes:
        network: The PEFT model.
        parameters: PEFT state-dict key to the parameter object behind it, sorted by key.
    """

    network: nn.Module
    parameters: dict[str, nn.Parameter]

    def read(self, keys: list[str] | None = None) -> AdapterState:
        """Copies tensors out of the model as float32."""
        chosen = self.parameters if keys is None else {key: self.parameters[key] for key in keys}
        return AdapterState(
            {key: parameter.detach().float().cpu().numpy().copy() for key, parameter in chosen.items()}
        )

    def write(self, state: AdapterState) -> None:
        """Copies tensors into the model; the parameter objects stay the same.

        Raises:
            ModelError: A key is unknown or a shape differs.
        """
        import torch

        with torch.no_grad():
            for key, tensor in state.tensors.items():
                parameter = self.parameters.get(key)
                if parameter is None or tuple(parameter.shape) != tensor.shape:
                    raise ModelError(f"adapter tensor {key} of shape {tensor.shape} does not fit")
                parameter.copy_(torch.from_numpy(tensor))

    def train_only(self, keys: set[str]) -> None:
        """Makes exactly these tensors trainable."""
        for key, parameter in self.parameters.items():
            parameter.requires_grad_(key in keys)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Runs the base without the adapter inside the block; afterwards all is as it was."""
        # PEFT makes every adapter tensor trainable when it turns them on again, frozen factors too.
        wanted = [(parameter, parameter.requires_grad) for parameter in self.network.parameters()]
        try:
            with self.network.disable_adapter():  # type: ignore[operator]
                yield
        finally:
            for parameter, is_trained in wanted:
                parameter.requires_grad_(is_trained)

    def save(self, directory: Path) -> None:
        """Writes the adapter as PEFT does, so that ``PeftModel.from_pretrained`` loads it."""
        self.network.save_pretrained(directory)  # type: ignore[operator]


def attach(network: nn.Module, lora: LoraConfig) -> AttachedAdapter:
    """Adds LoRA layers to a frozen base that is already on its device.

    Args:
        network: The frozen base.
        lora: Rank, scaling and targets.

    Raises:
        ModelError: No layer matches ``lora.target_modules``.

    References:
        Hu et al. 2022, LoRA (arXiv 2106.09685).
    """
    from fedslm.models.peft_library import peft

    heads = [name for name, _ in network.named_children() if name in HEAD_NAMES]
    targets, is_conv1d = _targets(network, lora.target_modules, heads)
    with warnings.catch_warnings():
        # PEFT asks by a name that transformers is about to give up: news for neither's users.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        adapted: Any = peft.get_peft_model(
            network,
            peft.LoraConfig(
                r=lora.rank,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                target_modules=targets,
                modules_to_save=heads or None,
                fan_in_fan_out=is_conv1d,
            ),
        )
    named = dict(adapted.named_parameters())
    parameters = dict(sorted(peft.get_peft_model_state_dict(adapted, state_dict=named).items()))
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
    return AttachedAdapter(adapted.eval(), parameters)


def initial_state(shapes: dict[str, tuple[int, ...]], seed: int) -> AdapterState:
    """The adapter before training: A has seeded orthonormal rows, B is zero, the head is small.

    With orthonormal rows A·Aᵀ = I, so the noise that private training adds to B is passed on to the
    weights undistorted.

    Args:
        shapes: Key to shape, as in an attached adapter.
        seed: The run's seed.
    """
    return AdapterState({key: _initial(key, shape, seed) for key, shape in shapes.items()})


def is_frozen_factor(key: str) -> bool:
    """True for the factor A, which FFA-LoRA freezes."""
    return ".lora_A." in key


def _initial(key: str, shape: tuple[int, ...], seed: int) -> FloatArray:
    """One tensor of the initial adapter."""
    generator = stream(seed, "adapter", key)
    if is_frozen_factor(key):
        columns, _ = np.linalg.qr(generator.standard_normal((shape[1], shape[0])))
        rows = np.zeros(shape)
        rows[: columns.shape[1]] = columns.T
        return rows.astype(np.float32)
    if ".lora_B." in key or len(shape) == 1:
        return np.zeros(shape, dtype=np.float32)
    return (_HEAD_STDDEV * generator.standard_normal(shape)).astype(np.float32)


def _targets(network: nn.Module, wanted: tuple[str, ...], heads: list[str]) -> tuple[list[str], bool]:
    """Full names of the layers to adapt, and whether they store weights transposed (GPT-2)."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    families.check_targets(wanted)
    wanted = families.usual_targets(str(network.config.model_type), wanted)  # type: ignore[union-attr]
    output = getattr(network, "get_output_embeddings", lambda: None)()
    kinds = {
        name: type(module)
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not output
        and name.split(".")[0] not in heads
    }
    chosen = [
        name
        for name in kinds
        if wanted == ("all-linear",)
        or any(name == suffix or name.endswith(f".{suffix}") for suffix in wanted)
    ]
    if not chosen:
        suffixes = sorted({name.rsplit(".", 1)[-1] for name in kinds})
        raise ModelError(
            f"lora.target_modules={list(wanted)} matches no layer; this model has "
            f"{', '.join(suffixes[:_MOST_SHOWN])}"
        )
    transposed = {kinds[name] is Conv1D for name in chosen}
    if len(transposed) > 1:
        raise ModelError(
            f"lora.target_modules={list(wanted)} mixes Linear and Conv1D layers; name one kind"
        )
    return chosen, transposed.pop()
