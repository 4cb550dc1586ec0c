"""The adapter before training."""

from __future__ import annotations

import numpy as np

from fedslm.adapter_keys import key_of, layers_of, part_of
from fedslm.records import AdapterState, FloatArray
from fedslm.rng import stream

_HEAD_STDDEV = 0.02


def initial_state(shapes: dict[str, tuple[int, ...]], seed: int) -> AdapterState:
    """Creates the adapter before training: A has seeded orthonormal rows, B is zero, the head is small.

    With orthonormal rows A·Aᵀ = I, so the noise that private training adds to B reaches the weights
    undistorted. A layer with a core R starts with R = 0 between frozen orthonormal factors (A's rows,
    B's columns), so it too starts as the base and passes noise on undistorted.

    Fed-SB's authors take the factors from a singular value decomposition of the first gradient on the
    private records, without noise: that would be a release outside the ledger. Here they are seeded.

    Args:
        shapes: Maps keys to shapes, as in an attached or a trained adapter. There is no delta at the
            start: the keys of deltas are skipped.
        seed: The run's seed.

    References:
        Ponkshe et al. 2025, LoRA-SB (arXiv 2411.19557); Singhal et al. 2025, Fed-SB (arXiv 2502.15436).
    """
    with_core = {
        key_of(layer, "lora_B") for layer in layers_of(shapes) if key_of(layer, "lora_R") in shapes
    }
    return AdapterState(
        {
            key: _initial(key, shape, seed, has_core=key in with_core)
            for key, shape in shapes.items()
            if part_of(key) not in ("delta_A", "delta_B")
        }
    )


def _initial(key: str, shape: tuple[int, ...], seed: int, *, has_core: bool) -> FloatArray:
    """Creates one tensor of the initial adapter."""
    generator = stream(seed, "adapter", key)
    match part_of(key):
        case "lora_A":
            return np.ascontiguousarray(_orthonormal(generator, shape[1], shape[0]).T)
        case "lora_B" if has_core:
            return _orthonormal(generator, shape[0], shape[1])
        case "head" if len(shape) > 1:
            return (_HEAD_STDDEV * generator.standard_normal(shape)).astype(np.float32)
        case _:
            return np.zeros(shape, dtype=np.float32)


def _orthonormal(generator: np.random.Generator, length: int, count: int) -> FloatArray:
    """Draws seeded orthonormal columns, (length, count); columns beyond ``length`` are zero."""
    columns, _ = np.linalg.qr(generator.standard_normal((length, count)))
    padded = np.zeros((length, count))
    padded[:, : columns.shape[1]] = columns
    return padded.astype(np.float32)
