"""Which units are held out: not trained on, so that something is left to measure on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fedslm.rng import seed_of

_ONE = 2**63


def is_held_out(unit: str, fraction: float, seed: int) -> bool:
    """Whether a unit belongs to the held-out share.

    Formal guarantees:
        * It depends on the unit's name, the fraction and the run's seed alone: on no other unit, nor on
          client, round or restart. So a unit is always on one side, and adding or removing another
          moves nobody.

    Args:
        unit: Name of a patient, or :func:`record_name`.
        fraction: Expected share that is held out, in [0, 1).
        seed: The run's seed: public.

    >>> sum(is_held_out(str(unit), 0.25, seed=0) for unit in range(1000))
    255
    """
    return seed_of(seed, "held-out", unit) < fraction * _ONE


def record_name(row: Mapping[str, Any]) -> str:
    """Names a record by its content: equal records are on the same side."""
    return json.dumps(row, sort_keys=True, default=repr)
