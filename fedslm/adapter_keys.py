"""The names of an adapter's tensors: which factor of which layer a PEFT state-dict key stands for.

For a layer ``L`` the adapter computes ``(s·B·R·A + D_B·D_A)·x``:

L.lora_A.weight    A, (rank, in)
L.lora_B.weight    B, (out, rank)
L.lora_R.weight    R, (rank, rank); only Fed-SB has it, else it is the identity
L.delta_A.weight   D_A, (delta rank, in): what aggregation put aside, never trained
L.delta_B.weight   D_B, (out, delta rank)

Every other key is a head's, which is trained whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

Part = Literal["lora_A", "lora_B", "lora_R", "delta_A", "delta_B", "head"]
_FACTORS: tuple[Part, ...] = ("lora_A", "lora_B", "lora_R", "delta_A", "delta_B")


def part_of(key: str) -> Part:
    """Which factor a key stands for.

    >>> part_of("base_model.model.h.0.attn.lora_B.weight"), part_of("base_model.model.score.weight")
    ('lora_B', 'head')
    """
    for part in _FACTORS:
        if key.endswith(f".{part}.weight"):
            return part
    return "head"


def key_of(layer: str, part: Part) -> str:
    """The key of a layer's factor.

    >>> key_of("h.0.attn", "lora_A")
    'h.0.attn.lora_A.weight'
    """
    return f"{layer}.{part}.weight"


def layers_of(keys: Iterable[str]) -> list[str]:
    """The adapted layers, sorted.

    >>> layers_of(["q.lora_A.weight", "q.lora_B.weight", "score.weight"])
    ['q']
    """
    return sorted({key.removesuffix(".lora_A.weight") for key in keys if part_of(key) == "lora_A"})


def delta_keys(keys: Iterable[str]) -> frozenset[str]:
    """The keys of what aggregation put aside.

    >>> sorted(delta_keys(["q.lora_A.weight", "q.delta_A.weight"]))
    ['q.delta_A.weight']
    """
    return frozenset(key for key in keys if part_of(key) in ("delta_A", "delta_B"))
