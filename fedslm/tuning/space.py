"""What a search varies, as data, and the random order in which it tries it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from fedslm.rng import stream

Values = dict[str, int | float]


@dataclass(frozen=True)
class Axis:
    """Keys that are multiplied by the same factor.

    Attributes:
        keys: Dotted keys.
        factors: Factors of a config's own values; 1 is one of them.
    """

    keys: tuple[str, ...]
    factors: tuple[float, ...]


_HALF_TO_DOUBLE = (0.5, 1.0, 2.0)
_RATE = Axis(("training.learning_rate",), (0.25, 0.5, 1.0, 2.0, 4.0))
_CLIP = Axis(("privacy.clip_norm",), _HALF_TO_DOUBLE)
_ROUNDS = Axis(("federation.rounds",), _HALF_TO_DOUBLE)
_STEPS = Axis(("training.local_steps",), _HALF_TO_DOUBLE)
# A step's expected number of units is what its noisy sum is divided by.
_SAMPLE = Axis(("privacy.sample_rate", "training.batch_size"), _HALF_TO_DOUBLE)
_SCALING = Axis(("lora.alpha",), _HALF_TO_DOUBLE)

SPACES: Mapping[str, tuple[Axis, ...]] = {
    "features": (_RATE, _CLIP, _ROUNDS),
    "several-labels": (_RATE, _CLIP, _ROUNDS, _STEPS, _SAMPLE),
    "tags": (_RATE, _CLIP, _ROUNDS, _STEPS, _SAMPLE),
    "small-decoder": (_RATE, _CLIP, _ROUNDS, _STEPS, _SAMPLE, _SCALING),
    "preferences": (_RATE, _CLIP, _ROUNDS, _STEPS, _SAMPLE, _SCALING),
    "decoder": (_RATE, _CLIP, _ROUNDS, _SAMPLE, _SCALING),
    "encoder-decoder": (_RATE, _CLIP, _ROUNDS, _STEPS, _SAMPLE, _SCALING),
}
"""A recipe's name to what is varied around its settings."""


def keys_of(axes: tuple[Axis, ...]) -> tuple[str, ...]:
    """Returns all keys that are varied."""
    return tuple(key for axis in axes for key in axis.keys)


def candidates(own: Values, axes: tuple[Axis, ...], seed: int) -> list[Values]:
    """Returns the settings to try: the config's own first, then all others in a random order.

    Args:
        own: The config's own value of each key.
        axes: What is varied.
        seed: The run's seed, which determines the order.

    Returns:
        Values of all keys, each combination once; those with a sample rate above 1 are left out.

    >>> own = {"privacy.clip_norm": 1.0, "federation.rounds": 1}
    >>> len(candidates(own, (_CLIP, _ROUNDS), seed=0))  # half a round is one round too
    6
    """
    grid = [*itertools.product(*(axis.factors for axis in axes))]
    order = stream(seed, "tune").permutation(len(grid))
    found = [own]
    for place in order:
        values = dict(own)
        for axis, factor in zip(axes, grid[place], strict=True):
            values |= {key: scaled(own[key], factor) for key in axis.keys}
        if values not in found and values.get("privacy.sample_rate", 0) <= 1:
            found.append(values)
    return found


def scaled(value: float, factor: float) -> int | float:
    """Multiplies a value: a whole number stays one, and at least 1; others keep four digits.

    >>> scaled(5, 0.5), scaled(1, 0.5), scaled(0.3, 2.0), scaled(0.123456, 1.0)
    (2, 1, 0.6, 0.123456)
    """
    if factor == 1:
        return value
    if isinstance(value, int):
        return max(1, round(value * factor))
    return float(f"{value * factor:.4g}")
