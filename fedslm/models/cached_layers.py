"""The layers below the lowest adapted one, computed once for each record and kept in memory.

With an adapter in the last layers only, most of a pass computes what it computed in every pass before:
the layers below hold nothing that changes. Their output is kept, and later passes begin above them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fedslm.adapter_keys import part_of
from fedslm.errors import TrainingError
from fedslm.models.families import PROVED
from fedslm.models.footprint import memory_here
from fedslm.models.networks import HEAD_NAMES, forgets_activations, inner
from fedslm.models.pooling import MeanPoolingClassifier

if TYPE_CHECKING:
    from fedslm.models.adapter import AttachedAdapter

_MOST_BYTES, _SHARE = 512 << 20, 16  # kept by a process: a sixteenth of the memory if that is less


@dataclass(frozen=True)
class Prefix:
    """The blocks below the first one with an adapted module.

    A LoRA layer counts as adapted even if its factors are frozen, since every round may write others;
    where only the head is trained, B is zero for good, and all blocks are below.

    Attributes:
        body: The transformers model.
        below: The blocks below.
        first: The first block with an adapted module; None if all blocks are below.
        blocks: Number of all blocks.
        zero: Tensors in the blocks below that must be zero.
        pooled: The classifier, if all blocks are below and it reads only the mean of what leaves them.
            Then the mean is kept: one vector for a record, not one for each token.
    """

    body: Any
    below: tuple[nn.Module, ...]
    first: nn.Module | None
    blocks: int
    zero: tuple[nn.Parameter, ...] = ()
    pooled: MeanPoolingClassifier | None = None

    @property
    def entry(self) -> nn.Module:
        """The module that receives kept states."""
        if self.pooled is not None:
            return self.pooled.classifier
        return self.below[0] if self.first is None else self.first

    @property
    def width(self) -> int:
        """Values of one token's state."""
        return int(self.body.config.hidden_size)

    def states_of(self, tokens: torch.Tensor) -> torch.Tensor:
        """Computes what leaves the blocks below for one record, in a pass of its own.

        Args:
            tokens: Shape (1, tokens), without padding.

        Returns:
            A tensor that training can use, of shape (tokens, width), or (width,) if it is pooled.
        """
        if self.pooled is not None:
            with torch.inference_mode(False), torch.no_grad():
                return self.pooled.mean(tokens.clone(), torch.ones_like(tokens))[0].contiguous()

        def stop(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            raise _Reached(inputs[0])

        def end(_module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
            raise _Reached(output[0] if isinstance(output, tuple) else output)

        if self.first is None:
            handle = self.below[-1].register_forward_hook(end, prepend=True)
        else:
            handle = self.first.register_forward_pre_hook(stop, prepend=True)
        try:
            with torch.inference_mode(False), torch.no_grad():
                self.body(input_ids=tokens.clone(), attention_mask=torch.ones_like(tokens))
        except _Reached as reached:
            return reached.states[0].contiguous()
        finally:
            handle.remove()
        raise TrainingError("internal check failed: a pass did not leave the cached blocks")

    @contextmanager
    def given(self, states: torch.Tensor) -> Iterator[None]:
        """Makes passes inside the block begin above the blocks below.

        Args:
            states: What leaves these, of shape (rows, tokens, width), or (rows, width) if it is pooled.
        """
        if self.pooled is not None:
            self.pooled.__dict__["mean"] = lambda *_, **__: states
            try:
                yield
            finally:
                del self.pooled.__dict__["mean"]
            return

        def replace(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return (states, *inputs[1:])

        handle = self.entry.register_forward_pre_hook(replace, prepend=True)
        try:
            for block in self.below:
                block.forward = _unchanged
            yield
        finally:
            handle.remove()
            for block in self.below:
                block.__dict__.pop("forward", None)


def prefix_of(adapter: AttachedAdapter, *, only_head: bool = False) -> Prefix | None:
    """Returns the blocks below the first adapted one; None if there are none or the base is unknown.

    Args:
        adapter: The attached adapter.
        only_head: Whether no round changes the LoRA factors, and B is zero.

    Only verified architectures with one stack of blocks have a prefix: in an encoder-decoder, blocks
    share more than a state. A network that recomputes its activations has none either: it would
    recompute the layers below, too.
    """
    network: Any = adapter.network
    base = network.get_base_model()
    body = inner(base)
    known = PROVED.get(body.config.model_type)
    if known is None or known.reads == "a text, then writes another":
        return None
    if any(forgets_activations(module) for module in body.modules()):
        return None
    stacks = [
        module
        for module in body.modules()
        if isinstance(module, nn.ModuleList) and len(module) == body.config.num_hidden_layers
    ]
    if len(stacks) != 1:
        return None
    blocks = list(stacks[0])
    moving = {
        key: each
        for key, each in adapter.parameters.items()
        if not only_head or part_of(key) in ("head", "center")
    }
    adapted = {id(parameter) for parameter in moving.values()}
    none = len(blocks) if only_head else 0
    cut = next((at for at, block in enumerate(blocks) if _owns(block, adapted)), none)
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    heads = [each for name, each in base.named_children() if name in HEAD_NAMES]
    above = {id(parameter) for head in heads for parameter in head.parameters()}
    if cut == 0 or adapted - inside - above:
        return None
    if cut < len(blocks):
        return Prefix(body, tuple(blocks[:cut]), blocks[cut], len(blocks))
    zero = tuple(each for key, each in adapter.parameters.items() if part_of(key) == "lora_B")
    pooled = base if isinstance(base, MeanPoolingClassifier) else None
    return Prefix(body, tuple(blocks), None, len(blocks), zero, pooled)


def most_bytes_here() -> int:
    """Returns the bound on what a process keeps on this machine, in bytes."""
    return min(_MOST_BYTES, (memory_here() or _MOST_BYTES * _SHARE) // _SHARE)


class CachedLayers:
    """What enters the first adapted block, kept for the records that were used last.

    Formal guarantees:
        * A record's states are a function of its tokens and of the base, to the last bit: they are
          computed in a separate pass, without padding, whatever is in the pass that needs them. So it
          changes no bit whether they were kept, or who needed them first. Padding gets zeros.
        * Records with equal tokens share an entry, and no other records do. An entry serves one base:
          the cache belongs to a loaded model.
        * At most ``most_bytes`` are kept; the record that was not used for longest is forgotten first.
          Nothing is written to disk.

    Args:
        prefix: The layers that are not computed again.
        most_bytes: Bound on the kept states; 0 computes them in every pass.
    """

    def __init__(self, prefix: Prefix, most_bytes: int) -> None:
        self.prefix, self._most_bytes = prefix, most_bytes
        self._kept: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def kept_bytes(self) -> int:
        """Bytes of the kept states."""
        return self._bytes

    def clear(self) -> None:
        """Forgets every record."""
        self._kept.clear()
        self._bytes = 0

    def afresh(self) -> CachedLayers:
        """Returns the same layers without memory: to check what is kept, or to leave no trace."""
        return CachedLayers(self.prefix, 0)

    @contextmanager
    def serving(self, inputs: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Makes passes over one batch begin at the first adapted block.

        Args:
            inputs: ``input_ids`` and ``attention_mask`` of shape (rows, tokens), padded on the right.

        Raises:
            TrainingError: The padding is elsewhere, or a tensor that must be zero is not.
        """
        if any(bool(tensor.any()) for tensor in self.prefix.zero):
            raise TrainingError("internal check failed: the adapter below the head is not zero")
        with self.prefix.given(self._states(inputs["input_ids"], inputs["attention_mask"])):
            yield

    def _states(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Returns the states of a batch, of shape (rows, tokens, width) or (rows, width)."""
        lengths = mask.sum(dim=1)
        if not torch.equal(mask > 0, torch.arange(mask.shape[1]) < lengths.unsqueeze(1)):
            raise TrainingError("internal check failed: a batch is not padded on the right")
        found = dict[bytes, torch.Tensor]()  # a row may come several times: empty slots are alike
        keys = []
        for row, length in zip(tokens, lengths.tolist(), strict=True):
            own = row[:length]
            key = own.numpy().tobytes()
            keys.append(key)
            if key not in found:
                found[key] = self._of(key, own)
        with torch.inference_mode(False):
            if self.prefix.pooled is not None:
                return torch.stack([found[key] for key in keys])
            any_states = found[keys[0]]
            states = any_states.new_zeros((*tokens.shape, any_states.shape[-1]))
            for row, key in zip(states, keys, strict=True):
                row[: len(found[key])] = found[key]
        return states

    def _of(self, key: bytes, tokens: torch.Tensor) -> torch.Tensor:
        """Returns the states of one record, kept or computed."""
        if (kept := self._kept.get(key)) is not None:
            self._kept.move_to_end(key)
            return kept
        states = self.prefix.states_of(tokens.unsqueeze(0))
        size = len(key) + states.nbytes
        if size <= self._most_bytes:
            self._kept[key] = states
            self._bytes += size
        while self._bytes > self._most_bytes:
            old, forgotten = self._kept.popitem(last=False)
            self._bytes -= len(old) + forgotten.nbytes
        return states


class _Reached(Exception):
    """A pass has reached the first adapted block.

    Args:
        states: What enters it.
    """

    def __init__(self, states: torch.Tensor) -> None:
        super().__init__()
        self.states = states


def _unchanged(states: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    """The forward pass of a block that is not computed."""
    return states


def _owns(block: nn.Module, adapted: Iterable[int]) -> bool:
    """True if a block has one of these parameters."""
    return any(id(parameter) in adapted for parameter in block.parameters())
