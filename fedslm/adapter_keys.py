"""Names of an adapter's tensors: maps each PEFT state-dict key to a layer and a factor.

For a layer ``L``, the adapter computes ``(s·B·R·A + D_B·D_A)·x``:

L.lora_A.weight    A, (rank, in)
L.lora_B.weight    B, (out, rank)
L.lora_R.weight    R, (rank, rank); only Fed-SB has it, otherwise it is the identity
L.delta_A.weight   D_A, (delta rank, in): residual factor kept by aggregation, never trained
L.delta_B.weight   D_B, (out, delta rank)

``center.weight``, (width,), is what a classifier subtracts from its features: a public constant, never
trained. Every other key belongs to a head, which is fully trained.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

Part = Literal["lora_A", "lora_B", "lora_R", "delta_A", "delta_B", "center", "head"]
_NAMED: tuple[Part, ...] = ("lora_A", "lora_B", "lora_R", "delta_A", "delta_B", "center")


def part_of(key: str) -> Part:
    """Returns the factor, or the other part of an adapter, that a key names.

    >>> part_of("base_model.model.h.0.attn.lora_B.weight"), part_of("base_model.model.score.weight")
    ('lora_B', 'head')
    """
    for part in _NAMED:
        if key.endswith(f".{part}.weight"):
            return part
    return "head"


def key_of(layer: str, part: Part) -> str:
    """Returns the key of a layer's factor.

    >>> key_of("h.0.attn", "lora_A")
    'h.0.attn.lora_A.weight'
    """
    return f"{layer}.{part}.weight"


def layers_of(keys: Iterable[str]) -> list[str]:
    """Returns the adapted layers, sorted.

    >>> layers_of(["q.lora_A.weight", "q.lora_B.weight", "score.weight"])
    ['q']
    """
    return sorted({key.removesuffix(".lora_A.weight") for key in keys if part_of(key) == "lora_A"})


def delta_keys(keys: Iterable[str]) -> frozenset[str]:
    """Returns the keys of the residual factors that aggregation keeps.

    >>> sorted(delta_keys(["q.lora_A.weight", "q.delta_A.weight"]))
    ['q.delta_A.weight']
    """
    return frozenset(key for key in keys if part_of(key) in ("delta_A", "delta_B"))
