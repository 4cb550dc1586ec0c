"""Tests of the rules that withstand hostile clients."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import optimize, stats

from fedslm.aggregation.robust import bulyan_selection, combine, krum_order, required_clients
from fedslm.aggregation.update_file import Spool
from fedslm.config import RuleName
from fedslm.errors import FederationError
from fedslm.records import AdapterState, ClientUpdate

Rows = NDArray[np.float64]
RULES: list[RuleName] = [
    "median",
    "trimmed-mean",
    "geometric-median",
    "krum",
    "multi-krum",
    "bulyan",
]
B, SCORE = "q.lora_B.weight", "score.weight"
SIZE = 20


def as_state(row: Rows) -> AdapterState:
    """A vector as an update of two tensors."""
    values = row.astype(np.float32)
    return AdapterState({B: values[:18].reshape(6, 3), SCORE: values[18:]})


def combined(rule: RuleName, rows: Rows, hostile: int, shrink: Sequence[float] | None = None) -> Rows:
    """What a rule makes of vectors."""
    with (
        tempfile.TemporaryDirectory() as directory,
        Spool(Path(directory) / "updates", as_state(rows[0]).shapes) as spool,
    ):
        for client, row in enumerate(rows):
            spool.add(ClientUpdate(client, as_state(row), 1.0 + client))
        result = combine(rule, spool, hostile, [1.0] * len(rows) if shrink is None else shrink)
    return np.concatenate([result[B].ravel(), result[SCORE]]).astype(float)


def by_krum(rows: Rows, hostile: int) -> list[int]:
    """Vectors by the sum of squared distances to the n - f - 2 nearest others, one at least.

    Two that are each other's nearest tie if one neighbour counts: the next distances decide then.
    """
    scores = []
    for i in range(len(rows)):
        others = sorted(float(((rows[i] - rows[j]) ** 2).sum()) for j in range(len(rows)) if j != i)
        scores.append((sum(others[: max(1, len(rows) - hostile - 2)]), others, i))
    return [i for *_, i in sorted(scores)]


def bulyan(rows: Rows, hostile: int) -> Rows:
    """Picks n - 2f vectors by Krum, then the mean of the values nearest to each coordinate's median."""
    left, chosen = list(range(len(rows))), list[int]()
    while len(chosen) < len(rows) - 2 * hostile:
        chosen.append(left.pop(by_krum(rows[left], hostile)[0]))
    result = np.zeros(rows.shape[1])
    for place in range(rows.shape[1]):
        values = [float(rows[i, place]) for i in chosen]
        middle = float(np.median(values))
        nearest = sorted(values, key=lambda value: (abs(value - middle), value))
        result[place] = np.mean(nearest[: len(chosen) - 2 * hostile])
    return result


def geometric_median(rows: Rows) -> Rows:
    """The point of the smallest sum of distances, found by descent from many places."""

    def total(point: Rows) -> tuple[float, Rows]:
        away = point - rows
        length = np.sqrt((away**2).sum(axis=1) + 1e-18)
        return float(length.sum()), (away / length[:, None]).sum(axis=0)

    starts = [np.median(rows, axis=0), *rows]
    options = {"gtol": 1e-12, "ftol": 1e-15, "maxiter": 2000}
    found = [
        optimize.minimize(total, start, jac=True, method="L-BFGS-B", options=options)
        for start in starts
    ]
    best: Rows = min(found, key=lambda each: float(each.fun)).x
    return best


def reference(rule: RuleName, rows: Rows, hostile: int) -> Rows:
    """A rule as the papers write it."""
    count = len(rows)
    best = by_krum(rows, hostile)
    result: dict[str, Rows] = {
        "median": np.quantile(rows, 0.5, axis=0),
        "trimmed-mean": stats.trim_mean(rows, (hostile + 0.5) / count, axis=0),
        "geometric-median": geometric_median(rows) if rule == "geometric-median" else rows[0],
        "krum": rows[best[0]],
        "multi-krum": rows[best[: count - hostile]].mean(axis=0),
        "bulyan": bulyan(rows, hostile) if rule == "bulyan" else rows[0],
    }
    return result[rule]


def drawn(seed: int, count: int) -> Rows:
    """Vectors of float32 values around a common one, with lengths and spreads of their own."""
    generator = np.random.default_rng(seed)
    spread = generator.uniform(0.2, 3, (count, 1))
    rows = generator.standard_normal(SIZE) + spread * generator.standard_normal((count, SIZE))
    return rows.astype(np.float32).astype(float)


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), hostile=st.integers(0, 3), more=st.integers(0, 3))
def test_a_rule_is_the_papers_rule(rule: RuleName, seed: int, hostile: int, more: int) -> None:
    """Every rule gives what a plain dense implementation gives, whatever clients weigh."""
    rows = drawn(seed, required_clients(rule, hostile) + more)
    found = combined(rule, rows, hostile)
    tolerance = 5e-3 if rule == "geometric-median" else 2e-6
    np.testing.assert_allclose(found, reference(rule, rows, hostile), rtol=tolerance, atol=tolerance)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.sampled_from([1e-9, 1e-4, 1.0, 1e5]))
def test_no_point_is_nearer_than_the_geometric_median(seed: int, size: float) -> None:
    """The sum of distances is the smallest there is, also for very short updates."""
    rows = size * drawn(seed, 7)

    def total(point: Rows) -> float:
        return float(np.linalg.norm(rows - point, axis=1).sum())

    found = total(combined("geometric-median", rows, 3))
    best = total(size * geometric_median(rows / size))
    assert found <= best * (1 + 1e-5)


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), hostile=st.integers(1, 2))
def test_the_order_does_not_matter(rule: RuleName, seed: int, hostile: int) -> None:
    """The clients are a set."""
    rows = drawn(seed, required_clients(rule, hostile) + 1)
    order = np.random.default_rng(seed + 1).permutation(len(rows))
    np.testing.assert_allclose(
        combined(rule, rows[order], hostile), combined(rule, rows, hostile), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), hostile=st.integers(0, 2), size=st.sampled_from([0.0, 1e-9, 1.0]))
def test_equal_clients_give_that_client(rule: RuleName, seed: int, hostile: int, size: float) -> None:
    """Any number of equal updates gives that update, zeros too."""
    row = (size * drawn(seed, 1)[0]).astype(np.float32).astype(float)
    rows = np.stack([row] * (required_clients(rule, hostile) + 1))
    np.testing.assert_allclose(combined(rule, rows, hostile), row, rtol=2e-7, atol=0)


def attacked(seed: int, count: int, hostile: int, attack: str) -> tuple[Rows, NDArray[np.bool_]]:
    """Honest vectors near a common one, and hostile ones at random places; who is hostile."""
    generator = np.random.default_rng(seed)
    common = generator.standard_normal(SIZE)
    rows = common + 0.1 * generator.standard_normal((count, SIZE))
    bad = np.zeros(count, bool)
    bad[generator.choice(count, hostile, replace=False)] = True
    rows[bad] = {
        "sign flip": -100 * rows[bad],
        "huge": 1e4 * generator.standard_normal((hostile, SIZE)),
        "colluding": np.stack([common + 50 * generator.standard_normal(SIZE)] * hostile),
    }[attack]
    return rows, bad


@pytest.mark.parametrize("attack", ["sign flip", "huge", "colluding"])
@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), hostile=st.integers(1, 3), more=st.integers(0, 2))
def test_hostile_clients_do_not_decide(
    rule: RuleName, attack: str, seed: int, hostile: int, more: int
) -> None:
    """With f hostile clients the result stays near the honest ones; the plain mean goes away."""
    count = required_clients(rule, hostile) + more
    rows, bad = attacked(seed, count, hostile, attack)
    honest = rows[~bad]
    centre = honest.mean(axis=0)
    radius = float(np.linalg.norm(honest - centre, axis=1).max())
    assert np.linalg.norm(rows.mean(axis=0) - centre) > 5 * radius
    assert np.linalg.norm(combined(rule, rows, hostile) - centre) < 3 * radius


@pytest.mark.parametrize("rule", ["median", "trimmed-mean", "bulyan"])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), attack=st.sampled_from(["sign flip", "huge", "colluding"]))
def test_coordinates_stay_within_the_honest_ones(rule: RuleName, seed: int, attack: str) -> None:
    """No coordinate leaves the range of the honest clients' values there."""
    rows, bad = attacked(seed, required_clients(rule, 2), 2, attack)
    found = combined(rule, rows, 2)
    assert (found >= rows[~bad].min(axis=0) - 1e-5).all()
    assert (found <= rows[~bad].max(axis=0) + 1e-5).all()


@pytest.mark.parametrize("rule", ["krum", "multi-krum", "bulyan"])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_an_outlier_hides_no_small_differences(rule: RuleName, seed: int) -> None:
    """Honest clients 1e-5 apart are told apart beside an outlier of 1e4 times their length."""
    generator = np.random.default_rng(seed)
    common = generator.standard_normal(SIZE)
    spread = 1e-5 * generator.uniform(0.5, 3, (8, 1))
    rows = common + spread * generator.standard_normal((8, SIZE))
    outlier = int(generator.integers(8))
    rows[outlier] *= 1e4
    rows = rows.astype(np.float32).astype(float)
    found = combined(rule, rows, 1)
    np.testing.assert_allclose(found, reference(rule, rows, 1).astype(np.float32), rtol=0, atol=1e-7)
    others = [i for i in range(8) if i != outlier]
    if rule == "krum":
        assert any((found == rows[i].astype(np.float32)).all() for i in others)
    assert np.abs(found - common).max() < 1e-3


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_norm_bound_comes_first(rule: RuleName, seed: int) -> None:
    """A rule sees updates that are scaled down already."""
    rows = drawn(seed, required_clients(rule, 1) + 1)
    shrink = np.random.default_rng(seed).uniform(0.05, 1, len(rows))
    found = combined(rule, rows, 1, list(shrink))
    tolerance = 5e-3 if rule == "geometric-median" else 3e-6
    expected = reference(rule, rows * shrink[:, None], 1)
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("rule", "needed"),
    [
        ("median", 5),
        ("trimmed-mean", 5),
        ("geometric-median", 5),
        ("krum", 7),
        ("multi-krum", 7),
        ("bulyan", 11),
    ],
)
def test_too_few_clients_are_refused(rule: RuleName, needed: int) -> None:
    """One client fewer than a rule needs against two hostile ones is an error, so many are not."""
    rows = drawn(0, needed)
    with pytest.raises(FederationError, match=f"{needed - 1} updates came.*needs {needed} "):
        combined(rule, rows[:-1], 2)
    assert np.isfinite(combined(rule, rows, 2)).all()


def test_the_mean_is_no_robust_rule() -> None:
    """The mean has a place of its own."""
    with pytest.raises(FederationError, match="not a robust rule"):
        combined("mean", drawn(0, 3), 0)


def test_ties_go_to_the_lower_index() -> None:
    """Of equal scores the first is taken, and bulyan's choice holds each client once."""
    equal = np.ones((7, 7)) - np.eye(7)
    np.testing.assert_array_equal(krum_order(equal, 2), np.arange(7))
    assert bulyan_selection(equal, 1) == [0, 1, 2, 3, 4]


def test_the_order_does_not_break_ties_of_values() -> None:
    """Of values equally far from the median the lower counts, whoever sent it: quantised updates tie."""
    rows = np.zeros((7, SIZE))
    rows[:, 0] = [0, 0, 0, 1, 1, -1, -1]
    rows[:, 1] = 100 + np.arange(7)
    expected = combined("bulyan", rows, 1)
    for seed in range(10):
        order = np.random.default_rng(seed).permutation(7)
        np.testing.assert_array_equal(combined("bulyan", rows[order], 1), expected)
