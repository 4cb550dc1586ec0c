"""Initial values of A from the main directions of each adapted layer's inputs on public examples (EVA).

A frozen A keeps only the part of its inputs that is in the span of its rows; of all rows, the main
directions keep the most. They reveal information about the examples, which must therefore be public.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedslm.adapter_keys import key_of, part_of
from fedslm.errors import ModelError
from fedslm.models.loaded import LoadedModel
from fedslm.records import AdapterState, FloatArray
from fedslm.tasks.base import INPUTS, Example, Task, Tensors
from fedslm.tasks.passes import evaluation_budget, passes

_WIDEST = 4096
_MOMENTS_BYTES = 512 << 20  # held at once; more layers need further passes
_NOISE_LEVEL = 1e-10  # relative to the largest eigenvalue; a direction below it is rounding error


def input_directions(
    model: LoadedModel, task: Task, examples: Sequence[Example], rank: int
) -> dict[str, FloatArray]:
    """Computes the leading right singular vectors of each adapted layer's inputs, over all real tokens.

    The moments Σ x·xᵀ are summed in float64 and decomposed, so the result does not depend on how
    examples are batched. Inputs are not centred: their constant part counts as a direction as well.

    Args:
        model: The loaded model; its adapter is disabled during the computation and is not changed.
        task: The task, which collates the examples.
        examples: PUBLIC examples.
        rank: Number of directions.

    Returns:
        For each layer, orthonormal rows in decreasing order of the input energy they keep, each with
        its largest component positive: (rank, in), or fewer rows if the inputs span fewer dimensions.

    Raises:
        ModelError: There is no example, a layer is too wide, or its inputs cannot be matched to tokens.

    References:
        Paischer et al. 2024, EVA (arXiv 2410.07170), with the same rank for all layers.
    """
    if not examples:
        raise ModelError('lora.initial="eva" needs public examples; use "orthonormal"')
    layers = _layers(model)
    directions: dict[str, FloatArray] = {}
    for group in _groups(layers):
        moments = _moments(model, task, examples, group)
        for name, moment in moments.items():
            directions[name] = _leading(moment, rank)
    return dict(sorted(directions.items()))


def eva_state(initial: AdapterState, directions: Mapping[str, FloatArray]) -> AdapterState:
    """Replaces each A by the directions, filled up with the seeded rows if there are too few.

    Args:
        initial: The seeded adapter.
        directions: The result of :func:`input_directions`.

    Raises:
        ModelError: The directions do not match the adapter.
    """
    changed: dict[str, FloatArray] = {}
    for key in (key for key in initial if part_of(key) == "lora_A"):
        rows = directions.get(key.removesuffix(".lora_A.weight"))
        if rows is None or rows.shape[1] != initial[key].shape[1] or len(rows) > len(initial[key]):
            raise ModelError(f"there are no directions that fit {key} of shape {initial[key].shape}")
        changed[key] = _completed(rows, initial[key])
    if len(changed) < len(directions):
        unknown = sorted({key_of(layer, "lora_A") for layer in directions} - set(changed))
        raise ModelError(f"there are directions for {unknown[0]}, which the adapter lacks")
    return initial.merged(AdapterState(changed))


def _layers(model: LoadedModel) -> dict[str, Any]:
    """Returns PEFT's modules by the layer names in adapter keys."""
    modules = dict(model.adapter.network.named_modules())
    keys = [key for key in model.adapter.parameters if part_of(key) == "lora_A"]
    layers = {name: modules[name] for name in (key.removesuffix(".lora_A.weight") for key in keys)}
    for name, module in layers.items():
        if module.in_features > _WIDEST:
            raise ModelError(
                f'{name} has {module.in_features} inputs; lora.initial="eva" decomposes a square of '
                f'at most {_WIDEST}: use "orthonormal", or leave such layers out of lora.target_modules'
            )
    return layers


def _groups(layers: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields groups of layers whose moments are held in memory together."""
    group: dict[str, Any] = {}
    held = 0
    for name, module in layers.items():
        size = 8 * module.in_features**2
        if group and held + size > _MOMENTS_BYTES:
            yield group
            group, held = {}, 0
        group[name] = module
        held += size
    yield group


def _moments(
    model: LoadedModel, task: Task, examples: Sequence[Example], group: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Computes Σ x·xᵀ of each layer of a group, float64, (in, in)."""
    home = torch.device("cpu") if model.device.type == "mps" else model.device  # mps has no float64
    moments = {
        name: torch.zeros(2 * (module.in_features,), dtype=torch.float64, device=home)
        for name, module in group.items()
    }
    masks: list[torch.Tensor] = []
    mixed = model.dtype != torch.float32
    precision = torch.autocast(model.device.type, dtype=model.dtype) if mixed else nullcontext()
    network: Any = model.adapter.network
    with (
        torch.no_grad(),
        evaluating(network),
        model.adapter.disabled(),
        _watched(group, moments, masks),
    ):
        tokens = evaluation_budget(task, model.vocabulary, model.device.type)
        for chosen in passes(examples, tokens):
            collated = task.collate(
                [examples[number] for number in chosen], int(model.tokenizer.pad_token_id)
            )
            batch = _told_apart({key: each.to(model.device) for key, each in collated.items()})
            masks[:] = _masks(batch)
            with precision:
                network(**{key: batch[key] for key in INPUTS if key in batch})
    return moments


@contextmanager
def _watched(
    group: Mapping[str, Any], moments: Mapping[str, torch.Tensor], masks: list[torch.Tensor]
) -> Iterator[None]:
    """Adds to the moments in every forward pass inside the block."""

    def add(name: str, _: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        rows = _real(name, inputs[0], masks).to(moments[name].device).double()
        moments[name].addmm_(rows.t(), rows)

    handles = [module.register_forward_pre_hook(partial(add, name)) for name, module in group.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(network: Any) -> Iterator[None]:
    """Disables dropout inside the block, and restores the modes of all modules after it."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _masks(batch: Tensors) -> list[torch.Tensor]:
    """Returns the masks of token positions: of the input, and of the decoder's input if any."""
    masks = [batch["attention_mask"].bool()]
    if "decoder_input_ids" in batch:
        masks.append(batch["labels"] >= 0)
    return masks


def _told_apart(batch: Tensors) -> Tensors:
    """Makes the decoder's length differ from the encoder's, so that shapes tell them apart."""
    if "decoder_input_ids" not in batch:
        return batch
    if batch["decoder_input_ids"].shape != batch["input_ids"].shape:
        return batch
    more = {key: torch.nn.functional.pad(batch[key], (0, 1)) for key in ("input_ids", "attention_mask")}
    return {**batch, **more}


def _real(name: str, inputs: torch.Tensor, masks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns a layer's inputs at real tokens, (tokens, in), or one per text for a pooled layer."""
    for mask in masks:
        if inputs.shape[:-1] == mask.shape:
            return inputs[mask]
    if inputs.ndim == 2 and len(inputs) == len(masks[0]):
        return inputs
    raise ModelError(
        f"the inputs of {name} have shape {tuple(inputs.shape)}, which does not say what belongs to "
        f'which token; use lora.initial="orthonormal" for this base'
    )


def _leading(moment: torch.Tensor, rank: int) -> FloatArray:
    """Returns the eigenvectors of the largest eigenvalues, except at rounding level, (≤ rank, in)."""
    values, vectors = torch.linalg.eigh(moment)
    if not bool(torch.isfinite(values).all()):
        raise ModelError(
            'public examples give inputs that are not finite; use lora.initial="orthonormal"'
        )
    count = min(rank, int((values > _NOISE_LEVEL * values[-1]).sum()))
    return _signed(vectors.t().flip(0)[:count].cpu().numpy())


def _signed(rows: NDArray[np.float64]) -> FloatArray:
    """Returns the same rows with the largest component of each positive."""
    largest = np.take_along_axis(rows, np.abs(rows).argmax(axis=1, keepdims=True), axis=1)
    return np.ascontiguousarray(rows * np.where(largest < 0, -1.0, 1.0), dtype=np.float32)


def _completed(rows: FloatArray, seeded: FloatArray) -> FloatArray:
    """Appends orthonormal rows from the span of the seeded ones, up to the number of seeded rows."""
    missing = len(seeded) - len(rows)
    if missing == 0:
        return rows
    known = rows.astype(np.float64)
    rest = seeded - (seeded @ known.T) @ known
    _, values, vectors = np.linalg.svd(rest, full_matrices=False)
    found = np.zeros((missing, seeded.shape[1]))
    count = min(missing, int((values > 1e-6).sum()))  # there are no more than the layer's width
    found[:count] = vectors[:count]
    return np.vstack([rows, _signed(found)])
