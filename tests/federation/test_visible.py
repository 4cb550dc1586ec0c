"""Updates without a common signal are recognised from what rounds record, and only those."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedslm.aggregation.mean import signal_to_noise
from fedslm.federation.visible import SignalWatch, visible_from

PARAMETERS, CLIENTS, ROUNDS = 5_000, 6, 8


def ratio_of(generator: np.random.Generator, signal: float) -> float:
    """A round's recorded ratio: noise of deviation 1 at each client, and a common direction."""
    common = signal * math.sqrt(PARAMETERS / CLIENTS) * generator.standard_normal(PARAMETERS)
    common /= math.sqrt(PARAMETERS)
    updates = common + generator.standard_normal((CLIENTS, PARAMETERS))
    mean_square = float(np.square(updates).sum(axis=1).mean())
    return signal_to_noise(CLIENTS, mean_square, float(np.square(updates.mean(axis=0)).sum()))


def warned(caplog: pytest.LogCaptureFixture, ratios: list[float], unit: str = "record") -> list[int]:
    """Rounds after which a warning came."""
    watch = SignalWatch()
    moving = SimpleNamespace(num_parameters=PARAMETERS)
    config: Any = SimpleNamespace(
        federation=SimpleNamespace(rounds=ROUNDS), privacy=SimpleNamespace(unit=unit)
    )
    watch.on_start(config, SimpleNamespace(server=SimpleNamespace(moving=moving)))  # type: ignore[arg-type]
    found = []
    with caplog.at_level(logging.WARNING):
        for number, ratio in enumerate(ratios, start=1):
            caplog.clear()
            watch.on_round(SimpleNamespace(round=number, signal_to_noise=ratio))  # type: ignore[arg-type]
            found += [number] * len(caplog.records)
    return found


def test_noise_is_recognised_once(caplog: pytest.LogCaptureFixture) -> None:
    """After four rounds, once, while rounds are left; without privacy there is nothing to keep."""
    generator = np.random.default_rng(0)
    ratios = [ratio_of(generator, 0.0) for _ in range(ROUNDS)]
    assert warned(caplog, ratios) == [4]
    assert warned(caplog, ratios, unit="none") == []
    assert warned(caplog, ratios[:3]) == []


def test_a_signal_is_not_taken_for_noise(caplog: pytest.LogCaptureFixture) -> None:
    """Three times the bound is seen in each of twenty runs."""
    bound = visible_from(PARAMETERS, 4)
    for seed in range(20):
        generator = np.random.default_rng(seed)
        ratios = [ratio_of(generator, 3 * bound) for _ in range(ROUNDS)]
        assert warned(caplog, ratios) == []


def test_the_bound_falls_with_values_and_rounds() -> None:
    """Sixteen times the values or the rounds halve it."""
    assert math.isclose(visible_from(16 * PARAMETERS, 4), visible_from(PARAMETERS, 4) / 2)
    assert math.isclose(visible_from(PARAMETERS, 64), visible_from(PARAMETERS, 4) / 2)
