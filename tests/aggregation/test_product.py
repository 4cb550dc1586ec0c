"""Tests of the algebra on products of thin factors, against the same on dense matrices."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedslm.aggregation.product import balanced, compressed, norm_of_product, svd_of_product

Matrix = NDArray[np.float64]
sizes = st.integers(1, 9)
seeds = st.integers(0, 999)


def factors(seed: int, height: int, inner: int, width: int) -> tuple[Matrix, Matrix]:
    """A random pair of factors."""
    generator = np.random.default_rng(seed)
    return generator.standard_normal((height, inner)), generator.standard_normal((inner, width))


@settings(max_examples=25, deadline=None)
@given(height=sizes, inner=sizes, width=sizes, seed=seeds)
def test_the_core_decomposes_as_the_dense_matrix_does(
    height: int, inner: int, width: int, seed: int
) -> None:
    """Singular values are those of the dense product, the bases orthonormal, their product the product."""
    left, right = factors(seed, height, inner, width)
    dense = left @ right
    u, values, v = svd_of_product(left, right)
    count = min(height, inner, width)
    assert (u.shape, values.shape, v.shape) == ((height, count), (count,), (count, width))
    expected = scipy.linalg.svdvals(dense)
    np.testing.assert_allclose(values, expected[:count], rtol=1e-9, atol=1e-12 * expected[0])
    np.testing.assert_allclose(u.T @ u, np.eye(count), atol=1e-12)
    np.testing.assert_allclose(v @ v.T, np.eye(count), atol=1e-12)
    np.testing.assert_allclose((u * values) @ v, dense, rtol=1e-10, atol=1e-12 * expected[0])


@settings(max_examples=25, deadline=None)
@given(height=st.integers(3, 9), width=st.integers(3, 9), kept=st.integers(1, 3), seed=seeds)
def test_the_leading_part_spans_what_the_dense_one_spans(
    height: int, width: int, kept: int, seed: int
) -> None:
    """The projections onto the leading singular directions are those of a dense decomposition."""
    left, right = factors(seed, height, 5, width)
    u, values, v = svd_of_product(left, right)
    dense_u, dense_values, dense_v = np.linalg.svd(left @ right)
    assume(kept == len(values) or values[kept - 1] - values[kept] > 1e-3 * values[0])
    basis, dense_basis = u[:, :kept], dense_u[:, :kept]
    np.testing.assert_allclose(basis @ basis.T, dense_basis @ dense_basis.T, atol=1e-8)
    np.testing.assert_allclose(v[:kept].T @ v[:kept], dense_v[:kept].T @ dense_v[:kept], atol=1e-8)
    np.testing.assert_allclose(values[:kept], dense_values[:kept], rtol=1e-9)


@settings(max_examples=25, deadline=None)
@given(height=sizes, inner=sizes, width=sizes, scaling=st.sampled_from([0.5, 1.0, 4.0]), seed=seeds)
def test_balanced_factors_share_the_values_evenly(
    height: int, inner: int, width: int, scaling: float, seed: int
) -> None:
    """s·B·A is the product, and the columns of B are as long as the rows of A."""
    dense = np.matmul(*factors(seed, height, inner, width))
    u, values, v = np.linalg.svd(dense, full_matrices=False)
    b, a = balanced(u, values, v, scaling)
    assert b.dtype == a.dtype == np.float32
    np.testing.assert_allclose(scaling * b.astype(float) @ a, dense, atol=1e-5 * values[0])
    for one in (np.linalg.norm(b, axis=0), np.linalg.norm(a, axis=1)):
        np.testing.assert_allclose(one, np.sqrt(values / scaling), rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(rank=st.integers(1, 4), copies=st.integers(1, 4), exponent=st.integers(-6, 6), seed=seeds)
def test_compression_keeps_the_product_in_as_few_columns_as_its_rank(
    rank: int, copies: int, exponent: int, seed: int
) -> None:
    """Of a product of a known rank, written with more columns, as many are left as the rank; none is lost."""
    left, right = factors(seed, 9, rank, 8)
    mix = np.random.default_rng(seed + 1).standard_normal((rank, rank * copies))
    wide, tall = left @ mix * 10.0**exponent, np.linalg.pinv(mix) @ right
    up, down = compressed(wide, tall)
    assert (up.shape, down.shape) == ((9, rank), (rank, 8))
    expected = wide @ tall
    error = np.linalg.norm(up.astype(float) @ down - expected)
    assert error <= 1e-6 * np.linalg.norm(expected)


def test_small_directions_are_kept_and_rounding_is_not() -> None:
    """A direction of a hundred-thousandth of the largest is kept, one of a billionth is not."""
    basis = np.eye(5)
    up, down = compressed(basis * [1, 1e-2, 1e-5, 1e-9, 0], basis)
    assert up.shape == (5, 3)
    np.testing.assert_allclose(np.diag(up @ down)[:3], [1, 1e-2, 1e-5], rtol=1e-5)


def test_what_is_rounding_beside_something_larger_is_dropped() -> None:
    """Beside what is a thousand times larger, a direction of a hundred-thousandth is lost in its rounding."""
    basis = np.eye(5)
    up, down = compressed(basis * [1, 1e-2, 1e-5, 1e-9, 0], basis, 1e3)
    assert (up.shape, down.shape) == ((5, 2), (2, 5))
    np.testing.assert_allclose(np.diag(up @ down)[:2], [1, 1e-2], rtol=1e-5)
    assert compressed(basis, basis, 1e9)[0].shape == (5, 0)


@pytest.mark.parametrize("inner", [1, 3])
def test_nothing_compresses_to_nothing(inner: int) -> None:
    """A product of zeros needs no column."""
    left, right = factors(0, 4, inner, 5)
    for one, other in ((0 * left, right), (left, 0 * right)):
        up, down = compressed(one, other)
        assert (up.shape, down.shape) == ((4, 0), (0, 5))


@settings(max_examples=25, deadline=None)
@given(height=sizes, inner=sizes, width=sizes, seed=seeds)
def test_the_norm_is_that_of_the_dense_product(height: int, inner: int, width: int, seed: int) -> None:
    """It is the Frobenius norm of the dense product, also by A7's trace formula."""
    left, right = factors(seed, height, inner, width)
    found = norm_of_product(left, right)
    assert found == pytest.approx(float(np.linalg.norm(left @ right)), rel=1e-9)
    trace = float(np.trace((left.T @ left) @ (right @ right.T)))
    assert found == pytest.approx(trace**0.5, rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(height=sizes, inner=st.integers(1, 4), width=sizes, seed=seeds)
def test_the_norm_does_not_see_the_gauge(height: int, inner: int, width: int, seed: int) -> None:
    """(B·G, G⁻¹·A) has the norm of (B, A) for every invertible G, though neither factor's norm stays."""
    left, right = factors(seed, height, inner, width)
    generator = np.random.default_rng(seed + 1)
    turn = scipy.linalg.qr(generator.standard_normal((inner, inner)))[0]
    gauge = turn * generator.uniform(2, 5, inner)
    turned, back = left @ gauge, np.linalg.solve(gauge, right)
    assert norm_of_product(turned, back) == pytest.approx(norm_of_product(left, right), rel=1e-9)
    assert np.linalg.norm(turned) > 1.9 * np.linalg.norm(left)
    assert np.linalg.norm(back) < np.linalg.norm(right) / 1.9
