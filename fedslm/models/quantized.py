"""Bases in 8 or 4 bits: the linear layers of a loaded base, quantised one at a time.

Other layers stay unchanged, except embeddings, which keep half their bits. All computation uses the
precision in the config: a few rows of a weight at a time are widened when they are used, and
activations are never rounded to integers, so that no record's rounding depends on another's.
bitsandbytes packs and unpacks the weights.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedslm.errors import ModelError
from fedslm.models.networks import HEAD_NAMES, inner
from fedslm.models.peft_library import bitsandbytes as bnb

Kind = Literal["int8", "int4"]
Rows = Callable[[slice, torch.Tensor], torch.Tensor]  # widens rows of a stored weight, like another
_PIECE_BYTES = 1 << 20  # widened at once
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # constants from malloc.h
_BLOCK = 64  # values that share a scale in 4 bits


def quantize(network: nn.Module, kind: Kind, dtype: torch.dtype, device: torch.device) -> None:
    """Quantises a frozen base in place and moves it to its device.

    Args:
        network: Best memory-mapped from its files: then the whole base is never in memory at once.
        kind: "int8" uses one scale per row, "int4" is NF4 in blocks of 64 with compressed scales.
        dtype: The precision of the computation.
        device: The device for the base.

    Raises:
        ModelError: This device or this machine's library does not support it.

    References:
        Dettmers et al. 2022, LLM.int8() (arXiv 2208.07339); 2023, QLoRA (arXiv 2305.14314).
    """
    left = _left_alone(network)
    smaller = _in_8_bits if kind == "int8" else _in_4_bits
    if kind == "int4":
        _heap("mallopt", _M_MMAP_THRESHOLD, _PIECE_BYTES // 2)  # each unpacking allocates new memory
        _heap("mallopt", _M_TRIM_THRESHOLD, 64 << 20)
    try:
        for name, layer in list(network.named_modules()):
            if isinstance(layer, nn.Linear | Conv1D) and not left(name, layer):
                parent, _, child = name.rpartition(".")
                setattr(network.get_submodule(parent), child, smaller(layer, dtype, device))
                _heap("malloc_trim", 0)
    except Exception as error:  # kernels that a device lacks raise many unrelated types
        raise ModelError(
            f'model.quantization="{kind}" does not work on {device}: {error}; use "none", or another '
            f"device"
        ) from error
    _keep_the_rest(network, dtype, device)
    setattr(network, f"is_loaded_in_{'8bit' if kind == 'int8' else '4bit'}", True)  # PEFT checks it


class Int8Linear(bnb.nn.Linear8bitLt):  # type: ignore[misc]
    """A layer in 8 bits; unlike the library's, it does not quantise its activations."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns x·Wᵀ + b."""
        return _product(x, self.rows, self.out_features, self.bias)

    def rows(self, which: slice, like: torch.Tensor) -> torch.Tensor:
        """Returns some rows of W."""
        packed = self.weight.data[which]
        scales = (self.weight.SCB[which].unsqueeze(1) / 127.0).to(like.dtype)
        return _room(packed, like).copy_(packed).mul_(scales)


class Int4Linear(bnb.nn.Linear4bit):  # type: ignore[misc]
    """A layer in 4 bits; unlike the library's, it is the same in training and in evaluation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns x·Wᵀ + b."""
        return _product(x, self.rows, self.out_features, self.bias)

    def rows(self, which: slice, like: torch.Tensor) -> torch.Tensor:
        """Returns some rows of W; they start at a block boundary."""
        state = self.weight.quant_state
        scales = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        start, stop, _ = which.indices(self.out_features)
        first, last = start * self.in_features, stop * self.in_features
        packed = self.weight.data.view(-1)[first // 2 : -(-last // 2)].view(-1, 1)
        shape = (stop - start, self.in_features)
        unpacked: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit(
            packed, scales[first // _BLOCK : -(-last // _BLOCK)], _BLOCK, "nf4", shape, like.dtype
        )
        return unpacked


class HalfStored(nn.Linear):
    """An output layer whose weight is stored in fewer bits than it is computed in.

    Args:
        layer: The layer with weight and bias; the weight may be tied to an embedding.
    """

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Returns logits of shape (…, out_features)."""
        return _product(input, self.rows, self.out_features, self.bias)

    def rows(self, which: slice, like: torch.Tensor) -> torch.Tensor:
        """Returns some rows of W."""
        stored = self.weight.data[which]
        return _room(stored, like).copy_(stored)


def _product(x: torch.Tensor, rows: Rows, count: int, bias: torch.Tensor | None) -> torch.Tensor:
    """Returns x·Wᵀ + b of a stored weight, in the precision of the computation."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    product: torch.Tensor = _Widened.apply(x, rows, count)  # type: ignore[no-untyped-call]
    return product if bias is None else product + bias.to(product.dtype)


class _Widened(torch.autograd.Function):
    """x·Wᵀ in the precision of x, with a frozen weight that is widened a few rows at a time."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows: Rows, count: int) -> torch.Tensor:
        """Computes the product piece by piece."""
        ctx.rows, ctx.count, ctx.width = rows, count, x.shape[-1]
        product = x.new_empty((*x.shape[:-1], count))
        for piece in _pieces(x, count, ctx.width):
            product[..., piece] = x @ rows(piece, x).t()
        return product

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Sums the gradients of all pieces."""
        (gradient,) = gradients
        total = gradient.new_zeros((*gradient.shape[:-1], ctx.width))
        for piece in _pieces(gradient, ctx.count, ctx.width):
            total += gradient[..., piece] @ ctx.rows(piece, gradient)
        return total, None, None


def _pieces(like: torch.Tensor, count: int, width: int) -> Iterator[slice]:
    """Yields the rows that are widened together; all rows at once if the device is not the CPU."""
    size = count
    if like.device.type == "cpu":
        size = max(_BLOCK, _PIECE_BYTES // like.element_size() // width // _BLOCK * _BLOCK)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


class _Rooms(threading.local):
    """A thread's memory for widened rows; a new buffer per piece would fragment the heap."""

    def __init__(self) -> None:
        self.of: dict[torch.dtype, torch.Tensor] = {}


_ROOMS = _Rooms()


def _room(stored: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Returns memory for widened rows, valid until the next call."""
    if like.device.type != "cpu":
        return like.new_empty(stored.shape)
    room = _ROOMS.of.get(like.dtype)
    if room is None or room.numel() < stored.numel():
        with torch.inference_mode(False):  # created in evaluation, but also used in training
            room = _ROOMS.of[like.dtype] = torch.empty(stored.numel(), dtype=like.dtype)
    return room[: stored.numel()].view(stored.shape)


def _heap(function: str, *numbers: int) -> None:
    """Makes glibc return free memory: otherwise fragmentation takes more than the base itself."""
    with suppress(AttributeError, OSError, TypeError):  # other C libraries do not need it
        getattr(ctypes.CDLL(None), function)(*numbers)


def _left_alone(network: nn.Module) -> Callable[[str, nn.Module], bool]:
    """Returns a test for the linear layers to leave unquantised: heads, output, precise ones."""
    output = inner(network).get_output_embeddings()
    precise = set(inner(network)._keep_in_fp32_modules or ())

    def left(name: str, layer: nn.Module) -> bool:
        parts = name.split(".")
        return layer is output or parts[0] in HEAD_NAMES or bool(precise & set(parts))

    return left


def _stored(layer: Any) -> torch.Tensor:
    """Returns a layer's weight with shape (outputs, inputs); GPT-2 stores it transposed."""
    weight: torch.Tensor = layer.weight.data
    return weight.t() if isinstance(layer, Conv1D) else weight


def _in_8_bits(layer: Any, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Packs a layer in 8 bits, a few rows at a time."""
    weight = _stored(layer)
    count, width = weight.shape
    packed = torch.empty((count, width), dtype=torch.int8, device=device)
    scales = torch.empty(count, dtype=torch.float32, device=device)
    for piece in _pieces(scales, count, width):
        rows = weight[piece].to(device, torch.float16)
        packed[piece], scales[piece], _ = bnb.functional.int8_vectorwise_quant(rows)
    with torch.device("meta"):
        new: Any = Int8Linear(width, count, layer.bias is not None, has_fp16_weights=False)
    new.weight = bnb.nn.Int8Params(packed, requires_grad=False, CB=packed, SCB=scales)
    return _with_bias(new, layer, dtype, device)


def _in_4_bits(layer: Any, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Packs a layer in 4 bits."""
    weight = _stored(layer).to(dtype).contiguous()
    count, width = weight.shape
    with torch.device("meta"):
        new: Any = Int4Linear(width, count, layer.bias is not None, dtype, quant_type="nf4")
    packed = bnb.nn.Params4bit(
        weight, requires_grad=False, blocksize=_BLOCK, quant_type="nf4", module=new
    )
    new.weight = packed.to(device)
    return _with_bias(new, layer, dtype, device)


def _with_bias(new: Any, layer: Any, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Gives a packed layer the bias of the layer that it replaces."""
    if layer.bias is not None:
        new.bias = nn.Parameter(layer.bias.data.to(device, dtype), requires_grad=False)
    return new  # type: ignore[no-any-return]


def _keep_the_rest(network: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Moves the layers that are not quantised; embeddings and the output layer keep half their bits."""
    stored = torch.bfloat16 if dtype == torch.float32 else dtype
    output = inner(network).get_output_embeddings()
    moved: dict[int, nn.Parameter] = {}
    for module in list(network.modules()):
        is_table = isinstance(module, nn.Embedding) or module is output
        if isinstance(module, nn.Linear) and not module.weight.is_floating_point():
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in moved:
                # A copy: one tensor that stays in the mapped file would keep all of it mapped.
                kept = parameter.data.to(device, stored if is_table else dtype, copy=True)
                moved[id(parameter)] = nn.Parameter(kept, requires_grad=False)
            setattr(module, name, moved[id(parameter)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))
        if isinstance(module, nn.Embedding) and stored != dtype:
            module.register_forward_hook(partial(_widened, dtype))
    if output is not None and stored != dtype:
        inner(network).set_output_embeddings(HalfStored(output))


def _widened(dtype: torch.dtype, module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    """Returns an embedding's output in the precision of the computation."""
    return output.to(dtype)
