"""A whole client as the unit: what it adds to a sum is bounded for any data, and noisy for any data."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedslm.errors import OutOfRange, PrivacyError
from fedslm.privacy import accounting
from fedslm.privacy.encoding import grid_of
from fedslm.privacy.plan import ClientPlan, from_json
from fedslm.privacy.shares import NoiseShares
from fedslm.records import AdapterState
from fedslm.training import whole_update
from fedslm.training.local import LocalWork
from fedslm.training.whole_update import share_of_update

CLIP, BITS, SIZE = 0.5, 18, 400
PLAN = ClientPlan(
    epsilon=8.0,
    delta=1e-3,
    clip_norm=CLIP,
    noise_multiplier=1.0,
    sample_rate=1.0,
    normaliser=1,
    steps_per_round=4,
    rounds=3,
    shares=NoiseShares(8, 0, BITS, "masked"),
    batch_size=2,
)


class Silent:
    """A sampler of no noise: what is left is the clipped update."""

    def draw(self, count: int, variance: int) -> np.ndarray[Any, Any]:
        """Zeros; a variance below one node's share is refused."""
        assert variance >= (CLIP / grid_of(CLIP, BITS)) ** 2 / 8
        return np.zeros(count, dtype=np.int64)


def part(
    update: object, monkeypatch: pytest.MonkeyPatch, *, noise: bool = False
) -> np.ndarray[Any, Any]:
    """A client's part of a sum as whole numbers, if its training moves the adapter by an update."""
    start = AdapterState({"a": np.ones((20, 10), np.float32), "b": np.ones((20, 10), np.float32)})

    def trained(*_: object) -> AdapterState:
        if isinstance(update, Exception):
            raise update
        flat = np.broadcast_to(np.asarray(update, np.float32), SIZE).reshape(2, 20, 10)
        return AdapterState({"a": start["a"] + flat[0], "b": start["b"] + flat[1]})

    monkeypatch.setattr(whole_update, "train", trained)
    if not noise:
        monkeypatch.setattr(whole_update, "DiscreteGaussian", Silent)
    work = LocalWork(start, frozenset({"a", "b"}), 0, 1, 0)
    nothing: Any = None
    words = share_of_update(nothing, nothing, (), PLAN, nothing, work)
    return words.view(np.int32).astype(np.int64)


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e6, 3e38])
def test_no_update_is_longer_than_the_clip_norm(size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound holds in whole numbers, exactly; a short update is only rounded."""
    update = np.random.default_rng(0).normal(size=SIZE).astype(np.float32)
    update *= np.float32(size / float(np.linalg.norm(update.astype(np.float64))))
    found = part(update, monkeypatch)
    most = int(CLIP / grid_of(CLIP, BITS))
    assert sum(int(each) ** 2 for each in found) <= most**2
    if size < CLIP:
        moved = (np.float32(1) + update) - np.float32(1)
        assert np.abs(found * grid_of(CLIP, BITS) - moved).max() <= grid_of(CLIP, BITS)
    else:
        assert math.sqrt(sum(int(each) ** 2 for each in found)) > 0.99 * most


@pytest.mark.parametrize("update", [RuntimeError("a record"), np.nan, np.inf, MemoryError()])
def test_a_failure_adds_nothing_but_noise(update: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether training fails depends on the data, so it must not show."""
    assert not part(update, monkeypatch).any()
    monkeypatch.undo()
    assert part(update, monkeypatch, noise=True).any()


def test_a_round_costs_one_gaussian_release() -> None:
    """Local steps cost nothing; epsilon is the least over whole orders of T·α/(2σ²) and its conversion."""
    assert [each.steps for each in PLAN.round_events] == [1]
    rounds, sigma, delta = PLAN.rounds, PLAN.noise_multiplier, PLAN.delta
    direct = min(
        rounds * order / (2 * sigma**2)
        + math.log1p(-1 / order)
        - (math.log(delta) + math.log(order)) / (order - 1)
        for order in range(2, 200)
    )  # Canonne, Kamath and Steinke 2020, proposition 12
    assert accounting.epsilon(PLAN.run_events, delta) == pytest.approx(direct, rel=1e-6)


@pytest.mark.parametrize(
    "changes",
    [{"sample_rate": 0.5}, {"normaliser": 2}, {"shares": None}, {"batch_size": 0},
     {"metric_noise_multiplier": 2.0}],
)  # fmt: skip
def test_a_plan_for_whole_clients_has_one_form(changes: dict[str, Any]) -> None:
    """It comes back from JSON; anything that its guarantee does not cover is refused."""
    assert from_json(PLAN.to_json()) == PLAN
    with pytest.raises((OutOfRange, PrivacyError)):
        replace(PLAN, **changes)


def test_the_update_is_clipped_as_one_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not tensor by tensor: the direction is kept."""
    update = np.concatenate([np.full(200, 3.0), np.full(200, 1.0)])
    found = part(update, monkeypatch).astype(np.float64)
    assert found[:200].mean() / found[200:].mean() == pytest.approx(3.0, rel=1e-3)
