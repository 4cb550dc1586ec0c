"""Proxy targets by their formula, and where they must be the student's own distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from fedslm.distillation import losses

GENERATOR = np.random.default_rng(11)
BASE, TUNED, UNTUNED = (torch.tensor(each) for each in GENERATOR.normal(size=(3, 6, 8)) * 3)


def test_it_is_the_formula() -> None:
    """Q ∝ p_base·(p_tuned / p_untuned)^α with the change held to the clip."""
    for alpha, clip in [(1.0, 5.0), (0.5, 1.0), (1.5, 100.0)]:
        found = losses.proxy_target(BASE, TUNED, UNTUNED, alpha=alpha, clip=clip)
        change = log_softmax(TUNED.numpy(), -1) - log_softmax(UNTUNED.numpy(), -1)
        expected = log_softmax(log_softmax(BASE.numpy(), -1) + alpha * np.clip(change, -clip, clip), -1)
        assert found.numpy() == pytest.approx(expected)


def test_it_is_the_best_answer_to_its_question() -> None:
    """No distribution has more α·E[log p_tuned − log p_untuned] − KL(· ‖ p_base)."""
    alpha = 0.7
    best = losses.proxy_target(BASE, TUNED, UNTUNED, alpha=alpha, clip=1e9)
    change = losses.soft_target(TUNED) - losses.soft_target(UNTUNED)

    def worth(answer: torch.Tensor) -> torch.Tensor:
        return (answer.exp() * (alpha * change - answer + losses.soft_target(BASE))).sum(-1)

    for seed in range(20):
        noise = torch.randn(BASE.shape, generator=torch.Generator().manual_seed(seed)).double()
        other = torch.log_softmax(best + 0.3 * noise, -1)
        assert (worth(other) < worth(best)).all()


def test_without_a_change_the_student_is_left_alone() -> None:
    """S* = S0 gives the student's own distribution bit for bit, and a gradient of zero; so does α = 0."""
    base = BASE.float()
    for found in (
        losses.proxy_target(base, TUNED, TUNED),
        losses.proxy_target(base, TUNED, UNTUNED, alpha=0.0),
    ):
        assert torch.equal(found, torch.log_softmax(base, -1))
        logits = base.clone().requires_grad_()
        losses.forward_kl(logits, found).sum().backward()
        assert float(logits.grad.abs().max()) < 1e-6


def test_a_small_alpha_is_a_small_change() -> None:
    """KL(q ‖ base) falls with the square of α."""
    sizes = []
    for alpha in (1e-2, 1e-3):
        found = losses.proxy_target(BASE, TUNED, UNTUNED, alpha=alpha)
        sizes.append(float(losses.forward_kl(BASE, found).sum()))
    assert sizes[0] / sizes[1] == pytest.approx(100, rel=0.1)


def test_the_clip_holds_an_over_confident_teacher() -> None:
    """However sure it is, no token's odds change by more than twice the clip."""
    sure = TUNED.clone()
    sure[:, 0] += 1000
    found = losses.proxy_target(BASE, sure, UNTUNED, clip=2.0)
    moved = found - losses.soft_target(BASE)
    assert float((moved.amax(-1) - moved.amin(-1)).max()) <= 4.0 + 1e-9


def test_samples_are_the_target_in_the_mean() -> None:
    """Weights sum to 1, and counts go to the probabilities."""
    target = losses.soft_target(TUNED)
    ids, weights = losses.sampled(target, 20_000, torch.Generator().manual_seed(5))
    assert torch.allclose(weights.sum(-1), torch.ones(6))
    shares = torch.zeros(6, 8).scatter_add_(1, ids, weights).double()
    error = (target.exp() * (1 - target.exp()) / 20_000).sqrt()
    assert ((shares - target.exp()).abs() <= 4.5 * error + 1e-9).all()


def test_targets_have_no_gradient_and_are_float32() -> None:
    """Half precision comes in, float32 without gradient goes out."""
    logits = BASE.bfloat16().requires_grad_()
    for found in (losses.soft_target(logits, 2.0), losses.proxy_target(logits, logits, UNTUNED)):
        assert not found.requires_grad
        assert found.dtype in (torch.float32, torch.float64)
    assert losses.soft_target(logits).dtype == torch.float32
