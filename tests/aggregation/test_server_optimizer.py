"""Tests of how the server moves by the combined update.

Flower's strategies are the reference where their formulas are the paper's: FedAvgM is; FedAdam, FedYogi
and FedAdagrad start the second moment at 0 where algorithm 2 of arXiv 2003.00295 and this project have
τ², and FedAdam corrects for bias, which algorithm 2 does not. Both are taken back here, so that all other
arithmetic is Flower's; algorithm 2 itself is the second reference.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedslm.aggregation.server_optimizer import ServerOptimizer
from fedslm.config import ServerOptimizerName
from fedslm.errors import FederationError
from fedslm.records import AdapterState

A, B, SCORE = "q.lora_A.weight", "q.lora_B.weight", "score.weight"
NAMES: list[ServerOptimizerName] = ["fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad"]
ADAPTIVE: list[ServerOptimizerName] = ["fedadam", "fedyogi", "fedadagrad"]
RATE, BETA1, BETA2, TAU = 0.05, 0.9, 0.97, 1e-2
NOTHING = AdapterState({})
Tensors = dict[str, NDArray[np.float64]]


def state(seed: int, size: float = 1.0) -> AdapterState:
    """A random adapter."""
    generator = np.random.default_rng(seed)
    shapes = {A: (3, 4), B: (5, 3), SCORE: (2,)}
    return AdapterState(
        {
            key: (size * generator.standard_normal(shape)).astype(np.float32)
            for key, shape in shapes.items()
        }
    )


def optimizer(
    name: ServerOptimizerName, rate: float = RATE, momentum: float = BETA1
) -> ServerOptimizer:
    """A server optimizer."""
    return ServerOptimizer(name, rate, momentum, BETA2, TAU)


def differences(rounds: int) -> list[AdapterState]:
    """Combined updates of some rounds, small and large."""
    return [state(10 + t, [0.01, 1.0, 0.1, 0.0, 3.0][t % 5]) for t in range(rounds)]


def assert_close(found: AdapterState, expected: Any) -> None:
    """Every tensor is nearly what is expected."""
    for key in found:
        np.testing.assert_allclose(found[key], expected[key], rtol=2e-4, atol=2e-5)


def flower_path(
    strategy: Any, start: AdapterState, monkeypatch: pytest.MonkeyPatch, before: Any = None
) -> list[Tensors]:
    """Where Flower's own strategy goes, with the weighted mean of the clients given."""
    path: list[Tensors] = []
    now = {key: start[key].astype(np.float64) for key in start}
    for t, difference in enumerate(differences(8), 1):
        mean = ArrayRecord({key: Array(now[key] + difference[key]) for key in now})
        monkeypatch.setattr(FedAvg, "aggregate_train", lambda *_, mean=mean: (mean, None))
        if isinstance(strategy, FedAvgM):
            strategy.current_arrays = ArrayRecord({key: Array(now[key]) for key in now})
        else:
            strategy.current_arrays = now
        if before is not None:
            before(strategy, t)
        arrays, _ = strategy.aggregate_train(t, [])
        now = {key: arrays[key].numpy() for key in now}
        path.append(now)
    return path


def our_path(chosen: ServerOptimizer, start: AdapterState) -> list[AdapterState]:
    """Where this project's optimizer goes."""
    path, memory = [start], NOTHING
    for difference in differences(8):
        moved, memory = chosen.step(path[-1], difference, memory)
        path.append(moved)
    return path[1:]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("rate", [0.05, 0.7])
def test_fedavgm_is_flowers(rate: float, momentum: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path is that of Flower's FedAvgM, which takes differences as negative gradients."""
    strategy = FedAvgM(server_learning_rate=rate, server_momentum=momentum)
    expected = flower_path(strategy, state(1), monkeypatch)
    for found, wanted in zip(
        our_path(optimizer("fedavgm", rate, momentum), state(1)), expected, strict=True
    ):
        assert_close(found, wanted)


def with_tau(strategy: Any, _: int) -> None:
    """Starts Flower's second moment where algorithm 2 starts it."""
    if not strategy.v_t:
        strategy.v_t = {
            key: np.full_like(value, TAU**2) for key, value in strategy.current_arrays.items()
        }


def without_correction(strategy: Any, t: int) -> None:
    """Takes Flower's correction for bias back as well."""
    with_tau(strategy, t)
    strategy.eta = RATE * (1 - BETA1 ** (t + 1)) / math.sqrt(1 - BETA2 ** (t + 1))


def test_fedadam_is_flowers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path is that of Flower's FedAdam without its correction for bias."""
    strategy = FedAdam(eta=RATE, beta_1=BETA1, beta_2=BETA2, tau=TAU)
    expected = flower_path(strategy, state(1), monkeypatch, without_correction)
    for found, wanted in zip(our_path(optimizer("fedadam"), state(1)), expected, strict=True):
        assert_close(found, wanted)


def test_fedyogi_is_flowers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path is that of Flower's FedYogi."""
    strategy = FedYogi(eta=RATE, beta_1=BETA1, beta_2=BETA2, tau=TAU)
    expected = flower_path(strategy, state(1), monkeypatch, with_tau)
    for found, wanted in zip(our_path(optimizer("fedyogi"), state(1)), expected, strict=True):
        assert_close(found, wanted)


def test_fedadagrad_is_flowers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path is that of Flower's FedAdagrad, which has no momentum."""
    strategy = FedAdagrad(eta=RATE, tau=TAU)
    expected = flower_path(strategy, state(1), monkeypatch, with_tau)
    chosen = optimizer("fedadagrad", momentum=0.0)
    for found, wanted in zip(our_path(chosen, state(1)), expected, strict=True):
        assert_close(found, wanted)


@pytest.mark.parametrize("name", ADAPTIVE)
@settings(max_examples=20, deadline=None)
@given(
    beta1=st.floats(0, 0.99),
    beta2=st.floats(0, 0.999),
    tau=st.floats(1e-3, 0.1),
    values=st.lists(st.floats(-3, 3), min_size=1, max_size=8),
)
def test_it_is_algorithm_2(
    name: ServerOptimizerName, beta1: float, beta2: float, tau: float, values: list[float]
) -> None:
    """One coordinate goes as algorithm 2 of arXiv 2003.00295 says, in double precision."""
    chosen = ServerOptimizer(name, RATE, beta1, beta2, tau)
    now, memory = AdapterState({SCORE: np.ones(1, np.float32)}), NOTHING
    x, m, v = 1.0, 0.0, tau**2
    for given_value in values:
        g = float(np.float32(given_value))
        assume(name != "fedyogi" or abs(v - g * g) > 1e-3 * (v + g * g))  # the sign is a jump
        now, memory = chosen.step(now, AdapterState({SCORE: np.full(1, g, np.float32)}), memory)
        m = beta1 * m + (1 - beta1) * g
        if name == "fedadagrad":
            v = v + g * g
        elif name == "fedadam":
            v = beta2 * v + (1 - beta2) * g * g
        else:
            v = v - (1 - beta2) * g * g * float(np.sign(v - g * g))
        x += RATE * m / (math.sqrt(max(v, 0)) + tau)
        assert float(now[SCORE][0]) == pytest.approx(x, rel=2e-3, abs=2e-3)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), rate=st.floats(0.01, 2))
def test_fedavg_is_a_plain_step(seed: int, rate: float) -> None:
    """The start plus the rate times the difference, and at rate 1 the sum bit for bit; no memory."""
    start, difference = state(seed), state(seed + 1)
    moved, memory = optimizer("fedavg", 1.0).step(start, difference, NOTHING)
    for key in start:
        np.testing.assert_array_equal(moved[key], start[key] + difference[key])
    assert len(memory) == 0
    moved, _ = optimizer("fedavg", rate).step(start, difference, NOTHING)
    assert_close(moved, {key: start[key] + rate * difference[key] for key in start})


@pytest.mark.parametrize("name", NAMES)
def test_other_tensors_are_not_touched(name: ServerOptimizerName) -> None:
    """Tensors that were not trained stay, and so does their memory: old momentum moves nothing."""
    chosen = optimizer(name)
    start, memory = chosen.step(state(1), state(2), NOTHING)
    moved, later = chosen.step(start, state(3).select({B}), memory)
    assert moved.select({A, SCORE}).sha256() == start.select({A, SCORE}).sha256()
    assert not (moved[B] == start[B]).any()
    assert list(later) == list(memory)
    for key in memory:
        assert (later[key] == memory[key]).all() == (not key.endswith(B))
    assert len(memory) == {"fedavg": 0, "fedavgm": 3}.get(name, 6)


@pytest.mark.parametrize("name", NAMES)
def test_alternating_is_as_if_alone(name: ServerOptimizerName) -> None:
    """Factors trained in turn go each as if it were the only one."""
    chosen = optimizer(name)
    together, memory = state(1), NOTHING
    alone = {key: (state(1).select({key}), NOTHING) for key in (A, B)}
    for t in range(6):
        key = (A, B)[t % 2]
        difference = state(20 + t).select({key})
        together, memory = chosen.step(together, difference, memory)
        alone[key] = chosen.step(alone[key][0], difference, alone[key][1])
    for key in (A, B):
        np.testing.assert_array_equal(together[key], alone[key][0][key])


@pytest.mark.parametrize("name", NAMES)
def test_nobodys_tensors_change(name: ServerOptimizerName) -> None:
    """A step leaves its arguments as they were, and gives float32."""
    chosen = optimizer(name)
    start, memory = chosen.step(state(1), state(2), NOTHING)
    arguments = [start, state(3), memory]
    before = [each.sha256() for each in arguments]
    moved, later = chosen.step(arguments[0], arguments[1], arguments[2])
    assert [each.sha256() for each in arguments] == before
    assert {tensor.dtype for each in (moved, later) for tensor in each.tensors.values()} == {
        np.dtype(np.float32)
    }


@pytest.mark.parametrize("name", ADAPTIVE)
def test_a_first_step_is_no_longer_than_the_rate(name: ServerOptimizerName) -> None:
    """However large or small the first difference, no value moves further than the rate."""
    zeros = AdapterState({key: np.zeros_like(tensor) for key, tensor in state(1).tensors.items()})
    for size in (1e-12, 1e-3, 1.0, 1e6):
        moved, _ = optimizer(name).step(zeros, state(2, size), NOTHING)
        assert moved.is_finite()
        assert max(float(np.abs(moved[key]).max()) for key in moved) <= RATE * 1.0001


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "wrong",
    [
        {"v.lora_A.weight": np.zeros((3, 4), np.float32)},
        {A: np.zeros((4, 3), np.float32)},
        {A: np.zeros((1, 4), np.float32)},
        {SCORE: np.zeros((), np.float32)},
    ],
)
def test_what_does_not_fit_is_refused(
    name: ServerOptimizerName, wrong: dict[str, NDArray[np.float32]]
) -> None:
    """An unknown tensor or one of another shape is an error, not a broadcast."""
    with pytest.raises(FederationError, match="does not fit"):
        optimizer(name).step(state(1), AdapterState(wrong), NOTHING)
