"""Attaches a LoRA adapter to a base; reads, writes and saves it as an :class:`AdapterState`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedslm.adapter_keys import part_of
from fedslm.config import LoraConfig
from fedslm.errors import ModelError
from fedslm.models import families
from fedslm.models.networks import HEAD_NAMES
from fedslm.records import AdapterState

if TYPE_CHECKING:
    from torch import nn

    from fedslm.models.residual import Deltas

_MOST_SHOWN = 12


@dataclass(frozen=True)
class AttachedAdapter:
    """A PEFT model and its trainable tensors.

    Attributes:
        network: The PEFT model.
        parameters: Maps each PEFT state-dict key to its parameter object, sorted by key.
        deltas: The remainders that aggregation keeps next to the factors; not trained, and not read.
    """

    network: nn.Module
    parameters: dict[str, nn.Parameter]
    deltas: Deltas

    def read(self, keys: list[str] | None = None) -> AdapterState:
        """Copies tensors from the model as float32, with one transfer from its device."""
        import torch

        chosen = {
            key: self.parameters[key] for key in sorted(self.parameters if keys is None else keys)
        }
        if not chosen:
            return AdapterState({})
        flat = torch.cat([parameter.detach().float().reshape(-1) for parameter in chosen.values()])
        shapes = {key: tuple(parameter.shape) for key, parameter in chosen.items()}
        return AdapterState.of_flat(flat.cpu().numpy(), shapes)

    def write(self, state: AdapterState) -> None:
        """Copies tensors into the model; the parameter objects stay the same.

        Args:
            state: Any of the parameters and deltas. If it has every parameter, it is a whole adapter:
                the model then has only the deltas of ``state``.

        Raises:
            ModelError: A key is unknown or a shape differs; nothing was written.
        """
        aside = state.select({key for key in state if part_of(key) in ("delta_A", "delta_B")})
        own = state.select(set(state) - set(aside))
        for key, shape in own.shapes.items():
            parameter = self.parameters.get(key)
            if parameter is None or tuple(parameter.shape) != shape:
                raise ModelError(f"adapter tensor {key} of shape {shape} does not fit")
        self.deltas.check(aside)
        if own:
            _copy(own, [self.parameters[key] for key in own])
        self.deltas.write(aside, others_stay=len(own) < len(self.parameters))

    def train_only(self, keys: set[str]) -> None:
        """Makes exactly these tensors trainable."""
        for key, parameter in self.parameters.items():
            parameter.requires_grad_(key in keys)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Disables the adapter inside the block, and restores the previous state after it."""
        # PEFT makes all adapter tensors trainable when it re-enables the adapter, also frozen factors.
        wanted = [(parameter, parameter.requires_grad) for parameter in self.network.parameters()]
        try:
            with self.network.disable_adapter():  # type: ignore[operator]
                yield
        finally:
            for parameter, is_trained in wanted:
                parameter.requires_grad_(is_trained)

    def save(self, directory: Path) -> None:
        """Writes the adapter in PEFT's format, so that ``PeftModel.from_pretrained`` loads it.

        Raises:
            ModelError: PEFT's format cannot represent a tensor of the adapter.
        """
        if len(self.deltas) or any(part_of(key) == "lora_R" for key in self.parameters):
            raise ModelError("PEFT has neither deltas nor cores; use models.peft_export.save_plain")
        self.network.save_pretrained(directory)  # type: ignore[operator]


def attach(network: nn.Module, lora: LoraConfig, *, core: bool = False) -> AttachedAdapter:
    """Adds LoRA layers to a frozen base that is already on its device.

    Args:
        network: The frozen base.
        lora: Rank, scaling and targets.
        core: Whether each layer gets a core R between its factors, which the caller freezes (Fed-SB).

    Raises:
        ModelError: No layer matches ``lora.target_modules``.

    References:
        Hu et al. 2022, LoRA (arXiv 2106.09685).
    """
    from fedslm.models.peft_library import peft
    from fedslm.models.residual import Deltas

    heads = [name for name, _ in network.named_children() if name in HEAD_NAMES]
    targets, is_conv1d = _targets(network, lora.target_modules, heads)
    with warnings.catch_warnings():
        # PEFT uses a name that transformers has deprecated; the warning does not concern users.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        adapted: Any = peft.get_peft_model(
            network,
            peft.LoraConfig(
                r=lora.rank,
                lora_alpha=lora.alpha,
                use_rslora=lora.rslora,
                lora_dropout=lora.dropout,
                target_modules=targets,
                modules_to_save=heads or None,
                fan_in_fan_out=is_conv1d,
            ),
        )
    layers = {
        name: module
        for name, module in adapted.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    if core:
        from fedslm.models.fed_sb import insert_cores

        insert_cores(layers.values())
    named = dict(adapted.named_parameters())
    parameters = dict(sorted(peft.get_peft_model_state_dict(adapted, state_dict=named).items()))
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
    return AttachedAdapter(adapted.eval(), parameters, Deltas(layers))


def _targets(network: nn.Module, wanted: tuple[str, ...], heads: list[str]) -> tuple[list[str], bool]:
    """Returns the layers to adapt, and whether they store weights transposed (GPT-2)."""
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


def _copy(state: AdapterState, parameters: Sequence[nn.Parameter]) -> None:
    """Copies values into parameters of the same shapes and order, with one transfer to their device."""
    import torch

    flat = state.flat
    if flat is None:
        flat = np.concatenate([tensor.ravel() for tensor in state.tensors.values()])
    values = torch.tensor(flat).to(parameters[0].device)  # a copy: what was received is read-only
    parts = torch.split(values, [each.numel() for each in parameters])
    with torch.no_grad():
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.copy_(part.view_as(parameter))
