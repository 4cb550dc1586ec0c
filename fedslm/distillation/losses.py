"""Targets and losses per position: what the student should predict, and its distance from that target.

A target consists of log-probabilities without gradient. A loss takes the student's logits (positions,
vocabulary), with gradient, and a target of the same shape; it returns (positions,). float64 stays
float64; everything else is computed in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

Loss = Callable[..., torch.Tensor]


@torch.no_grad()
def soft_target(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Teacher log-probabilities at a temperature, in float32 (float64 stays), with the same shape."""
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
    """Log q with q ∝ p_base·(p_tuned / p_untuned)^α: the student's prediction as if it had been tuned.

    q is the maximiser of α·E_q[log p_tuned − log p_untuned] − KL(q ‖ p_base). Where federation changed
    nothing, q is exactly the student's own distribution: nothing is unlearned.

    Args:
        base: Logits of the student without adapter, (…, vocabulary).
        tuned: Logits of the federated small model, same shape.
        untuned: Logits of the small model without its adapter, same shape.
        alpha: Weight of the change.
        clip: Maximum change of a log-probability; it limits noise and over-confidence.

    References:
        Liu et al. 2024, proxy-tuning (arXiv 2401.08565); Gao et al. 2024, FedPT (arXiv 2410.00362).
    """
    own = soft_target(base)
    if alpha == 0 or torch.equal(tuned, untuned):
        return own
    # Uses log-probabilities: a constant offset of all logits has no meaning, but would affect clipping.
    change = (soft_target(tuned) - soft_target(untuned)).clamp(-clip, clip)
    return F.log_softmax(own + alpha * change, dim=-1)


@torch.no_grad()
def sampled(
    target: torch.Tensor, count: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples tokens from a target, with replacement: an unbiased sparse form of it.

    Keeping only the most likely tokens would be biased: their weights sum to less than 1, and rescaling
    them to 1 overstates them.

    Args:
        target: Log-probabilities, (positions, vocabulary).
        count: Number of draws per position.
        generator: Random generator of the draws.

    Returns:
        Tokens, int64, and weights 1 / count, both of shape (positions, count).

    References:
        Anshumann et al. 2025, Sparse Logit Sampling (arXiv 2503.16870).
    """
    ids = torch.multinomial(target.exp(), count, replacement=True, generator=generator)
    return ids, torch.full(ids.shape, 1 / count, device=ids.device)


def forward_kl(logits: torch.Tensor, target: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """τ²·KL(target ‖ student): mode-covering; suited to a stronger teacher.

    Args:
        logits: The student's, before any temperature.
        target: Log-probabilities at the temperature.
        temperature: τ > 0; τ² keeps the gradient's size (Hinton et al. 2015, arXiv 1503.02531).
    """
    return temperature**2 * _kl(_exact(target), _log_softmax(logits, temperature))


def reverse_kl(logits: torch.Tensor, target: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """τ²·KL(student ‖ target): mode-seeking; suited to a weaker teacher.

    Args: as :func:`forward_kl`.

    References:
        Gu et al. 2023, MiniLLM (arXiv 2306.08543); Yao et al. 2025 on weak teachers (arXiv 2502.11107).
    """
    return temperature**2 * _kl(_log_softmax(logits, temperature), _exact(target))


def jsd(
    logits: torch.Tensor, target: torch.Tensor, beta: float, temperature: float = 1.0
) -> torch.Tensor:
    """τ²·(β·KL(target ‖ M) + (1 − β)·KL(student ‖ M)) with M = β·target + (1 − β)·student.

    β = 0 and β = 1 give forward and reverse KL instead: the formula itself goes to 0 there, and so does
    its gradient.

    Args:
        logits: The student's logits.
        target: Log-probabilities at the temperature.
        beta: In [0, 1].
        temperature: As :func:`forward_kl`.

    References:
        Agarwal et al. 2024, generalised knowledge distillation (arXiv 2306.13649).
    """
    if beta == 0:
        return forward_kl(logits, target, temperature)
    if beta == 1:
        return reverse_kl(logits, target, temperature)
    own, wanted = _log_softmax(logits, temperature), _exact(target)
    mixed = torch.logaddexp(wanted + math.log(beta), own + math.log1p(-beta))
    return temperature**2 * (beta * _kl(wanted, mixed) + (1 - beta) * _kl(own, mixed))


def log_confidence(
    logits: torch.Tensor, target: torch.Tensor, coefficient: float, shares: torch.Tensor
) -> torch.Tensor:
    """(1 − c)·CE(student, target) + c·CE(student, its own hardened predictions).

    Predictions are hardened so that each class gets its share of the batch (:func:`hardened`). For two
    classes, this is the threshold of the paper.

    Args:
        logits: The student's logits; all positions of a batch, which share the classes.
        target: Log-probabilities.
        coefficient: c in [0, 1].
        shares: Share of each class, shape (classes,), >= 0, summing to 1.

    References:
        Burns et al. 2023, Weak-to-Strong Generalization (arXiv 2312.09390), section 4.3.
    """
    own = _log_softmax(logits, 1.0)
    taught = -(_exact(target).exp() * own).sum(dim=-1)
    guessed = F.nll_loss(own, hardened(own.detach(), shares), reduction="none")
    return (1 - coefficient) * taught + coefficient * guessed


def hardened(log_probabilities: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Returns the most likely labels that give each class its share of the positions.

    Each class gets a quota of positions according to its share; the labels are assigned so that the sum
    of log-probabilities is maximal (Crouse 2016, the assignment problem).

    Args:
        log_probabilities: (positions, classes), finite.
        shares: (classes,), summing to 1.

    Returns:
        int64 of shape (positions,).

    >>> sure = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]]).log()
    >>> hardened(sure, torch.tensor([2 / 3, 1 / 3])).tolist()
    [0, 0, 1]
    """
    from scipy.optimize import linear_sum_assignment

    seats = np.repeat(np.arange(len(shares)), _quotas(shares, len(log_probabilities)))
    costs = -log_probabilities.double().cpu().numpy()[:, seats]
    _, chosen = linear_sum_assignment(costs)
    return torch.from_numpy(seats[chosen]).to(log_probabilities.device)


def confidence_gate(target: torch.Tensor, threshold: float) -> torch.Tensor:
    """Returns 1 where the likeliest class has at least this probability, else 0; shape (positions,)."""
    return (target.exp().amax(dim=-1) >= threshold).to(target.dtype)


def softened(target: torch.Tensor, floor: float = 1e-3) -> torch.Tensor:
    """log((1 − floor)·p + floor / classes): no class has probability 0, so reverse KL stays finite."""
    classes = target.shape[-1]
    return ((1 - floor) * _exact(target).exp() + floor / classes).log()


def sparse_forward_kl(logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Cross-entropy on sampled tokens: its expected gradient over draws is that of forward KL.

    E[-Σ w·log p] = -Σ q·log p = KL(q ‖ p) + H(q), and H(q) has no gradient in p.

    Args:
        logits: The student's logits.
        ids: Sampled tokens, (positions, samples).
        weights: Their importance weights, of the same shape.

    References:
        Anshumann et al. 2025, Sparse Logit Sampling (arXiv 2503.16870).
    """
    chosen = _log_softmax(logits, 1.0).gather(-1, ids)
    return -(weights.to(chosen) * chosen).sum(dim=-1)


def in_pieces(loss: Loss, logits: torch.Tensor, *targets: torch.Tensor, most: int) -> torch.Tensor:
    """Applies a loss to a few positions at a time and recomputes it in the backward pass.

    Value and gradient are those of the whole batch; float32 tensors as wide as the vocabulary exist
    only for one piece at a time, in the backward pass too.

    Args:
        loss: Function of logits and targets.
        logits: (positions, vocabulary), of any precision.
        targets: Each (positions, …).
        most: Maximum number of vocabulary-wide values at once; a piece has at least one position.

    Returns:
        Shape (positions,).
    """
    size = max(1, most // logits.shape[-1])
    if len(logits) <= size:
        return loss(logits, *targets)
    pieces = zip(*(torch.split(each, size) for each in (logits, *targets)), strict=True)
    return torch.cat([checkpoint(loss, *piece, use_reentrant=False) for piece in pieces])


def _exact(values: torch.Tensor) -> torch.Tensor:
    """Keeps float64, and converts everything else to float32."""
    return values if values.dtype == torch.float64 else values.float()


def _log_softmax(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Returns log-probabilities at a temperature."""
    return F.log_softmax(_exact(logits) / temperature, dim=-1)


def _kl(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """KL(first ‖ second) of log-probabilities; terms where first is 0 contribute 0.

    The difference of the two sums is 0 but for rounding. With it, the gradient is exactly 0 where both
    are equal: otherwise, an optimizer that normalizes the gradient would follow only rounding errors.
    """
    own, other = first.exp(), second.exp()
    ratio = torch.where(own > 0, first - second, torch.zeros_like(first))
    return (own * ratio - own + other).sum(dim=-1)


def _quotas(shares: torch.Tensor, positions: int) -> list[int]:
    """Integer quotas in proportion to the shares that sum to positions (largest-remainder method)."""
    exact = [float(share) * positions for share in shares]
    found = [int(value) for value in exact]
    left = positions - sum(found)
    by_rest = sorted(range(len(found)), key=lambda at: found[at] - exact[at])
    for at in by_rest[:left]:
        found[at] += 1
    return found
