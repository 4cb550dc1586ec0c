"""Schedules of rates and weights over a distillation's steps."""

from __future__ import annotations

import math


def learning_rate(step: int, steps: int, peak: float, warm_up: float = 0.03) -> float:
    """Returns a rate that rises linearly to the peak, then falls to 0 along a cosine.

    Args:
        step: Number of the step, from 0.
        steps: Total number of steps.
        peak: Maximum rate.
        warm_up: Share of the steps in which the rate rises.

    >>> [round(learning_rate(step, 100, 1.0), 3) for step in (0, 2, 3, 51, 99)]
    [0.333, 1.0, 1.0, 0.508, 0.0]
    """
    rising = max(1, round(warm_up * steps))
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def confidence_coefficient(step: int, steps: int, most: float, warm_up: float = 0.15) -> float:
    """Weight of the student's own predictions: rises linearly from 0 to ``most``, then stays constant.

    >>> [confidence_coefficient(step, 100, 0.5) for step in (0, 15, 99)]
    [0.0, 0.5, 0.5]
    """
    return most * min(1.0, step / max(1, round(warm_up * steps)))
