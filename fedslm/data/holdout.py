"""Selects the units that are held out from training, so that they can be used for evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from fedslm.data.owners import owner_of
from fedslm.rng import seed_of

_ONE = 2**63


def is_held_out(unit: str, fraction: float, seed: int, purpose: str = "held-out") -> bool:
    """Whether a unit belongs to the held-out share.

    Formal guarantees:
        * The result depends only on the unit's name, the fraction and the run's seed: not on any other
          unit, nor on client, round or restart. So a unit is always on one side, and adding or removing
          another unit does not move it.

    Args:
        unit: Name of a patient, or :func:`record_name`.
        fraction: Expected share of held-out units, in [0, 1).
        seed: The run's seed: public.
        purpose: Choices for different purposes are independent of each other.

    >>> sum(is_held_out(str(unit), 0.25, seed=0) for unit in range(1000))
    255
    """
    return seed_of(seed, purpose, unit) < fraction * _ONE


def record_name(row: Mapping[str, Any]) -> str:
    """Names a record by its content: equal records are on the same side.

    Formal guarantees:
        * The name depends on this record only. Another record may add a column, or turn a column of
          integers into one of floats; fields that a record does not have, and the type of its numbers,
          are not part of its name.

    >>> record_name({"text": "a", "age": 64}) == record_name({"text": "a", "age": 64.0, "sign": None})
    True
    """
    return json.dumps(_plain(row), sort_keys=True, default=repr)


def _plain(value: Any) -> Any:
    """Returns a value without the changes that other records caused in its column."""
    match value:
        case Mapping():
            return {key: _plain(each) for key, each in value.items() if each is not None}
        case list():
            return [_plain(each) for each in value]
        case int() | float() | Decimal():
            return owner_of(value)
        case _:
            return value
