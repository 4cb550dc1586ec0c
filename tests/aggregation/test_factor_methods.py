"""Tests of the methods that need every client's factors, against dense matrices in double precision."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import scipy.linalg
from flwr.server.strategy.aggregate import aggregate as flower_aggregate
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedslm.aggregation.factor_methods import (
    FactorRound,
    effective_weights,
    set_aside,
)
from fedslm.aggregation.ranks import crop
from fedslm.aggregation.updates import Listed
from fedslm.errors import FederationError
from fedslm.records import AdapterState, ClientUpdate

Matrix = NDArray[np.float64]
LAYERS, HEAD = ("one", "two"), "score.weight"
EXACT, TRUNCATING, FAMILY = (
    ("stack", "fedex", "flora"),
    "flexlora",
    ("stack", "fedex", "flora", "flexlora"),
)
SCALINGS = st.sampled_from([0.5, 1.0, 4.0])


def key(layer: str, part: str) -> str:
    """A tensor's name."""
    return f"{layer}.{part}.weight"


@dataclass(frozen=True)
class Case:
    """A round: where it starts, every client's own adapter, what it weighs, and s."""

    start: AdapterState
    clients: Sequence[AdapterState]
    weights: Sequence[float]
    scaling: float

    @property
    def updates(self) -> Listed:
        """What the clients send: differences from the part of the start that they hold."""
        sent = []
        for number, (own, weight) in enumerate(zip(self.clients, self.weights, strict=True)):
            delta = {}
            for name in own:
                held = tuple(slice(length) for length in own[name].shape)
                delta[name] = own[name] - self.start[name][held]
            sent.append(ClientUpdate(number, AdapterState(delta), weight))
        return Listed(sent)

    @property
    def shares(self) -> Matrix:
        """The weights, of sum one."""
        return np.asarray(self.weights, float) / np.sum(self.weights)

    @property
    def fresh(self) -> AdapterState:
        """Another start of the same shapes, with B = 0."""
        generator = np.random.default_rng(99)
        return AdapterState(
            {
                name: np.zeros(shape, np.float32)
                if "lora_B" in name
                else generator.standard_normal(shape).astype(np.float32)
                for name, shape in self.start.shapes.items()
                if "delta" not in name
            }
        )

    def aggregate(self, method: str, shrink: Sequence[float] | None = None) -> AdapterState:
        """What the server makes of it."""
        return self.round.aggregate(method, shrink)

    @property
    def round(self) -> FactorRound:
        """What the server has."""
        return FactorRound(self.start, self.updates, self.scaling, self.fresh)


def product(state: AdapterState, layer: str) -> Matrix:
    """Dense B·A in double precision."""
    return state[key(layer, "lora_B")].astype(float) @ state[key(layer, "lora_A")].astype(float)


def aside(state: AdapterState, layer: str) -> Matrix | float:
    """Dense D."""
    if key(layer, "delta_B") not in state.tensors:
        return 0.0
    return state[key(layer, "delta_B")].astype(float) @ state[key(layer, "delta_A")].astype(float)


def ideal(case: Case, layer: str, shrink: Sequence[float] | None = None) -> Matrix:
    """D + W + Σ pₖ·cₖ·(Wₖ - W of its rows and columns), W = s·B·A of the start, Wₖ = s·Bₖ·Aₖ, dense."""
    total = case.scaling * product(case.start, layer) + aside(case.start, layer)
    for number, (share, own) in enumerate(zip(case.shares, case.clients, strict=True)):
        factor = 1.0 if shrink is None else shrink[number]
        rank = own[key(layer, "lora_A")].shape[0]
        held = crop(case.start.select({key(layer, "lora_A"), key(layer, "lora_B")}), rank)
        change = product(own, layer) - product(held, layer)
        total += share * factor * case.scaling * change
    return total


def padded_mean(
    tensors: Sequence[NDArray[np.float32]], shares: Matrix, shape: tuple[int, ...]
) -> Matrix:
    """A weighted mean in which what a client does not hold is zero."""
    total = np.zeros(shape)
    for share, tensor in zip(shares, tensors, strict=True):
        total[: tensor.shape[0], : tensor.shape[1]] += share * tensor.astype(float)
    return total


def assert_close(found: Matrix, expected: Matrix, tolerance: float = 1e-5) -> None:
    """Both are the same relative to the size of what is expected."""
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


def distance(found: Matrix, expected: Matrix) -> float:
    """How far off, relative to what is expected."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def make(
    seed: int,
    *,
    ranks: Sequence[int],
    rank: int,
    height: int = 7,
    width: int = 6,
    weights: Sequence[float] | None = None,
    scaling: float = 1.0,
    aside_rank: int = 0,
    drift: float = 1.0,
) -> Case:
    """Random clients around a random start."""
    generator = np.random.default_rng(seed)

    def draw(*shape: int) -> NDArray[np.float32]:
        return generator.standard_normal(shape).astype(np.float32)

    start = {HEAD: draw(3, height)}
    for layer, (out, into) in zip(LAYERS, ((height, width), (width, height)), strict=True):
        start[key(layer, "lora_A")], start[key(layer, "lora_B")] = draw(rank, into), draw(out, rank)
        if aside_rank:
            start[key(layer, "delta_A")] = draw(aside_rank, into)
            start[key(layer, "delta_B")] = draw(out, aside_rank)
    clients = []
    for own_rank in ranks:
        own = {}
        for name, tensor in start.items():
            if "delta" in name:
                continue
            part = tensor[:own_rank] if "lora_A" in name else tensor
            part = part[:, :own_rank] if "lora_B" in name else part
            own[name] = (part + np.float32(drift) * draw(*part.shape)).astype(np.float32)
        clients.append(AdapterState(own))
    return Case(AdapterState(start), clients, list(weights or [1.0] * len(ranks)), scaling)


@st.composite
def cases(draw: st.DrawFn, *, several_ranks: bool = True, put_aside: bool = True) -> Case:
    """Rounds of 1 to 5 clients of any shapes, weights, ranks and s."""
    rank, count = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    ranks = [draw(st.integers(1, rank)) if several_ranks else rank for _ in range(count)]
    return make(
        draw(st.integers(0, 9999)),
        ranks=ranks,
        rank=rank,
        height=draw(st.integers(3, 10)),
        width=draw(st.integers(3, 10)),
        weights=[draw(st.floats(0.1, 10)) for _ in range(count)],
        scaling=draw(SCALINGS),
        aside_rank=draw(st.integers(0, 3)) if put_aside else 0,
    )


factors_in = st.lists(st.floats(0.05, 1), min_size=5, max_size=5)
quick = settings(max_examples=20, deadline=None)


@pytest.mark.parametrize("method", ["stack", "flora"])
@quick
@given(case=cases())
def test_stacking_is_exact(method: str, case: Case) -> None:
    """Whatever the ranks, the effective weight is D + Σ pₖ·s·Bₖ·Aₖ; what a client does not hold stays."""
    found = effective_weights(case.aggregate(method), case.scaling)
    assert list(found) == list(LAYERS)
    for layer in LAYERS:
        assert_close(found[layer], ideal(case, layer))


@quick
@given(case=cases(several_ranks=False))
def test_fedex_is_exact(case: Case) -> None:
    """The means of the factors and the residual beside them are D + Σ pₖ·s·Bₖ·Aₖ."""
    found = effective_weights(case.aggregate("fedex"), case.scaling)
    for layer in LAYERS:
        assert_close(found[layer], ideal(case, layer))


@quick
@given(
    own_ranks=st.lists(st.integers(1, 2), min_size=1, max_size=3),
    aside_rank=st.integers(0, 2),
    scaling=SCALINGS,
    seed=st.integers(0, 999),
)
def test_flexlora_is_exact_where_the_ranks_fit(
    own_ranks: list[int], aside_rank: int, scaling: float, seed: int
) -> None:
    """As long as the ranks of all clients and of D together are at most r, nothing is cut off."""
    rank = sum(own_ranks) + aside_rank
    case = make(
        seed, ranks=own_ranks, rank=rank, height=12, width=11, scaling=scaling, aside_rank=aside_rank
    )
    for layer in LAYERS:  # nothing stands where the smallest client does not reach
        case.start[key(layer, "lora_B")][:, min(own_ranks) :] = 0
    found = effective_weights(case.aggregate("flexlora"), scaling)
    for layer in LAYERS:
        assert_close(found[layer], ideal(case, layer))


@quick
@given(case=cases())
def test_flexlora_is_the_best_of_its_rank(case: Case) -> None:
    """Its error is that of the dense decomposition's leading part: no rank-r matrix is nearer."""
    result = case.aggregate("flexlora")
    rank = case.start[key("one", "lora_A")].shape[0]
    assert result.shapes == {
        name: shape for name, shape in case.start.shapes.items() if "delta" not in name
    }
    for layer in LAYERS:
        expected = ideal(case, layer)
        error = np.linalg.norm(effective_weights(result, case.scaling)[layer] - expected)
        least = np.linalg.norm(scipy.linalg.svdvals(expected)[rank:])
        assert error == pytest.approx(least, rel=1e-4, abs=1e-5 * np.linalg.norm(expected))


@pytest.mark.parametrize("method", ["stack", "flexlora"])
@quick
@given(case=cases())
def test_the_factors_are_the_leading_part(method: str, case: Case) -> None:
    """s·B·A is the leading part of a dense decomposition, its values shared evenly between B and A.

    A direction that nothing needs keeps a fresh row of A under a zero column of B.
    """
    result = case.aggregate(method)
    rank = case.start[key("one", "lora_A")].shape[0]
    for layer in LAYERS:
        u, values, v = np.linalg.svd(ideal(case, layer), full_matrices=False)
        assume(len(values) <= rank or values[rank - 1] - values[rank] > 1e-2 * values[0])
        best = (u[:, :rank] * values[:rank]) @ v[:rank]
        assert_close(case.scaling * product(result, layer), best, 1e-4)
        squares = np.zeros(rank)
        squares[: len(values)] = values[:rank] / case.scaling
        tolerance = 1e-5 * float(squares[0])
        a, b = result[key(layer, "lora_A")].astype(float), result[key(layer, "lora_B")].astype(float)
        used = b.any(axis=0)
        assert used.sum() >= np.linalg.matrix_rank(best)
        assert np.array_equal(a[~used], case.fresh[key(layer, "lora_A")][~used])
        for found in (np.sum(b**2, axis=0), np.where(used, np.sum(a**2, axis=1), 0)):
            np.testing.assert_allclose(found, squares, rtol=1e-4, atol=tolerance)


@quick
@given(case=cases(several_ranks=False))
def test_the_residual_is_the_covariance_of_the_factors(case: Case) -> None:
    """FedEx puts aside D and s·Σ pₖ(Bₖ - B̄)(Aₖ - Ā): what FedIT's means miss."""
    result = case.aggregate("fedex")
    for layer in LAYERS:
        pairs = [
            (own[key(layer, "lora_B")].astype(float), own[key(layer, "lora_A")].astype(float))
            for own in case.clients
        ]
        b = sum(p * pair[0] for p, pair in zip(case.shares, pairs, strict=True))
        a = sum(p * pair[1] for p, pair in zip(case.shares, pairs, strict=True))
        covariance = sum(
            p * (pair[0] - b) @ (pair[1] - a) for p, pair in zip(case.shares, pairs, strict=True)
        )
        expected = aside(case.start, layer) + case.scaling * covariance
        size = np.linalg.norm(ideal(case, layer)) + case.scaling * np.linalg.norm(b @ a)
        assert np.linalg.norm(aside(result, layer) - expected) <= 1e-5 * size


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("drift", [1.0, 1e-2, 1e-3])
def test_the_residual_has_the_rank_of_the_covariance(count: int, drift: float) -> None:
    """FedEx's D needs min((N-1)·r, out, in) rows and no more, be the clients far apart or near."""
    for rank, height, width in ((1, 8, 9), (2, 12, 11), (3, 7, 9)):
        case = make(3, ranks=[rank] * count, rank=rank, height=height, width=width, drift=drift)
        result = case.aggregate("fedex")
        expected = min((count - 1) * rank, height, width)
        for layer in LAYERS:
            found = result.tensors.get(key(layer, "delta_A"), np.zeros((0, 1))).shape[0]
            assert found == expected if drift == 1 else found <= expected


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_fedex_averages_the_factors_as_flower_does(weight: float) -> None:
    """Its A, B and heads are the means that Flower makes of the same numbers of examples."""
    counts = [10, 20, 50]
    case = make(5, ranks=[3] * 3, rank=3, weights=[weight * count for count in counts])
    names = list(case.clients[0])
    expected = flower_aggregate(
        [
            ([own[name] for name in names], count)
            for own, count in zip(case.clients, counts, strict=True)
        ]
    )
    result = case.aggregate("fedex")
    for name, mean in zip(names, expected, strict=True):
        np.testing.assert_allclose(result[name], mean, rtol=1e-5, atol=1e-6)


@quick
@given(case=cases())
def test_flora_starts_anew(case: Case) -> None:
    """A and B are the fresh ones bit for bit; D has no more rows than what was stacked or left alone."""
    result = case.aggregate("flora")
    factors = {name for name in case.fresh if "lora" in name}
    assert result.select(factors).sha256() == case.fresh.select(factors).sha256()
    held = [own[key("one", "lora_A")].shape[0] for own in case.clients]
    stacked = sum(held) + case.start[key("one", "lora_A")].shape[0] - min(held)
    for layer in LAYERS:
        before = (
            np.linalg.matrix_rank(aside(case.start, layer))
            if key(layer, "delta_A") in case.start
            else 0
        )
        assert result[key(layer, "delta_A")].shape[0] == min(
            stacked + before, *ideal(case, layer).shape
        )


@pytest.mark.parametrize("method", [*FAMILY, "hetlora"])
@quick
@given(seed=st.integers(0, 999), rank=st.integers(1, 4), scaling=SCALINGS, aside_rank=st.integers(0, 2))
def test_one_client_is_its_own_aggregate(
    method: str, seed: int, rank: int, scaling: float, aside_rank: int
) -> None:
    """With one client every method gives that client's effective weights and head."""
    beside = aside_rank if method in EXACT else 0
    case = make(seed, ranks=[rank], rank=rank, weights=[0.7], scaling=scaling, aside_rank=beside)
    result = case.aggregate(method)
    for layer in LAYERS:
        expected = scaling * product(case.clients[0], layer) + aside(case.start, layer)
        assert_close(effective_weights(result, scaling)[layer], expected)
    np.testing.assert_allclose(result[HEAD], case.clients[0][HEAD], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", [*FAMILY, "hetlora"])
@pytest.mark.parametrize("held", [3, 2])
def test_equal_clients_are_their_aggregate(method: str, held: int) -> None:
    """Any number of equal clients, of any weights, gives that client; only FLoRA puts anything aside.

    What it does not hold stays where it was (HetLoRA: zero).
    """
    one = make(8, ranks=[held], rank=3, height=9, width=8, scaling=4.0)
    case = Case(one.start, list(one.clients) * 4, [1.0, 2.0, 0.5, 0.1], 4.0)
    result = case.aggregate(method)
    for layer in LAYERS:
        own = 4.0 * product(one.clients[0], layer)
        expected = own if method == "hetlora" else ideal(one, layer)
        assert_close(effective_weights(result, 4.0)[layer], expected)
        assert (key(layer, "delta_A") in result.tensors) == (method == "flora")
    np.testing.assert_allclose(result[HEAD], one.clients[0][HEAD], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", [*FAMILY, "hetlora"])
@quick
@given(case=cases(), order=st.randoms(use_true_random=False))
def test_order_does_not_matter(method: str, case: Case, order: random.Random) -> None:
    """The clients are a set, and only the ratios of their weights count."""
    if method == "flexlora":
        rank = case.start[key("one", "lora_A")].shape[0]
        for layer in LAYERS:
            values = scipy.linalg.svdvals(ideal(case, layer))
            assume(len(values) <= rank or values[rank - 1] - values[rank] > 1e-2 * values[0])
    turned = list(range(len(case.clients)))
    order.shuffle(turned)
    other = Case(
        case.start,
        [case.clients[number] for number in turned],
        [10 * case.weights[number] for number in turned],
        case.scaling,
    )
    one, two = case.aggregate(method), other.aggregate(method)
    for layer in LAYERS:
        assert_close(
            effective_weights(one, case.scaling)[layer],
            effective_weights(two, case.scaling)[layer],
            1e-4,
        )
    np.testing.assert_allclose(one[HEAD], two[HEAD], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", EXACT)
@quick
@given(case=cases(), shrink=factors_in)
def test_shrinking_scales_changes_of_weights(method: str, case: Case, shrink: list[float]) -> None:
    """A bounded client counts as one that went a part of its way: Σ pₖ(W + cₖ(Wₖ - W)), heads likewise."""
    shrink = shrink[: len(case.clients)]
    result = case.aggregate(method, shrink)
    found = effective_weights(result, case.scaling)
    for layer in LAYERS:
        assert_close(found[layer], ideal(case, layer, shrink))
    start = case.start[HEAD].astype(float)
    head = start + sum(
        p * c * (own[HEAD] - start) for p, c, own in zip(case.shares, shrink, case.clients, strict=True)
    )
    np.testing.assert_allclose(result[HEAD], head, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", [*FAMILY, "hetlora"])
def test_a_factor_of_one_is_none(method: str) -> None:
    """Shrinking by 1 gives the same bits as not shrinking."""
    case = make(1, ranks=[2, 2, 2], rank=2, aside_rank=0)
    assert case.aggregate(method, [1.0] * 3).sha256() == case.aggregate(method).sha256()


@quick
@given(case=cases(put_aside=False), shrink=factors_in)
def test_hetlora_weighs_by_norms(case: Case, shrink: list[float]) -> None:
    """Padded factors and heads are averaged with weights pₖ·‖BₖAₖ‖ over all layers, on the way that each may go."""
    shrink = shrink[: len(case.clients)]
    norms = [
        np.linalg.norm(np.concatenate([product(own, layer).ravel() for layer in LAYERS]))
        for own in case.clients
    ]
    shares = case.shares * norms / np.sum(case.shares * norms)
    result = case.aggregate("hetlora", shrink)
    assert result.shapes == case.start.shapes
    for name in result:
        stay = 1 - np.sum(shares * shrink)
        expected = stay * case.start[name] + padded_mean(
            [own[name] for own in case.clients], shares * shrink, result[name].shape
        )
        np.testing.assert_allclose(result[name], expected, rtol=1e-5, atol=1e-5)


def test_hetlora_prefers_who_learned_more() -> None:
    """Of two clients of one weight the one with nine times the norm has nine tenths; with no norm, all are equal."""
    ones = np.ones((1, 3), np.float32)
    start = AdapterState(
        {key("one", "lora_A"): ones, key("one", "lora_B"): np.zeros((3, 1), np.float32)}
    )
    clients = [start.merged(AdapterState({key("one", "lora_B"): scale * ones.T})) for scale in (1, 9)]
    case = Case(start, [AdapterState(dict(own.tensors)) for own in clients], [1.0, 1.0], 1.0)
    np.testing.assert_allclose(case.aggregate("hetlora")[key("one", "lora_B")], 8.2, rtol=1e-6)
    still = Case(start, [start, start], [1.0, 1.0], 1.0)
    assert still.aggregate("hetlora").sha256() == start.sha256()


@quick
@given(case=cases())
def test_drift_is_the_dense_distance(case: Case) -> None:
    """‖Wₖ - W‖ over all layers and heads is that of the dense matrices, of what the client holds."""
    found = case.round.drift_norms()
    for number, own in enumerate(case.clients):
        square = float(np.linalg.norm(own[HEAD].astype(float) - case.start[HEAD]) ** 2)
        for layer in LAYERS:
            rank = own[key(layer, "lora_A")].shape[0]
            names = {key(layer, "lora_A"), key(layer, "lora_B")}
            held = crop(case.start.select(names), rank)
            change = case.scaling * (product(own, layer) - product(held, layer))
            square += float(np.linalg.norm(change) ** 2)
        assert found[number] == pytest.approx(square**0.5, rel=1e-5)
    assert len(found) == len(case.clients)


@quick
@given(case=cases(several_ranks=False), seed=st.integers(0, 999))
def test_drift_does_not_see_the_gauge(case: Case, seed: int) -> None:
    """(Bₖ·G, G⁻¹·Aₖ) drifted as far as (Bₖ, Aₖ), though the difference that is sent has another norm."""
    generator = np.random.default_rng(seed)
    turned = []
    for own in case.clients:
        other = dict(own.tensors)
        for layer in LAYERS:
            b, a = own[key(layer, "lora_B")].astype(float), own[key(layer, "lora_A")].astype(float)
            turn = scipy.linalg.qr(generator.standard_normal((a.shape[0], a.shape[0])))[0]
            gauge = turn * generator.uniform(5, 9, a.shape[0])
            other[key(layer, "lora_B")] = (b @ gauge).astype(np.float32)
            other[key(layer, "lora_A")] = np.linalg.solve(gauge, a).astype(np.float32)
        turned.append(AdapterState(other))
    again = Case(case.start, turned, case.weights, case.scaling)
    found = again.round.drift_norms()
    np.testing.assert_allclose(found, case.round.drift_norms(), rtol=1e-4)
    for one, other in zip(case.updates.updates, again.updates.updates, strict=True):
        assert other.delta.norm() > 1.2 * one.delta.norm()


def test_who_stays_has_not_drifted() -> None:
    """A client that sends zeros is at distance 0, whatever the start."""
    case = make(4, ranks=[3], rank=3, drift=0.0, aside_rank=2, scaling=4.0)
    size = np.linalg.norm(product(case.start, "one"))
    assert FactorRound(case.start, case.updates, 4.0, case.fresh).drift_norms()[0] < 1e-12 * size


@quick
@given(case=cases())
def test_setting_aside_keeps_what_an_adapter_does(case: Case) -> None:
    """A and B start anew, with B = 0, heads go on, and the effective weights stay; once or twice."""
    fresh = case.fresh
    once = set_aside(case.start, case.scaling, fresh)
    for moved in (once, set_aside(once, case.scaling, fresh)):
        for layer in LAYERS:
            expected = case.scaling * product(case.start, layer) + aside(case.start, layer)
            assert_close(effective_weights(moved, case.scaling)[layer], expected)
            np.testing.assert_array_equal(moved[key(layer, "lora_A")], fresh[key(layer, "lora_A")])
            assert not moved[key(layer, "lora_B")].any()
        np.testing.assert_array_equal(moved[HEAD], case.start[HEAD])


def test_setting_nothing_aside_adds_nothing() -> None:
    """An adapter that does nothing has no D afterwards."""
    case = make(2, ranks=[2], rank=2)
    assert list(set_aside(case.fresh, 4.0, case.fresh)) == list(case.fresh)


def test_effective_weights_have_the_core() -> None:
    """With a core they are s·B·R·A + D, and only adapted layers are there."""
    case = make(6, ranks=[3], rank=3, aside_rank=2)
    core = np.random.default_rng(0).standard_normal((3, 3)).astype(np.float32)
    state = case.start.merged(AdapterState({key("one", "lora_R"): core}))
    found = effective_weights(state, 4.0)
    b, a = (case.start[key("one", part)].astype(float) for part in ("lora_B", "lora_A"))
    assert_close(found["one"], 4.0 * b @ core @ a + aside(case.start, "one"))
    assert_close(found["two"], 4.0 * product(case.start, "two") + aside(case.start, "two"))
    assert list(found) == list(LAYERS)


@pytest.mark.parametrize("method", EXACT)
def test_rounds_go_on_from_what_was_put_aside(method: str) -> None:
    """Over rounds D carries on: after five the weights are what dense averaging gives, and D is no larger than dense."""
    state = make(0, ranks=[2], rank=2).start
    for number in range(5):
        drawn = make(number + 1, ranks=[2] * 3, rank=2, weights=[1.0, 2.0, 3.0], scaling=0.5)
        clients = [
            AdapterState({name: state[name] + 0.3 * own[name] for name in own}) for own in drawn.clients
        ]
        case = Case(state, clients, drawn.weights, 0.5)
        state = case.aggregate(method)
        for layer in LAYERS:
            assert_close(effective_weights(state, 0.5)[layer], ideal(case, layer))
            assert state[key(layer, "delta_A")].shape[0] <= 6


@pytest.mark.parametrize("method", EXACT)
def test_leaving_out_the_scaling_is_seen(method: str) -> None:
    """At s = 4 an aggregate that is made without s misses by more than half; made with s it is exact."""
    case = make(7, ranks=[2] * 5, rank=2, height=20, width=19, scaling=4.0, drift=3.0)
    without = Case(case.start, case.clients, case.weights, 1.0).aggregate(method)
    for layer in LAYERS:
        expected = ideal(case, layer)
        assert distance(effective_weights(without, 4.0)[layer], expected) > 0.5
        assert_close(effective_weights(case.aggregate(method), 4.0)[layer], expected)
        plain = ideal(Case(case.start, case.clients, case.weights, 1.0), layer)
        assert distance(effective_weights(case.aggregate(method), 4.0)[layer], plain) > 0.5


@pytest.mark.parametrize("method", EXACT)
def test_a_transposed_remainder_is_seen(method: str) -> None:
    """On square layers D has the right shape either way round, but only one way is right."""
    case = make(9, ranks=[2] * 4, rank=2, height=8, width=8, scaling=4.0)
    result = case.aggregate(method)
    for layer in LAYERS:
        expected, factors = ideal(case, layer), 4.0 * product(result, layer)
        assert_close(factors + aside(result, layer), expected)
        assert distance(factors + np.transpose(aside(result, layer)), expected) > 0.3


@pytest.mark.parametrize("method", [*FAMILY, "hetlora"])
def test_every_client_counts(method: str) -> None:
    """The aggregate is far from the first client alone, and changes with any client and any weight."""
    case = make(10, ranks=[2] * 4, rank=2, height=9, width=8)
    found = effective_weights(case.aggregate(method), 1.0)
    first = effective_weights(Case(case.start, case.clients[:1], [1.0], 1.0).aggregate(method), 1.0)
    for layer in LAYERS:
        assert distance(found[layer], first[layer]) > 0.5
    for left_out in range(4):
        kept = [number for number in range(4) if number != left_out]
        fewer = Case(case.start, [case.clients[number] for number in kept], [1.0] * 3, 1.0)
        heavier = Case(
            case.start, case.clients, [5.0 if number == left_out else 1.0 for number in range(4)], 1.0
        )
        for other in (fewer, heavier):
            changed = effective_weights(other.aggregate(method), 1.0)
            assert all(distance(changed[layer], found[layer]) > 0.1 for layer in LAYERS)


def test_averaging_factors_alone_is_seen() -> None:
    """Without its residual FedEx is FedIT, which misses by more than a tenth here."""
    case = make(11, ranks=[2] * 4, rank=2, height=9, width=8)
    result = case.aggregate("fedex")
    for layer in LAYERS:
        assert distance(product(result, layer), ideal(case, layer)) > 0.1


@pytest.mark.parametrize("method", [*FAMILY, "hetlora"])
def test_nobodys_tensors_change(method: str) -> None:
    """Neither the start, the fresh tensors nor the updates are written to; results are finite float32."""
    case = make(12, ranks=[1, 2, 3], rank=3, aside_rank=2 if method in EXACT else 0)
    updates, fresh = case.updates, case.fresh
    held = [case.start, fresh, *(update.delta for update in updates.updates)]
    before = [state.sha256() for state in held]
    for tensor in (tensor for state in held for tensor in state.tensors.values()):
        tensor.flags.writeable = False
    factors = FactorRound(case.start, updates, 2.0, fresh)
    result = factors.aggregate(method, [0.5, 1, 0.2])
    factors.drift_norms()
    assert [state.sha256() for state in held] == before
    assert result.is_finite()
    assert {name for name in result if "delta" not in name} == set(fresh)
    assert {name: result[name].shape for name in fresh} == fresh.shapes


@pytest.mark.parametrize("method", ["fedit", "ffa", "rolora", "fedrot", "fedsa", "fed-sb"])
def test_other_methods_are_refused(method: str) -> None:
    """A method that only sums is an error here, never another method's result."""
    with pytest.raises(FederationError, match=f"{method} needs no"):
        make(0, ranks=[2, 2], rank=2).aggregate(method)


def test_updates_in_memory_are_read_as_they_are() -> None:
    """Clients, weights, keys and tensors are those that were listed, in their order."""
    case = make(13, ranks=[1, 3], rank=3, weights=[2.0, 0.5])
    updates = case.updates
    listed = Listed([ClientUpdate(7, each.delta, each.weight) for each in updates.updates])
    assert (listed.clients, listed.weights) == ([7, 7], [2.0, 0.5])
    assert updates.clients == [0, 1]
    assert listed.keys == sorted(case.clients[0])
    for number, own in enumerate(case.clients):
        for name in own:
            held = tuple(slice(length) for length in own[name].shape)
            np.testing.assert_array_equal(
                listed.delta(number, name), own[name] - case.start[name][held]
            )
