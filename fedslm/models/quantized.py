"""Bases in 8 or 4 bits: the linear layers of a loaded base, quantised one at a time.

What is not a linear layer stays as it is, but for embeddings, which keep half their bits. All is
computed in the precision that the config names: weights are widened where they are used, and
activations are never rounded to integers, so that no record's rounding depends on another's.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedslm.errors import ModelError
from fedslm.models.networks import HEAD_NAMES, inner
from fedslm.models.peft_library import bitsandbytes as bnb

Kind = Literal["int8", "int4"]
_WIDENED_ROWS = 4096  # of an output layer at a time


def quantize(network: nn.Module, kind: Kind, dtype: torch.dtype, device: torch.device) -> None:
    """Quantises a frozen base in place and moves it to its device.

    Args:
        network: Best as its files map it: then the whole of it is never in memory at once.
        kind: "int8" is one scale for each row, "int4" is NF4 in blocks of 64 with compressed scales.
        dtype: What is computed in.
        device: Where the base goes.

    Raises:
        ModelError: This device or this machine's library cannot.

    References:
        Dettmers et al. 2022, LLM.int8() (arXiv 2208.07339); 2023, QLoRA (arXiv 2305.14314).
    """
    left = _left_alone(network)
    try:
        for name, layer in list(network.named_modules()):
            if isinstance(layer, nn.Linear | Conv1D) and not left(name, layer):
                parent, _, child = name.rpartition(".")
                setattr(network.get_submodule(parent), child, _smaller(layer, kind, dtype, device))
    except Exception as error:  # kernels that a device lacks raise many unrelated types
        raise ModelError(
            f'model.quantization="{kind}" does not work on {device}: {error}; use "none", or another '
            f"device"
        ) from error
    _keep_the_rest(network, dtype, device)
    setattr(network, f"is_loaded_in_{'8bit' if kind == 'int8' else '4bit'}", True)  # PEFT asks for it


def _left_alone(network: nn.Module) -> Any:
    """Says which linear layers are not quantised: heads, the output, what must stay precise."""
    output = inner(network).get_output_embeddings()
    precise = tuple(inner(network)._keep_in_fp32_modules or ())

    def left(name: str, layer: nn.Module) -> bool:
        parts = name.split(".")
        return layer is output or parts[0] in HEAD_NAMES or bool(set(parts) & set(precise))

    return left


def _smaller(layer: Any, kind: Kind, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """One quantised layer; GPT-2 stores its weights the other way round."""
    weight = layer.weight.data.to(dtype)
    weight = (weight.t() if isinstance(layer, Conv1D) else weight).contiguous()
    outputs, inputs = weight.shape
    has_bias = layer.bias is not None
    new: Any
    with torch.device("meta"):
        if kind == "int8":
            new = _int8_layer()(inputs, outputs, has_bias, has_fp16_weights=False)
        else:
            new = bnb.nn.Linear4bit(inputs, outputs, has_bias, dtype, quant_type="nf4")
            new.support_avx512bf16_for_cpu = False  # it would answer differently in evaluation
    if kind == "int8":
        packed = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        packed = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=new)
    new.weight = packed.to(device)
    if has_bias:
        new.bias = nn.Parameter(layer.bias.data.to(device, dtype), requires_grad=False)
    return new  # type: ignore[no-any-return]


def _keep_the_rest(network: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Moves what is not quantised; embeddings and the output layer keep half their bits."""
    stored = torch.bfloat16 if dtype == torch.float32 else dtype
    output = inner(network).get_output_embeddings()
    moved: dict[int, nn.Parameter] = {}
    for module in list(network.modules()):
        is_table = isinstance(module, nn.Embedding) or module is output
        if isinstance(module, nn.Linear) and not module.weight.is_floating_point():
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in moved:
                kept = parameter.data.to(device, stored if is_table else dtype)
                moved[id(parameter)] = nn.Parameter(kept, requires_grad=False)
            setattr(module, name, moved[id(parameter)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))
        if isinstance(module, nn.Embedding) and stored != dtype:
            module.register_forward_hook(partial(_widened, dtype))
    if output is not None and stored != dtype:
        inner(network).set_output_embeddings(HalfStored(output))


def _widened(dtype: torch.dtype, module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    """What an embedding gave, in the precision that is computed in."""
    return output.to(dtype)


class HalfStored(nn.Linear):
    """An output layer whose weight is stored in fewer bits than it is computed in.

    Args:
        layer: Gives weight and bias; the weight may be an embedding's too.
    """

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Returns logits of shape (…, out_features) in the precision of ``input``."""
        logits: torch.Tensor = _WidenedProduct.apply(input, self.weight)  # type: ignore[no-untyped-call]
        return logits if self.bias is None else logits + self.bias.to(input.dtype)


class _WidenedProduct(torch.autograd.Function):
    """x·Wᵀ in the precision of x; of W, a few rows at a time are widened."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Fills the product piece by piece."""
        ctx.save_for_backward(weight)
        product = x.new_empty((*x.shape[:-1], weight.shape[0]))
        for rows in range(0, len(weight), _WIDENED_ROWS):
            piece = slice(rows, rows + _WIDENED_ROWS)
            product[..., piece] = x @ weight[piece].to(x.dtype).t()
        return product

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Adds up what each piece gives."""
        (weight,), (gradient,) = ctx.saved_tensors, gradients
        pieces = [slice(rows, rows + _WIDENED_ROWS) for rows in range(0, len(weight), _WIDENED_ROWS)]
        total = gradient.new_zeros((*gradient.shape[:-1], weight.shape[1]))
        for piece in pieces:
            total += gradient[..., piece] @ weight[piece].to(gradient.dtype)
        return total, None


@lru_cache(maxsize=1)
def _int8_layer() -> Any:
    """The library's layer, always by its way that widens weights and leaves activations alone.

    Its other way rounds activations to 8 bits; it would be taken in evaluation, and on some devices.
    """
    from bitsandbytes.autograd._functions import MatMul8bitFp

    class Int8Linear(bnb.nn.Linear8bitLt):  # type: ignore[misc]
        """Eight-bit weights; activations as they are."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Returns x·Wᵀ + b."""
            if self.weight.CB is not None:
                self.init_8bit_state()
            bias = None if self.bias is None else self.bias.to(x.dtype)
            inputs = (x, self.weight, None, bias, self.state)
            product: torch.Tensor = MatMul8bitFp.apply(*inputs)  # type: ignore[no-untyped-call]
            return product

    return Int8Linear
