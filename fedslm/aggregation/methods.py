"""Which tensors each method trains, and so sends."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, assert_never

from fedslm.models.adapter import is_frozen_factor

Method = Literal["auto", "fedit", "ffa"]


def trained_keys(method: Method, keys: Iterable[str]) -> frozenset[str]:
    """Keys that clients train and send under a method; the others are frozen and shared.

    Args:
        method: A resolved method.
        keys: All keys of the adapter.

    Raises:
        ValueError: The method was not resolved.

    References:
        FedIT: Zhang et al. 2024 (arXiv 2305.05644). FFA-LoRA: Sun et al. 2024 (arXiv 2403.12313).

    >>> sorted(trained_keys("ffa", ["q.lora_A.weight", "q.lora_B.weight"]))
    ['q.lora_B.weight']
    """
    match method:
        case "fedit":
            return frozenset(keys)
        case "ffa":
            return frozenset(key for key in keys if not is_frozen_factor(key))
        case "auto":
            raise ValueError("the aggregation method must be resolved first")
        case _:
            assert_never(method)
