"""Main directions of what each adapted layer sees on public examples (EVA): a start for A.

A frozen A passes on what lies in its rows alone, and of all rows these keep the most of the inputs.
They would tell about the examples: those must be public.
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
from fedslm.tasks.passes import passes, width_of

_WIDEST = 4096
_MOMENTS_BYTES = 512 << 20  # held at a time; more layers take further passes
_BATCH_SIZE = 16
_NOISE_LEVEL = 1e-10  # of the largest moment: below it, a direction is rounding


def input_directions(
    model: LoadedModel, task: Task, examples: Sequence[Example], rank: int
) -> dict[str, FloatArray]:
    """Leading right singular vectors of each adapted layer's inputs, over all real tokens.

    The moments Σ x·xᵀ are added up in float64 and decomposed, so the result does not depend on how
    examples are batched. Inputs are not centred: a constant part of them is a direction like any other.

    Args:
        model: The loaded model; its adapter is off meanwhile, and is left as it was.
        task: Makes batches of examples.
        examples: PUBLIC examples.
        rank: Number of directions.

    Returns:
        For each layer orthonormal rows in falling order of what they keep, each with its largest
        component positive: (rank, in), or fewer rows if the inputs span no more.

    Raises:
        ModelError: There is no example, a layer is too wide, or its inputs belong to no tokens.

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
    """Replaces every A by directions, completed by the seeded rows where there are too few.

    Args:
        initial: The seeded adapter.
        directions: As :func:`input_directions` gives them.

    Raises:
        ModelError: Directions and adapter do not belong together.
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
    """PEFT's modules by the names that adapter keys have."""
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
    """Layers whose moments are held in memory together."""
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
    """Σ x·xᵀ of each layer of a group, float64, (in, in)."""
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
        _evaluating(network),
        model.adapter.disabled(),
        _watched(group, moments, masks),
    ):
        for chosen in passes(examples, width_of(task, model.vocabulary), _BATCH_SIZE):
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
    """Adds up the moments of every forward pass inside the block."""

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
def _evaluating(network: Any) -> Iterator[None]:
    """No dropout inside the block; the modes of all modules are as before after it."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _masks(batch: Tensors) -> list[torch.Tensor]:
    """Which positions hold tokens: those of the input, and those that a decoder reads."""
    masks = [batch["attention_mask"].bool()]
    if "decoder_input_ids" in batch:
        masks.append(batch["labels"] >= 0)
    return masks


def _told_apart(batch: Tensors) -> Tensors:
    """Makes a decoder's length differ from its encoder's, so that a shape says which one it is."""
    if "decoder_input_ids" not in batch:
        return batch
    if batch["decoder_input_ids"].shape != batch["input_ids"].shape:
        return batch
    more = {key: torch.nn.functional.pad(batch[key], (0, 1)) for key in ("input_ids", "attention_mask")}
    return {**batch, **more}


def _real(name: str, inputs: torch.Tensor, masks: Sequence[torch.Tensor]) -> torch.Tensor:
    """A layer's inputs at real tokens, (tokens, in); one for each text where a layer sees no more."""
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
    """Eigenvectors of the largest eigenvalues, those at rounding's level left out, (≤ rank, in)."""
    values, vectors = torch.linalg.eigh(moment)
    if not bool(torch.isfinite(values).all()):
        raise ModelError(
            'public examples give inputs that are not finite; use lora.initial="orthonormal"'
        )
    count = min(rank, int((values > _NOISE_LEVEL * values[-1]).sum()))
    return _signed(vectors.t().flip(0)[:count].cpu().numpy())


def _signed(rows: NDArray[np.float64]) -> FloatArray:
    """The same rows, the largest component of each positive."""
    largest = np.take_along_axis(rows, np.abs(rows).argmax(axis=1, keepdims=True), axis=1)
    return np.ascontiguousarray(rows * np.where(largest < 0, -1.0, 1.0), dtype=np.float32)


def _completed(rows: FloatArray, seeded: FloatArray) -> FloatArray:
    """Rows, and behind them orthonormal ones from the span of the seeded ones, as many as those."""
    missing = len(seeded) - len(rows)
    if missing == 0:
        return rows
    known = rows.astype(np.float64)
    rest = seeded - (seeded @ known.T) @ known
    _, values, vectors = np.linalg.svd(rest, full_matrices=False)
    found = np.zeros((missing, seeded.shape[1]))
    count = min(missing, int((values > 1e-6).sum()))  # there are none beyond the layer's width
    found[:count] = vectors[:count]
    return np.vstack([rows, _signed(found)])
