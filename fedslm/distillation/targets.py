"""What a student should say, as log-probabilities without gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F


@torch.no_grad()
def soft_target(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """A teacher's log-probabilities at a temperature, float32 (float64 stays), shape as given."""
    return F.log_softmax(_exact(logits) / temperature, dim=-1)


@torch.no_grad()
def proxy_target(
    base: torch.Tensor,
    tuned: torch.Tensor,
    untuned: torch.Tensor,
    *,
    alpha: float = 1.0,
    clip: float = 5.0,
) -> torch.Tensor:
    """Log q with q ∝ p_base·(p_tuned / p_untuned)^α: what the student would say had it been tuned.

    q is the maximiser of α·E_q[log p_tuned − log p_untuned] − KL(q ‖ p_base). Where federation changed
    nothing, q is exactly the student's own distribution: there is nothing to unlearn.

    Args:
        base: Logits of the plain student, (…, vocabulary).
        tuned: Of the federated small model, same shape.
        untuned: Of the small model without its adapter, same shape.
        alpha: Weight of the change.
        clip: Largest change of a log-probability: noise and over-confidence are held to it.

    References:
        Liu et al. 2024, proxy-tuning (arXiv 2401.08565); Gao et al. 2024, FedPT (arXiv 2410.00362).
    """
    own = soft_target(base)
    if alpha == 0 or torch.equal(tuned, untuned):
        return own
    change = (soft_target(tuned) - soft_target(untuned)).clamp(-clip, clip)
    return F.log_softmax(own + alpha * change, dim=-1)


@torch.no_grad()
def sampled(
    target: torch.Tensor, count: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens drawn from a target, with replacement: an unbiased sparse form of it.

    The likeliest tokens alone would be biased: their weights sum to less than 1, and scaled to 1 they
    say too much.

    Args:
        target: Log-probabilities, (positions, vocabulary).
        count: Draws of each position.
        generator: Source of the draws.

    Returns:
        Tokens, int64, and weights 1 / count, both of shape (positions, count).

    References:
        Anshumann et al. 2025, Sparse Logit Sampling (arXiv 2503.16870).
    """
    ids = torch.multinomial(target.exp(), count, replacement=True, generator=generator)
    return ids, torch.full(ids.shape, 1 / count, device=ids.device)


def _exact(values: torch.Tensor) -> torch.Tensor:
    """float64 as it is, all else as float32."""
    return values if values.dtype == torch.float64 else values.float()
