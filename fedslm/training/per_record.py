"""Per-record gradients of a pass: in closed form for linear layers, through Opacus' hooks for others.

Every trained tensor of an adapter belongs to a linear layer: LoRA's A and B, Fed-SB's R, a head. For
y = W·x + b a record's gradient is Σₜ gₜ·xₜᵀ for W and Σₜ gₜ for b, over its tokens t, with g the
gradient of y: one batched matrix product per tensor, and nothing that plain backpropagation does not
compute as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from fedslm.errors import TrainingError
from fedslm.models.lora_layers import fused

_ALIGNED = 16  # float32 values in 64 bytes


class Gradients(Protocol):
    """Computes per-record gradients of one forward pass."""

    def __call__(self, losses: torch.Tensor, rows: int) -> torch.Tensor:
        """Runs the backward pass.

        Args:
            losses: The loss of each record, shape (records,).
            rows: Rows of the batch.

        Returns:
            float32 of shape (rows, P); valid until the next call.

        Raises:
            TrainingError: A layer mixes records, or was not called.
        """

    @property
    def places(self) -> Sequence[slice]:
        """The columns of each trained tensor, in the order of the parameters."""

    @property
    def width(self) -> int:
        """P."""

    @property
    def is_aligned(self) -> bool:
        """Whether every row and tensor starts at 64 bytes, which fixed shapes need."""

    def forget(self) -> None:
        """Removes what a failed pass left behind."""


@contextmanager
def per_record_gradients(network: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[Gradients]:
    """Yields per-record gradients, and removes everything that it attached to the network.

    The closed form is used if every trained tensor belongs to a linear layer, Opacus' hooks otherwise.

    Args:
        network: The network, with exactly ``parameters`` trained.
        parameters: The trained tensors.
    """
    closed, layers = ClosedForm(parameters), _owners(network, parameters)
    if layers is None:
        with _hooked(network, parameters) as hooked:
            yield hooked
        return
    with fused(network, closed) as fused_parameters:
        layers = [layer for layer in layers if id(layer.weight) not in fused_parameters]
        try:
            for layer in layers:
                layer.forward = closed.forward_of(layer)
            yield closed
        finally:
            for layer in layers:
                layer.__dict__.pop("forward", None)


def _owners(network: nn.Module, parameters: Sequence[nn.Parameter]) -> list[Any] | None:
    """Returns the linear layers that own the trained tensors; None if another layer owns one."""
    wanted = {id(parameter) for parameter in parameters}
    owners, found = [], set()
    for module in network.modules():
        own = {id(parameter) for parameter in module.parameters(recurse=False)} & wanted
        if not own:
            continue
        if type(module).forward is not nn.Linear.forward:
            return None
        owners.append(module)
        found |= own
    return owners if found == wanted else None


def _places(parameters: Sequence[nn.Parameter]) -> list[slice]:
    """Returns the columns of each tensor; each starts at 64 bytes, so that kernels round alike."""
    places, start = [], 0
    for parameter in parameters:
        places.append(slice(start, start + parameter.numel()))
        start += -(-parameter.numel() // _ALIGNED) * _ALIGNED
    return places


class ClosedForm:
    """Per-record gradients of linear layers, into one aligned buffer.

    Formal guarantees:
        * A row of the result is the gradient of this row's loss, as plain autograd computes it, in
          float32 whatever the precision of the base. A layer that is called several times in a pass
          counts each time; a layer that is not called, or receives another number of rows, raises.
        * A pass without a backward pass of its own leaves nothing behind.

    Args:
        parameters: The trained tensors, each of a linear layer.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._places = _places(parameters)
        self._of = {id(p): place for p, place in zip(parameters, self._places, strict=True)}
        self._width: int = -(-self._places[-1].stop // _ALIGNED) * _ALIGNED
        self._values = torch.zeros((0, self._width), device=parameters[0].device)
        self._rows, self._written = 0, set[int]()  # of the current pass; by the id of a parameter

    @property
    def places(self) -> Sequence[slice]:
        """The columns of each trained tensor, in the order of the parameters."""
        return self._places

    @property
    def width(self) -> int:
        """P, a multiple of 16."""
        return self._width

    @property
    def is_aligned(self) -> bool:
        """True."""
        return True

    def forget(self) -> None:
        """Nothing is left behind: the next pass writes every column."""

    def __call__(self, losses: torch.Tensor, rows: int) -> torch.Tensor:
        """Runs the backward pass; see :meth:`Gradients.__call__`."""
        if len(self._values) < rows:
            self._values = self._values.new_zeros((rows, self._width))
        self._rows, self._written = rows, set()
        losses.sum().backward()  # type: ignore[no-untyped-call]
        if missing := len(self._of) - len(self._written):
            raise TrainingError(
                f"{missing} of {len(self._of)} trained tensors have no gradient for each record: their "
                f"layer was not called"
            )
        return self._values[:rows]

    def add(self, parameter: nn.Parameter, gradient: torch.Tensor, inputs: torch.Tensor | None) -> None:
        """Adds a layer's per-record gradients; see :class:`fedslm.models.lora_layers.Records`."""
        if len(gradient) != self._rows:
            raise TrainingError(
                f"per-record gradients do not match the batch of {self._rows} rows: a layer received "
                f"{len(gradient)}, so it mixes records"
            )
        columns, again = (
            self._values[: self._rows, self._of[id(parameter)]],
            id(parameter) in self._written,
        )
        self._written.add(id(parameter))
        by_record = _by_record(gradient)
        if inputs is None:
            summed = by_record.sum(dim=1)
            columns.add_(summed) if again else columns.copy_(summed)
            return
        out = columns.view(self._rows, *parameter.shape)
        torch.baddbmm(out, by_record.transpose(1, 2), _by_record(inputs), beta=float(again), out=out)

    def forward_of(self, layer: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
        """Returns a layer's forward pass, whose backward pass writes into the buffer."""

        def forward(x: torch.Tensor) -> torch.Tensor:
            product: torch.Tensor = _Linear.apply(x, layer.weight, layer.bias, self)  # type: ignore[no-untyped-call]
            return product

        return forward


class _Linear(torch.autograd.Function):
    """x·Wᵀ + b, whose backward pass computes per-record gradients in place of a batch's."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        records: ClosedForm,
    ) -> torch.Tensor:
        """Computes the product, in autocast's precision if it is on."""
        ctx.records, ctx.type, ctx.bias = records, x.dtype, bias
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        if x.dim() > 2:
            return F.linear(x, weight, bias)
        # One vector for each record: with few rows, a matrix product's kernel depends on their number.
        return _each(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        """Writes each record's gradient; passes the gradient of x on."""
        (gradient,), (x, weight) = gradients, ctx.saved_tensors
        if x is not None:
            ctx.records.add(weight, gradient, x)
        if ctx.bias is not None and ctx.bias.requires_grad:
            ctx.records.add(ctx.bias, gradient, None)
        below = None
        if ctx.needs_input_grad[0]:
            weight = weight.to(gradient.dtype)
            below = gradient @ weight if gradient.dim() > 2 else _each(gradient, weight.t(), None)
            below = below.to(ctx.type)
        return below, None, None, None


def _each(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Returns x·Wᵀ + b of each row by itself."""
    return torch.stack([F.linear(row, weight, bias) for row in rows])


def _by_record(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the same values in float32 with shape (rows, tokens, width)."""
    return (tensor.unsqueeze(1) if tensor.dim() == 2 else tensor.flatten(1, -2)).float()


class _Hooked:
    """Per-record gradients through Opacus' hooks: for any layer that Opacus knows.

    Args:
        network: The network with hooks attached.
        parameters: The trained tensors.
    """

    def __init__(self, network: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        self._network, self._parameters = network, list(parameters)
        self._places: list[slice] = []
        start = 0
        for parameter in self._parameters:
            self._places.append(slice(start, start + parameter.numel()))
            start += parameter.numel()

    @property
    def places(self) -> Sequence[slice]:
        """The columns of each trained tensor, in the order of the parameters."""
        return self._places

    @property
    def width(self) -> int:
        """P, the number of trained values."""
        return int(self._places[-1].stop)

    @property
    def is_aligned(self) -> bool:
        """False."""
        return False

    def __call__(self, losses: torch.Tensor, rows: int) -> torch.Tensor:
        """Runs the backward pass; see :meth:`Gradients.__call__`."""
        losses.sum().backward()  # type: ignore[no-untyped-call]
        samples: list[Any] = [getattr(parameter, "grad_sample", None) for parameter in self._parameters]
        for parameter in self._parameters:
            setattr(parameter, "grad_sample", None)  # noqa: B010  (mypy knows no such attribute)
        if any(sample is None or len(sample) != rows for sample in samples):
            raise TrainingError(
                f"per-record gradients do not match the batch of {rows} rows; a layer mixes records or "
                f"was not called"
            )
        return torch.cat([sample.detach().float().flatten(1) for sample in samples], dim=1)

    def forget(self) -> None:
        """Removes what a failed forward pass leaves in Opacus' hooks."""
        forget_activations(self._network)


@contextmanager
def _hooked(network: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[Gradients]:
    """Yields gradients through Opacus' hooks, and removes the hooks."""
    from opacus.grad_sample.grad_sample_module import GradSampleHooks

    hooks = GradSampleHooks(network, batch_first=True, loss_reduction="sum")
    try:
        yield _Hooked(network, parameters)
    finally:
        forget_activations(network)
        hooks.cleanup()


def forget_activations(network: nn.Module) -> None:
    """Removes what a failed forward pass leaves in Opacus' hooks."""
    for module in network.modules():
        for name in ("activations", "max_batch_len"):
            module.__dict__.pop(name, None)  # some wrappers forward hasattr to the module they wrap
    for parameter in network.parameters():
        if hasattr(parameter, "_forward_counter"):
            parameter._forward_counter = 0
        if hasattr(parameter, "_current_grad_sample"):
            del parameter._current_grad_sample
        if hasattr(parameter, "grad_sample"):
            parameter.grad_sample = None
