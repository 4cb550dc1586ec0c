"""Which factors of a LoRA head to train under noise: both, B only, or one in turn: a table.

FEDSLM_ASSETS=… python benchmarks/alternation.py [NAME …] [--epsilon 8 3] [--seeds 0 1]

A linear head W₀ + B·A of rank 8 over precomputed features (as in ideas.py), trained by ten clients of
one size, each record in each step, with the noise of the analytic Gaussian mechanism at each client.
All arms take 16 noisy steps: rounds times local steps. RoLoRA (arXiv 2502.01755) trains one factor a
round in turn, LA-LoRA (arXiv 2602.19926) one a local step. Each arm has the best of four rates *on the
test records*: an upper bound for each, and so a fair comparison. The last arm is the recipe: the head
itself, without factors.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from dictionary import analytic_sigma
from ideas import ARMS, CLIENTS, Features, printed, trained

Array = np.ndarray[Any, Any]
RANK, STEPS, CLIP, RATES = 8, 16, 0.3, (30.0, 100.0, 300.0, 1000.0)
Turn = Callable[[int, int], tuple[bool, bool]]


def both(_number: int, _step: int) -> tuple[bool, bool]:
    """Trains A and B; arguments of each turn: the round and its local step, from 0."""
    return True, True


def only_b(_number: int, _step: int) -> tuple[bool, bool]:
    """Trains B."""
    return False, True


def by_round(number: int, _step: int) -> tuple[bool, bool]:
    """B in even rounds, A in odd ones."""
    return number % 2 == 1, number % 2 == 0


def by_step(_number: int, step: int) -> tuple[bool, bool]:
    """B in even local steps, A in odd ones."""
    return step % 2 == 1, step % 2 == 0


TURNS: dict[str, tuple[Turn, int]] = {
    "both factors, 16 rounds of 1 step": (both, 1),
    "only B (FFA-LoRA), 16 rounds of 1 step": (only_b, 1),
    "in turn by round (RoLoRA), 16 rounds of 1 step": (by_round, 1),
    "both factors, 4 rounds of 4 steps": (both, 4),
    "only B (FFA-LoRA), 4 rounds of 4 steps": (only_b, 4),
    "in turn by round (RoLoRA), 4 rounds of 4 steps": (by_round, 4),
    "in turn by step (LA-LoRA), 4 rounds of 4 steps": (by_step, 4),
}


def gradients(
    head: Array, factors: tuple[Array, Array], inputs: Array, targets: Array, turn: tuple[bool, bool]
) -> tuple[Array, Array]:
    """Sums over records of the clipped gradients of A and B; zero for a factor that is not trained."""
    a, b = factors
    inner = inputs @ a.T
    logits = inputs @ head.T + inner @ b.T
    logits -= logits.max(1, keepdims=True)
    errors = np.exp(logits)
    errors /= errors.sum(1, keepdims=True)
    errors[np.arange(len(targets)), targets] -= 1
    back = errors @ b
    squares = np.zeros(len(targets))
    squares += turn[0] * (back**2).sum(1) * (inputs**2).sum(1)
    squares += turn[1] * (errors**2).sum(1) * (inner**2).sum(1)
    scale = np.minimum(1, CLIP / np.sqrt(squares).clip(1e-12))[:, None]
    return turn[0] * ((back * scale).T @ inputs), turn[1] * ((errors * scale).T @ inner)


def score(data: Features, arm: str, epsilon: float, seed: int, rate: float) -> float:
    """Accuracy on the test records after a simulated run."""
    of_turn, local = TURNS[arm]
    head, private = data.start("names", seed)
    inputs, targets = data.of["train"][private], data.classes["train"][private]
    draw, sigma = np.random.default_rng(seed), analytic_sigma(epsilon, data.delta) * STEPS**0.5
    shards = np.array_split(draw.permutation(len(targets)), CLIENTS)
    a = np.linalg.qr(draw.normal(size=(inputs.shape[1], RANK)))[0].T
    factors = (a, np.zeros((len(head), RANK)))
    for number in range(STEPS // local):
        ends = []
        for shard in shards:
            own = factors
            for step in range(local):
                turn = of_turn(number, step)
                found = gradients(head, own, inputs[shard], targets[shard], turn)
                own = (
                    own[0] - turn[0] * rate * noisy(found[0], sigma, data.units, draw),
                    own[1] - turn[1] * rate * noisy(found[1], sigma, data.units, draw),
                )
            ends.append(own)
        factors = (np.mean([e[0] for e in ends], axis=0), np.mean([e[1] for e in ends], axis=0))
    guesses = (data.of["test"] @ (head + factors[1] @ factors[0]).T).argmax(1)
    return float((guesses == data.classes["test"]).mean())


def noisy(total: Array, sigma: float, units: int, draw: np.random.Generator) -> Array:
    """The mean of a client's step with its noise."""
    return (total + draw.normal(0, sigma * CLIP, total.shape)) / units


def lines(names: Sequence[str], epsilons: Sequence[float], seeds: Sequence[int]) -> Iterator[str]:
    """Yields the table."""
    data = {name: Features(name) for name in names}
    cells = [(name, epsilon) for name in names for epsilon in epsilons]
    heading = " | ".join(f"{name}, ε = {epsilon:g}" for name, epsilon in cells)
    yield f"| arm | {heading} |\n|{'---|' * (len(cells) + 1)}"
    for arm in TURNS:
        row = []
        for name, epsilon in cells:
            found = {
                rate: statistics.mean(score(data[name], arm, epsilon, seed, rate) for seed in seeds)
                for rate in RATES
            }
            best = max(found, key=lambda rate: found[rate])
            row.append(f"{found[best]:.3f} (rate {best:g})")
        yield f"| {arm} | {' | '.join(row)} |"
    recipe = ARMS["the recipe"]
    row = [
        f"{statistics.mean(trained(data[name], recipe, epsilon, seed) for seed in seeds):.3f}"
        for name, epsilon in cells
    ]
    yield f"| the head itself (the recipe) | {' | '.join(row)} |"


if __name__ == "__main__":
    printed(__doc__, lines)
