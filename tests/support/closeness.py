"""When logits of two ways to compute one function are the same."""

from __future__ import annotations

import torch

TOLERANCE = 1e-4
"""Of the largest logit: nine times the largest difference that was measured (t5, merged, rank 11, 1.1e-5)
with the kernels of three processors, and a thousandth of what another input or adapter makes."""


def assert_same_logits(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Float32 sums in another order; the error grows with the largest logit, not with each one's own size."""
    largest = float(expected.detach().abs().max())
    assert largest > 0
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * largest)
