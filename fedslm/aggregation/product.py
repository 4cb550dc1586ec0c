"""Products of thin factors, left · right, without ever forming them: (out, n) · (n, in)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fedslm.records import FloatArray

Matrix = NDArray[np.float64]
_ROUNDING = 2e-7  # relative float32 rounding of two factors; a direction below it counts as zero


def svd_of_product(left: Matrix, right: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """Computes the singular value decomposition of a product from its QR core.

    With left = Q₁·R₁ and rightᵀ = Q₂·R₂ the product is Q₁·(R₁·R₂ᵀ)·Q₂ᵀ. Q₁ and Q₂ have orthonormal
    columns, so the core's decomposition, of at most n x n, gives that of the product. Its first r
    directions are the best approximation of rank r (Eckart and Young 1936).

    Args:
        left: (out, n).
        right: (n, in).

    Returns:
        U (out, k), singular values (k,) and Vᵀ (k, in), k = min(out, in, n).
    """
    left_basis, left_core = np.linalg.qr(left)
    right_basis, right_core = np.linalg.qr(right.T)
    core_left, values, core_right = np.linalg.svd(left_core @ right_core.T, full_matrices=False)
    return left_basis @ core_left, values, core_right @ right_basis.T


def balanced(
    left: Matrix, values: Matrix, right: Matrix, scaling: float = 1.0
) -> tuple[FloatArray, FloatArray]:
    """Returns (B, A) with scaling · B·A = left · diag(values) · right, values split evenly."""
    root = np.sqrt(values / scaling)
    return (left * root).astype(np.float32), (root[:, None] * right).astype(np.float32)


def compressed(left: Matrix, right: Matrix, neighbour: float = 0.0) -> tuple[FloatArray, FloatArray]:
    """Returns the same product with only as many columns and rows as its numerical rank.

    Args:
        left: (out, n).
        right: (n, in).
        neighbour: Norm of the float32 matrix next to this one; values below its rounding are dropped.
    """
    u, values, v = svd_of_product(left, right)
    kept = numerical_rank(values, neighbour)
    return balanced(u[:, :kept], values[:kept], v[:kept])


def numerical_rank(values: Matrix, neighbour: float = 0.0) -> int:
    """Counts the singular values above float32's rounding of the largest, or of ``neighbour``.

    >>> numerical_rank(np.array([5.0, 1.0, 1e-9])), numerical_rank(np.zeros(3))
    (2, 0)
    """
    return int((values > _ROUNDING * values.max(initial=neighbour)).sum())


def norm_of_product(left: Matrix, right: Matrix) -> float:
    """Returns the Frobenius norm; it is the same for every pair of factors with this product.

    >>> norm_of_product(np.array([[3.0], [4.0]]), np.array([[2.0]]))
    10.0
    """
    # Not √tr(BᵀB·AAᵀ): if the product is a small difference of large ones (drift_norms), that form
    # loses half of the digits.
    _, left_core = np.linalg.qr(left)
    _, right_core = np.linalg.qr(right.T)
    return math.sqrt(float(np.square(left_core @ right_core.T).sum()))
