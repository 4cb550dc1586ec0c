"""How rates and weights move over a distillation's steps."""

from __future__ import annotations

import math


def learning_rate(step: int, steps: int, peak: float, warm_up: float = 0.03) -> float:
    """Linear to the peak over the first share of steps, then a cosine to 0.

    Args:
        step: From 0.
        steps: In all.
        peak: Largest rate.
        warm_up: Share of the steps.

    >>> [round(learning_rate(step, 100, 1.0), 3) for step in (0, 2, 3, 51, 99)]
    [0.333, 1.0, 1.0, 0.508, 0.0]
    """
    rising = max(1, round(warm_up * steps))
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def confidence_coefficient(step: int, steps: int, most: float, warm_up: float = 0.15) -> float:
    """Weight of the student's own guesses: linear from 0 to ``most`` over the first share of steps.

    >>> [confidence_coefficient(step, 100, 0.5) for step in (0, 15, 99)]
    [0.0, 0.5, 0.5]
    """
    return most * min(1.0, step / max(1, round(warm_up * steps)))
