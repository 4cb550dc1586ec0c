"""Tests of what tasks share on token logits: where labels stand, and the loss of each position."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.allocations import Peak
from support.kinds import by_hand

from fedslm.tasks.tokens import IGNORED, following, losses

LABELS = torch.tensor([[3, IGNORED, 0, 5], [IGNORED, IGNORED, 1, IGNORED]])


def logits_for(dtype: torch.dtype) -> torch.Tensor:
    """Random logits of seven tokens."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*LABELS.shape, 7, generator=generator).to(dtype)


def test_a_position_gets_what_follows_it() -> None:
    """Labels move by one to the left, and nothing follows the last position."""
    assert following(torch.tensor([[3, 5, 7], [4, 4, IGNORED]])).tolist() == [
        [5, 7, IGNORED],
        [4, IGNORED, IGNORED],
    ]
    assert following(torch.tensor([[1, 2]]), 0).tolist() == [[2, 0]]
    assert following(torch.tensor([[1]])).tolist() == [[IGNORED]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_each_position_has_its_own_loss(dtype: torch.dtype) -> None:
    """The loss is the negative log-probability of the label, in float32, and zero where ignored."""
    logits = logits_for(dtype)
    found = losses(logits, LABELS)
    assert found.dtype == torch.float32
    for row, labels in enumerate(LABELS.tolist()):
        for at, label in enumerate(labels):
            expected = 0.0 if label == IGNORED else by_hand(logits[row, at], label)
            assert float(found[row, at]) == pytest.approx(expected, rel=1e-5)


def test_the_gradient_is_that_of_the_transposed_form() -> None:
    """Torch's own form for (rows, classes, length) gives the same loss and gradient to rounding."""
    logits = logits_for(torch.float32).requires_grad_()
    own, reference = (
        losses(logits, LABELS),
        F.cross_entropy(logits.transpose(1, 2), LABELS, reduction="none", ignore_index=IGNORED),
    )
    torch.testing.assert_close(own, reference)
    gradients = [torch.autograd.grad(each.sum(), logits)[0] for each in (own, reference)]
    torch.testing.assert_close(*gradients)
    assert not gradients[0][LABELS == IGNORED].any()


def test_float32_logits_are_not_copied() -> None:
    """Beside the logits there is one other tensor as large as them: their logarithms."""
    logits = torch.zeros(*LABELS.shape, 1000)
    with Peak() as peak:
        losses(logits, LABELS)
    assert 2 * logits.nbytes <= peak.bytes < 2.1 * logits.nbytes
