"""FedRot: a client rotates its factors towards the last round's before it sends them.

The product B·A does not change; only the choice among its many pairs of factors does. Clients' factors
are then closer to one another, and averaging them has a smaller error.
"""

from __future__ import annotations

import numpy as np

from fedslm.adapter_keys import key_of, layers_of
from fedslm.aggregation.product import Matrix
from fedslm.records import AdapterState, FloatArray


def rotated(adapter: AdapterState, reference: AdapterState, turn: int, strength: float) -> AdapterState:
    """Rotates the factors of each layer.

    Under record- or user-level privacy this is post-processing: it reads the client's own noised
    factors and the reference, which the server sent.

    Args:
        adapter: A client's factors after training; heads stay as they are.
        reference: The factors that the round started from.
        turn: Odd turns align A, even turns align B; on the first, B was zero and nothing is rotated.
        strength: λ in (0, 1]: 1 rotates fully, less stays closer to the original factors.

    References:
        FedRot-LoRA (arXiv 2602.23638).
    """
    if turn == 1:
        return adapter
    turned: dict[str, FloatArray] = {}
    for layer in layers_of(adapter):
        a_key, b_key = key_of(layer, "lora_A"), key_of(layer, "lora_B")
        a, b = (adapter[key].astype(np.float64) for key in (a_key, b_key))
        similarity = a @ reference[a_key].T if turn % 2 else b.T @ reference[b_key]
        rotation = softened(similarity, strength)
        turned[a_key] = (rotation.T @ a).astype(np.float32)
        turned[b_key] = (b @ rotation).astype(np.float32)
    return adapter.merged(AdapterState(turned))


def softened(similarity: Matrix, strength: float) -> Matrix:
    """Finds the rotation nearest to (1 - λ)·I + λ·R with the best R (orthogonal Procrustes, det R = 1).

    ‖Rᵀ·A - A_ref‖² = ‖A‖² + ‖A_ref‖² - 2·tr(Rᵀ·M): of all orthogonal R, U·Vᵀ minimises it, where
    M = U·Σ·Vᵀ (Schönemann 1966); ‖B·R - B_ref‖ likewise.

    Args:
        similarity: M = A·A_refᵀ or Bᵀ·B_ref, (r, r); zero where there is nothing to align.
        strength: λ.
    """
    identity = np.eye(len(similarity))
    if not similarity.any():
        return identity
    return _proper((1 - strength) * identity + strength * _proper(similarity.astype(np.float64)))


def _proper(matrix: Matrix) -> Matrix:
    """Returns the rotation nearest to a matrix: U·Vᵀ, its weakest direction flipped if det < 0."""
    u, _, v = np.linalg.svd(matrix)
    if np.linalg.det(u @ v) < 0:
        v[-1] *= -1
    nearest: Matrix = u @ v
    return nearest
