"""Tests of the weighted mean and of what the methods make of it."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from fedslm.aggregation import mean as mean_module
from fedslm.aggregation.mean import WeightedMean, signal_to_noise
from fedslm.aggregation.methods import sent_keys
from fedslm.aggregation.ranks import crop
from fedslm.errors import FederationError
from fedslm.records import AdapterState, ClientUpdate

A, B = "layer.lora_A.weight", "layer.lora_B.weight"
RANK, WIDTH, HEIGHT = 4, 12, 9


def state(seed: int) -> AdapterState:
    """A random adapter of one layer."""
    generator = np.random.default_rng(seed)
    return AdapterState(
        {
            A: generator.standard_normal((RANK, WIDTH)).astype(np.float32),
            B: generator.standard_normal((HEIGHT, RANK)).astype(np.float32),
        }
    )


def averaged(updates: list[AdapterState], weights: list[float] | None = None) -> WeightedMean:
    """The mean of some updates."""
    mean = WeightedMean(updates[0].shapes)
    for client, update in enumerate(updates):
        weight = 1.0 if weights is None else weights[client]
        mean.add(ClientUpdate(client, update, weight))
    return mean


def assert_close(one: AdapterState, other: AdapterState, tolerance: float = 1e-6) -> None:
    """Both have the same keys and nearly the same values."""
    assert list(one) == list(other)
    for key in one:
        np.testing.assert_allclose(one[key], other[key], rtol=tolerance, atol=tolerance)


def test_one_client_is_its_own_mean() -> None:
    """With one client the aggregate is its update, bit for bit."""
    assert averaged([state(1)]).result().sha256() == state(1).sha256()


@pytest.mark.parametrize("weight", [0.1, 3.0, 600.0])
def test_one_weighted_client_is_its_own_mean(weight: float) -> None:
    """Whatever one client weighs, the aggregate is its update."""
    assert_close(averaged([state(1)], [weight]).result(), state(1))


@pytest.mark.parametrize("count", [2, 4, 8])
def test_equal_clients_are_their_mean(count: int) -> None:
    """Any number of equal updates gives that update."""
    assert_close(averaged([state(1)] * count).result(), state(1))


def test_the_mean_is_the_mean() -> None:
    """The streaming sum is the mean in double precision."""
    updates = [state(seed) for seed in range(7)]
    expected = {key: np.mean([u[key].astype(float) for u in updates], axis=0) for key in updates[0]}
    result = averaged(updates).result()
    for key in result:
        np.testing.assert_allclose(result[key], expected[key], rtol=1e-5, atol=1e-6)
        assert result[key].dtype == np.float32


def test_order_does_not_matter() -> None:
    """The clients are a set: every order gives the same up to rounding, one order the same bits."""
    updates = [state(seed) for seed in range(4)]
    expected = averaged(updates).result()
    assert averaged(updates).result().sha256() == expected.sha256()
    for order in itertools.permutations(updates):
        assert_close(averaged(list(order)).result(), expected)


def test_weights_weigh() -> None:
    """A client of weight 3 counts as three clients of weight 1, and only ratios matter."""
    one, other = state(1), state(2)
    assert_close(averaged([one, other], [3.0, 1.0]).result(), averaged([one] * 3 + [other]).result())
    assert_close(
        averaged([one, other], [300.0, 100.0]).result(), averaged([one, other], [3.0, 1.0]).result()
    )


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_a_weight_that_is_none_is_refused(weight: float) -> None:
    """A client without a proper weight is an error, and leaves the sum as it was."""
    mean = averaged([state(1)])
    with pytest.raises(FederationError, match="client 5: weight="):
        mean.add(ClientUpdate(5, state(2), weight))
    assert mean.count == 1
    assert mean.result().sha256() == state(1).sha256()


def test_nothing_has_no_mean() -> None:
    """Without updates there is an error, not an adapter of zeros."""
    with pytest.raises(FederationError, match="no update"):
        WeightedMean(state(0).shapes).result()


def test_updates_stay_as_they_were() -> None:
    """Averaging changes nobody's tensors; a mean that was taken stays, and takes no more updates."""
    updates = [state(1), state(2)]
    before = [update.sha256() for update in updates]
    mean = averaged(updates)
    kept = mean.result().sha256()
    with pytest.raises(FederationError, match="taken already"):
        mean.add(ClientUpdate(2, state(3), 1.0))
    assert [update.sha256() for update in updates] == before
    assert mean.result().sha256() == kept


def test_frozen_factors_are_not_touched() -> None:
    """Under FFA only B is averaged: a client's A is not looked at, and the shared A stays."""
    shared = state(0)
    sent = sent_keys("ffa", shared)
    assert sent == {B}
    mean = WeightedMean(shared.select(sent).shapes)
    for seed in (1, 2):
        mean.add(ClientUpdate(seed, state(seed), 1.0), state(seed).norm())
    whole = shared.plus(mean.result())
    assert whole.select({A}).sha256() == shared.select({A}).sha256()
    np.testing.assert_allclose(
        whole[B], shared[B] + (state(1)[B] + state(2)[B]) / 2, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 5.0]])
def test_ffa_is_exact(weights: list[float] | None) -> None:
    """With one shared A the product of the aggregate is the mean of the clients' products."""
    shared = state(0)
    updates = [shared.merged(state(seed).select({B})) for seed in (1, 2, 3)]
    shares = np.array(weights or [1.0] * 3) / sum(weights or [1.0] * 3)
    whole = averaged(updates, weights).result()
    products = sum(p * update[B] @ shared[A] for p, update in zip(shares, updates, strict=True))
    np.testing.assert_allclose(whole[B] @ shared[A], products, rtol=1e-6, atol=2e-6)


def test_fedit_misses_exactly_the_covariance_of_the_factors() -> None:
    """FedIT's error is Σpₖ(Bₖ-B̄)(Aₖ-Ā): large for unequal clients, and none beside it."""
    weights = np.array([1.0, 2.0, 5.0])
    updates, shares = [state(seed) for seed in (1, 2, 3)], weights / weights.sum()
    mean = averaged(updates, list(weights)).result()
    pairs = list(zip(shares, updates, strict=True))
    exact = sum(p * update[B] @ update[A] for p, update in pairs)
    covariance = sum(p * (update[B] - mean[B]) @ (update[A] - mean[A]) for p, update in pairs)
    np.testing.assert_allclose(exact - mean[B] @ mean[A], covariance, rtol=1e-5, atol=1e-5)
    assert np.linalg.norm(covariance) > 0.1 * np.linalg.norm(exact)


def test_a_missing_client_does_not_change_the_denominator() -> None:
    """With the cohort as the denominator a client that drops out counts as one that did not move."""
    updates = [state(seed) for seed in (1, 2)]
    mean = WeightedMean(updates[0].shapes, cohort_ranks=[RANK] * 4)
    for client, update in enumerate(updates):
        mean.add(ClientUpdate(client, update, 1.0))
    expected = {key: (updates[0][key] + updates[1][key]) / 4 for key in updates[0]}
    assert_close(mean.result(), AdapterState(expected))
    with pytest.raises(FederationError, match="weight=2"):
        mean.add(ClientUpdate(2, state(3), 2.0))


def test_lower_ranks_do_not_dilute() -> None:
    """Every row of A and column of B is averaged over the clients that hold it; nobody's stays."""
    high, low = state(1), crop(state(2), 2)
    mean = averaged([high])
    mean.add(ClientUpdate(1, low, 3.0))
    result = mean.result()
    np.testing.assert_allclose(result[B][:, 2:], high[B][:, 2:], rtol=1e-6)
    np.testing.assert_allclose(result[B][:, :2], (high[B][:, :2] + 3 * low[B]) / 4, rtol=1e-5)
    np.testing.assert_allclose(result[A][2:], high[A][2:], rtol=1e-6)
    np.testing.assert_allclose(result[A][:2], (high[A][:2] + 3 * low[A]) / 4, rtol=1e-5, atol=1e-6)
    alone = WeightedMean(high.shapes, cohort_ranks=[2, 2])
    alone.add(ClientUpdate(0, low, 1.0))
    assert not alone.result()[B][:, 2:].any()
    np.testing.assert_allclose(alone.result()[B][:, :2], low[B] / 2, rtol=1e-6)


def test_a_core_is_averaged_block_by_block() -> None:
    """Entry (i, j) of Fed-SB's core is averaged over the clients whose rank is above both."""
    key = "layer.lora_R.weight"
    whole, part = np.ones((3, 3), np.float32), np.full((2, 2), 5, np.float32)
    mean = averaged([AdapterState({key: whole})])
    low = AdapterState({key: part})
    mean.add(ClientUpdate(1, low, 1.0))
    np.testing.assert_allclose(mean.result()[key], [[3, 3, 1], [3, 3, 1], [1, 1, 1]])


def test_a_bounded_update_counts_for_less() -> None:
    """The norm bound's factor scales an update, not its weight in the denominator."""
    mean = averaged([state(1)])
    mean.add(ClientUpdate(1, state(2), 1.0), 0.25 * state(2).norm())
    expected = {key: (state(1)[key] + 0.25 * state(2)[key]) / 2 for key in state(1)}
    assert_close(mean.result(), AdapterState(expected), 1e-5)


def test_a_giant_leaves_nothing_but_its_bounded_length() -> None:
    """An update that proves too long only at its last tensor costs the honest sum no precision."""
    honest, small, giant = state(1), state(2), state(3)
    last = list(giant)[-1]
    hostile = AdapterState({k: np.float32(1e15) * giant[k] if k == last else small[k] for k in giant})
    assert small.norm() < 10 < hostile.norm()
    mean = averaged([honest])
    assert mean.add(ClientUpdate(1, hostile, 1.0), 10.0) == pytest.approx(hostile.norm())
    factor = 10.0 / hostile.norm()
    expected = {
        key: ((honest[key].astype(float) + factor * hostile[key].astype(float)) / 2).astype(np.float32)
        for key in honest
    }
    assert_close(mean.result(), AdapterState(expected))


def one_buffer(update: AdapterState) -> AdapterState:
    """The same values in one buffer, as a message brings them."""
    flat = np.concatenate([update[key].ravel() for key in update])
    return AdapterState.of_flat(flat, update.shapes)


@pytest.mark.parametrize("block", [1, 7, 1 << 19])
@pytest.mark.parametrize("limit", [math.inf, 1.0])
def test_one_buffer_has_the_mean_of_its_tensors(
    block: int, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it is cut into blocks, bounded or not, and mixed with updates that are tensors."""
    monkeypatch.setattr(mean_module, "_BLOCK", block)
    pieces, whole = (WeightedMean(state(0).shapes) for _ in range(2))
    for number in range(3):
        update = state(number)
        norm = pieces.add(ClientUpdate(number, update, 1.0), limit)
        sent = one_buffer(update) if number else update
        assert whole.add(ClientUpdate(number, sent, 1.0), limit) == pytest.approx(norm)
    assert_close(whole.result(), pieces.result())


def test_one_buffer_of_other_tensors_is_not_mixed_up() -> None:
    """As many values in other shapes: each tensor is added to its own sum, or it is an error."""
    shapes = {"x.lora_A.weight": (2, 3), "x.lora_B.weight": (3, 2)}
    mean = WeightedMean(shapes)
    turned = {"x.lora_A.weight": (3, 2), "x.lora_B.weight": (2, 3)}
    update = AdapterState.of_flat(np.arange(12, dtype=np.float32), turned)
    with pytest.raises(ValueError, match="broadcast"):
        mean.add(ClientUpdate(0, update, 1.0))


def test_absent_clients_do_not_look_like_noise() -> None:
    """With the cohort as denominator, equal updates of half of it are all signal."""
    mean = WeightedMean(state(1).shapes, cohort_ranks=[RANK] * 10)
    for client in range(5):
        mean.add(ClientUpdate(client, state(1), 1.0))
    found = mean.signal_to_noise()
    assert found is not None
    assert found > 1e3


def planted(ratio: float, *, num_clients: int, size: int, seed: int) -> WeightedMean:
    """Updates of one common signal and unit noise, with ‖signal‖ / ‖noise of the mean‖ = ratio."""
    generator = np.random.default_rng(seed)
    signal = generator.standard_normal(size)
    signal *= ratio * math.sqrt(size / num_clients) / np.linalg.norm(signal)
    updates = [
        AdapterState({"w": (signal + generator.standard_normal(size)).astype(np.float32)})
        for _ in range(num_clients)
    ]
    return averaged(updates)


@pytest.mark.parametrize("num_clients", [2, 5, 20])
@pytest.mark.parametrize("ratio", [0.5, 1.0, 4.0])
def test_signal_to_noise_recovers_a_planted_ratio(ratio: float, num_clients: int) -> None:
    """The estimate from released updates alone is the ratio that was planted, whatever the number of clients."""
    found = planted(ratio, num_clients=num_clients, size=50_000, seed=0).signal_to_noise()
    assert found == pytest.approx(ratio, rel=0.1)


@pytest.mark.parametrize("seed", range(5))
def test_noise_alone_has_no_signal(seed: int) -> None:
    """Updates of noise alone come out at 0, or at what 50,000 values can hide."""
    found = planted(0.0, num_clients=5, size=50_000, seed=seed).signal_to_noise()
    assert found is not None
    assert 0 <= found < 0.2


def test_signal_to_noise_needs_two_clients() -> None:
    """One client says nothing about noise."""
    assert averaged([state(1)]).signal_to_noise() is None


def test_equal_updates_are_all_signal() -> None:
    """Without differences the ratio is infinite; differences that cancel are no signal."""
    assert signal_to_noise(3, 2.0, 2.0) == math.inf
    assert signal_to_noise(2, 2.0, 0.0) == 0.0
