"""An empirical lower bound on epsilon: the strongest attacker against the mechanism that runs.

Each canary is a unit whose gradient has its own coordinate and is far too long. Half of them, drawn at
random, are in the data. Sampler, clip, noise and optimizer are those of a training step; the attacker
sees every noisy sum and knows everything except who was in the data. The result is evidence that the
code does what the accountant assumes, not a proof: the upper bound is the accountant's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fedslm.privacy import accounting
from fedslm.privacy.plan import PrivatePlan
from fedslm.privacy.randomness import SecureStream
from fedslm.rng import stream
from fedslm.training.noisy_optimizer import private_optimizer

_TOO_LONG = 10.0  # in clip norms
_ROWS = 512  # canaries in one micro-batch of a step
_THRESHOLDS = 200
_RATES = (0.01, 0.1)
_FEWEST, _WORK = 2_000, 1e10
_SURPRISE = 1e-6  # a measurement must be this unlikely to contradict the bound
_LARGEST_RATE = 0.999


@dataclass(frozen=True)
class Attack:
    """The share of members that the attacker identified at a given false positive rate.

    Attributes:
        false_positive_rate: The attacker's target rate.
        measured: Share of members that the attacker identified.
        bound: Largest share that any attacker can identify, by the accountant.
        within_bound: False if the measurement cannot be explained by chance within the bound.
    """

    false_positive_rate: float
    measured: float
    bound: float
    within_bound: bool


@dataclass(frozen=True)
class EmpiricalBound:
    """The result of the attack.

    Attributes:
        lower: Lower bound on epsilon; 0 if the attacker learned nothing significant.
        upper: Epsilon of the same steps by the accountant.
        delta: The delta of both.
        confidence: Probability with which the lower bound holds.
        canaries: Number of units that were inserted or left out.
        steps: Number of noisy steps that the attacker saw.
        attacks: Members identified at several false positive rates.
    """

    lower: float
    upper: float
    delta: float
    confidence: float
    canaries: int
    steps: int
    attacks: tuple[Attack, ...]

    @property
    def consistent(self) -> bool:
        """False if the mechanism leaks more than was proven: then the code or the proof is wrong."""
        return self.lower <= self.upper and all(attack.within_bound for attack in self.attacks)


def empirical_bound(
    plan: PrivatePlan,
    *,
    canaries: int = 20_000,
    confidence: float = 0.95,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> EmpiricalBound:
    """Attacks one client's round with canaries in the gradients.

    Formal guarantees:
        * If the steps together are (epsilon, delta)-private for a unit, ``lower`` is above epsilon with
          probability at most ``1 - confidence``: the threshold is chosen on one half of the canaries
          and evaluated on the other, by Clopper-Pearson bounds. Canaries do not affect one another's
          coordinate, so each is a separate experiment.

    Args:
        plan: ``steps_per_round`` steps are attacked, at its sampler, clip and noise.
        canaries: Most canaries, >= 2,000; fewer are used if they would take long.
        confidence: In (0, 1).
        on_step: Is called after each step with the number of steps done and of all.

    References:
        Jagielski et al. 2020 (arXiv 2006.07709); Nasr et al. 2023 (arXiv 2302.07956); Steinke et al.
        2023 (arXiv 2305.08846) for many canaries in one run.
    """
    affordable = math.isqrt(int(_WORK / (plan.sample_rate * plan.steps_per_round)))
    canaries = min(canaries, max(_FEWEST, affordable))
    present = SecureStream().bernoulli(canaries, 0.5)
    scores = np.zeros(canaries)
    for step, release in enumerate(_releases(plan, present), 1):
        scores += _log_likelihood_ratio(plan, release)
        on_step(step, plan.steps_per_round)
    fitted = np.arange(canaries) % 2 == 0
    fitting = _Scores(scores[fitted], present[fitted])
    judging = _Scores(scores[~fitted], present[~fitted])
    level = (1 - confidence) / 2
    thresholds = np.quantile(fitting.scores, np.linspace(0.5, 0.9995, _THRESHOLDS))
    best = max(thresholds, key=lambda threshold: fitting.bound(threshold, plan.delta, level))
    event = plan.training_event
    return EmpiricalBound(
        lower=judging.bound(best, plan.delta, level),
        upper=accounting.epsilon([event], plan.delta),
        delta=plan.delta,
        confidence=confidence,
        canaries=canaries,
        steps=event.steps,
        attacks=tuple(_attack(rate, fitting, judging, plan) for rate in _RATES),
    )


@dataclass(frozen=True)
class _Scores:
    """The canaries' scores, and which of them were in the data."""

    scores: NDArray[np.float64]
    present: NDArray[np.bool_]

    def rates(self, threshold: float, level: float) -> tuple[float, float]:
        """Bounds the true positive rate from below and the false one from above, each at ``level``."""
        from scipy.stats import beta

        accused = self.scores > threshold
        hits, members = int((accused & self.present).sum()), int(self.present.sum())
        alarms, others = int((accused & ~self.present).sum()), int((~self.present).sum())
        lower = float(beta.ppf(level, hits, members - hits + 1)) if hits else 0.0
        upper = float(beta.ppf(1 - level, alarms + 1, others - alarms)) if alarms < others else 1.0
        return lower, upper

    def bound(self, threshold: float, delta: float, level: float) -> float:
        """Returns a lower bound on epsilon from one threshold."""
        true_rate, false_rate = self.rates(threshold, level)
        return math.log((true_rate - delta) / false_rate) if true_rate - delta > false_rate else 0.0


def _attack(rate: float, fitting: _Scores, judging: _Scores, plan: PrivatePlan) -> Attack:
    """Sets the threshold for a false positive rate on one half, and evaluates it on the other."""
    threshold = float(np.quantile(fitting.scores[~fitting.present], 1 - rate))
    measured = float((judging.scores[judging.present] > threshold).mean())
    true_rate, false_rate = judging.rates(threshold, _SURPRISE)
    events = [plan.training_event]
    allowed = accounting.true_positive_bound(events, min(false_rate, _LARGEST_RATE))
    bound = accounting.true_positive_bound(events, rate)
    return Attack(rate, measured, bound, within_bound=true_rate <= allowed)


def _releases(plan: PrivatePlan, present: NDArray[np.bool_]) -> Iterator[NDArray[np.float64]]:
    """Yields the noisy sum of each step in clip norms, one value per canary."""
    parameter = torch.nn.Parameter(torch.zeros(len(present)))
    optimizer = private_optimizer(torch.optim.SGD([parameter], lr=1.0), plan)
    members = np.flatnonzero(present)
    for batch in plan.batches([str(member) for member in members], stream(0, "canaries")):
        sample = members[np.array([unit[0] for unit in batch], dtype=np.int64)]
        parts = [sample[start : start + _ROWS] for start in range(0, max(1, len(sample)), _ROWS)]
        parameter.data.zero_()
        for number, part in enumerate(parts, start=1):
            gradients = torch.zeros(len(part), len(present))
            gradients[torch.arange(len(part)), torch.from_numpy(part)] = _TOO_LONG * plan.clip_norm
            parameter.grad_sample = gradients  # type: ignore[attr-defined]
            optimizer.signal_skip_step(do_skip=number < len(parts))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        yield -parameter.detach().double().numpy() * plan.normaliser / plan.clip_norm


def _log_likelihood_ratio(plan: PrivatePlan, release: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns each canary's log-likelihood ratio, in the data against not in the data."""
    shift = (2 * release - 1) / (2 * plan.noise_multiplier**2)
    rate = plan.sample_rate
    with np.errstate(divide="ignore"):  # with a rate of 1 every member is in the sample
        return np.logaddexp(np.log1p(-rate), math.log(rate) + shift)
