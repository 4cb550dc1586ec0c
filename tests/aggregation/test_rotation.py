"""Tests of turning a client's factors towards the last round's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation
from scipy.stats import ortho_group, special_ortho_group

from fedslm.aggregation.rotation import rotated, softened
from fedslm.records import AdapterState

Matrix = NDArray[np.float64]
A, B, SCORE = "q.lora_A.weight", "q.lora_B.weight", "score.weight"
A2, B2 = "v.lora_A.weight", "v.lora_B.weight"
RANK, WIDTH, HEIGHT = 4, 12, 9
SEEDS = st.integers(0, 10**6)
STRENGTHS = st.floats(0.05, 1)


def adapter(seed: int) -> AdapterState:
    """A random adapter of two layers and a head."""
    generator = np.random.default_rng(seed)
    shapes = {A: (RANK, WIDTH), B: (HEIGHT, RANK), A2: (2, 5), B2: (6, 2), SCORE: (3, 4)}
    return AdapterState(
        {key: generator.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
    )


def turned(state: AdapterState, q: Matrix) -> AdapterState:
    """The first layer's product, written with other factors."""
    return state.merged(
        AdapterState({A: (q.T @ state[A]).astype(np.float32), B: (state[B] @ q).astype(np.float32)})
    )


def is_rotation(matrix: Matrix) -> bool:
    """True for an orthogonal matrix of determinant 1."""
    return bool(
        np.isfinite(matrix).all()
        and np.abs(matrix.T @ matrix - np.eye(len(matrix))).max() < 1e-9
        and abs(np.linalg.det(matrix) - 1) < 1e-9
    )


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, turn=st.integers(1, 6), strength=STRENGTHS)
def test_the_product_stays(seed: int, turn: int, strength: float) -> None:
    """B·A of every layer is what it was, and heads are not touched."""
    state = adapter(seed)
    found = rotated(state, adapter(seed + 1), turn, strength)
    assert found.shapes == state.shapes
    for a, b in ((A, B), (A2, B2)):
        np.testing.assert_allclose(found[b] @ found[a], state[b] @ state[a], rtol=1e-5, atol=1e-5)
        assert (found[a] == state[a]).all() == (turn == 1)
    assert found.select({SCORE}).sha256() == state.select({SCORE}).sha256()


def test_the_first_turn_is_not_touched() -> None:
    """On the first turn everything goes as it is, bit for bit."""
    assert rotated(adapter(1), adapter(2), 1, 1.0).sha256() == adapter(1).sha256()


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, strength=STRENGTHS, rank=st.integers(1, 6))
def test_it_is_a_rotation(seed: int, strength: float, rank: int) -> None:
    """Whatever the similarity, also of negative determinant, the result has determinant 1."""
    similarity = np.random.default_rng(seed).standard_normal((rank, rank))
    assert is_rotation(softened(similarity, strength))
    similarity[0] *= -1
    assert is_rotation(softened(similarity, strength))


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS)
def test_in_three_dimensions_it_is_wahbas(seed: int) -> None:
    """At full strength it is the best rotation that SciPy finds between two sets of vectors."""
    one, other = np.random.default_rng(seed).standard_normal((2, 10, 3))
    expected = Rotation.align_vectors(one, other)[0].as_matrix()
    np.testing.assert_allclose(softened(one.T @ other, 1.0), expected, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, rank=st.integers(2, 6), turn=st.sampled_from([2, 3]))
def test_no_rotation_aligns_better(seed: int, rank: int, turn: int) -> None:
    """At full strength no other rotation brings the factor nearer to the reference, odd turns by A."""
    generator = np.random.default_rng(seed)
    states = [
        AdapterState(
            {
                A: generator.standard_normal((rank, WIDTH)).astype(np.float32),
                B: generator.standard_normal((HEIGHT, rank)).astype(np.float32),
            }
        )
        for _ in range(2)
    ]
    state, reference = states
    key = A if turn == 3 else B
    found = rotated(state, reference, turn, 1.0)

    def away(factor: NDArray[Any]) -> float:
        return float(np.linalg.norm(factor - reference[key]))

    for q in special_ortho_group.rvs(rank, size=200, random_state=generator):
        for small in (1.0, 0.05):
            # Near the best as well: the rotation nearest to I + small·Q.
            u, _, v = np.linalg.svd((1 - small) * np.eye(rank) + small * q)
            other = u @ v
            if np.linalg.det(other) < 0:
                continue
            moved = other.T @ found[A] if key == A else found[B] @ other
            assert away(found[key]) <= away(moved) + 1e-5


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, rank=st.integers(1, 6))
def test_full_strength_is_procrustes(seed: int, rank: int) -> None:
    """It is orthogonal Procrustes; if that reflects, the best of those that reflect once more."""
    similarity = np.random.default_rng(seed).standard_normal((rank, rank))
    found = softened(similarity, 1.0)
    singular = np.linalg.svd(similarity, compute_uv=False)
    best = singular.sum() - (2 * singular[-1] if np.linalg.det(similarity) < 0 else 0)
    assert np.trace(found.T @ similarity) == pytest.approx(best, rel=1e-9, abs=1e-9)
    assert is_rotation(found)


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS)
def test_less_strength_turns_less(seed: int) -> None:
    """In the plane a small angle φ becomes the angle of (1 - λ) + λ·exp(iφ)."""
    generator = np.random.default_rng(seed)
    angle, strength = generator.uniform(-3, 3), generator.uniform(0.05, 1)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    spread = generator.standard_normal((2, 5))
    found = softened(turn @ (spread @ spread.T), strength)
    expected = np.angle((1 - strength) + strength * np.exp(1j * angle))
    assert np.arctan2(found[1, 0], found[0, 0]) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_nothing_to_align_turns_nothing(rank: int, strength: float) -> None:
    """Zero similarity gives the identity, and an adapter whose reference is zero stays as it is."""
    np.testing.assert_array_equal(softened(np.zeros((rank, rank)), strength), np.eye(rank))
    zero = adapter(2).merged(AdapterState({B: np.zeros((HEIGHT, RANK), np.float32)}))
    found = rotated(adapter(1), zero, 2, strength)
    assert found.select({A, B}).sha256() == adapter(1).select({A, B}).sha256()


@settings(max_examples=25, deadline=None)
@given(
    seed=SEEDS,
    kept=st.integers(1, 3),
    strength=st.sampled_from([0.3, 0.5, 1.0]),
    size=st.sampled_from([1e-30, 1.0, 1e30]),
)
def test_a_deficient_similarity_gives_a_rotation(
    seed: int, kept: int, strength: float, size: float
) -> None:
    """Of deficient rank, tiny or huge, what is there is aligned and nothing becomes NaN."""
    generator = np.random.default_rng(seed)
    left, right = generator.standard_normal((2, RANK, kept))
    similarity = size * left @ right.T
    found = softened(similarity, strength)
    assert is_rotation(found)
    if strength == 1:
        best = np.linalg.svd(similarity, compute_uv=False).sum()
        assert np.trace(found.T @ similarity) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("strength", [0.25, 0.5, 0.75, 1.0])
def test_half_a_turn_is_finite(strength: float) -> None:
    """Where (1 - λ)·I + λ·R is singular there is still a rotation."""
    assert is_rotation(softened(np.diag([-1.0, -1.0, 2.0]), strength))
    assert is_rotation(softened(-np.eye(3), strength))


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, turn=st.sampled_from([2, 3]))
def test_clients_that_differ_by_a_gauge_become_equal(seed: int, turn: int) -> None:
    """One product written with turned factors is sent alike at full strength, so the mean is exact."""
    generator = np.random.default_rng(seed)
    reference = adapter(seed)
    start = reference.plus(AdapterState({key: 0.1 * adapter(seed + 1)[key] for key in reference}))
    gauges = special_ortho_group.rvs(RANK, size=4, random_state=generator)
    clients = [turned(start, q) for q in gauges]
    sent = [rotated(client, reference, turn, 1.0) for client in clients]
    spread = max(np.abs(sent[0][key] - each[key]).max() for each in sent for key in (A, B))
    before = max(np.abs(clients[0][key] - each[key]).max() for each in clients for key in (A, B))
    assert spread < 1e-4
    assert before > 100 * spread
    mean_a, mean_b = (np.mean([each[key] for each in sent], axis=0) for key in (A, B))
    np.testing.assert_allclose(mean_b @ mean_a, start[B] @ start[A], rtol=1e-4, atol=1e-4)


def test_a_reflection_is_not_undone() -> None:
    """A client that differs by a reflection is not turned into the other: rotations have determinant 1."""
    reference = adapter(1)
    q = ortho_group.rvs(RANK, random_state=0)
    q[:, 0] *= -np.sign(np.linalg.det(q))
    found = rotated(turned(reference, q), reference, 3, 1.0)
    assert np.abs(found[A] - reference[A]).max() > 0.1
    np.testing.assert_allclose(found[B] @ found[A], reference[B] @ reference[A], rtol=1e-4, atol=1e-5)
