"""Ideas that might learn more under the same epsilon, each with the recipe as it is: a table.

FEDSLM_ASSETS=… python benchmarks/ideas.py [NAME …] [--epsilon 8 3] [--seeds 0 1]

A linear head is trained on precomputed features of all-MiniLM-L6-v2, as the recipe ``features`` trains
it: each record in each step, one step a round, noise of the analytic Gaussian mechanism at each of ten
clients of one size. The clients' sums enter the mean with one weight, so who has which record changes
nothing here. Features are kept under ``runs/recipes``.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from dictionary import analytic_sigma
from recipes import JOBS, kept_features, split_of

from fedslm.models.label_head import _LOGIT, spoken
from fedslm.models.public_head import _fitted
from fedslm.privacy.planning import signal_to_noise
from fedslm.recipes.choice import _BOUND, _BOUND_OF_A_CLASS, _LEAST_NOISE, _LOGIT_NOISE, _MOST_NOISE
from fedslm.recipes.facts import size_class

CLIENTS, NAMES_FOR_A_CENTER, PUBLIC = 10, 20, 5
SETS = ("banking77", "clinc150", "medical_abstracts")
Array = np.ndarray[Any, Any]
Seen = list[Array]


@dataclass(frozen=True)
class Arm:
    """What is done; the defaults are the recipe."""

    start: str = "names"
    rounds: int = 16
    momentum: float = 0.8
    clip: float = 0.3
    adaptive: bool = False
    each: Callable[[Array, float], Array] | None = None  # of a round's sum and its noise
    after: Callable[[Seen, float], Array] | None = None  # of the heads of all rounds and their noise


def shrunk(matrix: Array, noise: float) -> Array:
    """Optimal shrinkage in Frobenius norm (Gavish and Donoho 2017, arXiv 1405.7511)."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    rows, columns = sorted(matrix.shape)
    share, scale = rows / columns, noise * math.sqrt(columns)
    y = values / scale
    inside = np.maximum((y**2 - share - 1) ** 2 - 4 * share, 0)
    kept = np.where(y > 1 + math.sqrt(share), np.sqrt(inside) / np.maximum(y, 1e-12), 0)
    moved: Array = (left * (kept * scale)) @ right
    return moved


def last(count: int) -> Callable[[Seen, float], Array]:
    """The mean of the last heads."""
    return lambda heads, _noise: np.mean(heads[-count:], axis=0)


def exponential(keep: float) -> Callable[[Seen, float], Array]:
    """The exponential average of all heads."""

    def average(heads: Seen, _noise: float) -> Array:
        total = heads[0]
        for head in heads[1:]:
            total = keep * total + (1 - keep) * head
        return total

    return average


ARMS = {
    "the recipe": Arm(),
    "start from zero": Arm(start="zero"),
    "head fitted to five public records a class": Arm(start="public"),
    "means of five public records a class": Arm(start="means"),
    "head fitted to five records with random labels": Arm(start="random"),
    "no server momentum": Arm(momentum=0.0),
    "mean of the last 4 rounds": Arm(after=last(4)),
    "mean of the last 8 rounds, no momentum": Arm(momentum=0.0, after=last(8)),
    "exponential average, 0.5": Arm(after=exponential(0.5)),
    "exponential average, 0.8": Arm(after=exponential(0.8)),
    "singular values of the whole update shrunk": Arm(
        after=lambda heads, noise: heads[0] + shrunk(heads[-1] - heads[0], noise)
    ),
    "singular values of each round's sum shrunk": Arm(each=shrunk),
    "clip norm adapted to the median": Arm(adaptive=True),
    "clip norm 0.5": Arm(clip=0.5),
    "8 rounds": Arm(rounds=8),
    "32 rounds": Arm(rounds=32),
    "64 rounds": Arm(rounds=64),
}


class Features:
    """Features of one data set, of length 1 and centered as the recipe does it."""

    def __init__(self, name: str) -> None:
        job = JOBS[name]
        rows = {split: split_of(job, split) for split in ("train", "test")}
        self.labels = sorted({row["label"] for split in rows.values() for row in split})
        rows["names"] = [{"text": spoken(label)} for label in self.labels]
        found = {
            split: kept_features(name, split, each).double().numpy() for split, each in rows.items()
        }
        many = len(self.labels) >= NAMES_FOR_A_CENTER
        center = found["names"].mean(0) if many else np.zeros(found["names"].shape[1])
        moved = {split: each - center for split, each in found.items()}
        self.of = {
            split: each / np.linalg.norm(each, axis=1, keepdims=True) for split, each in moved.items()
        }
        self.classes = {
            split: np.array([self.labels.index(row["label"]) for row in rows[split]])
            for split in ("train", "test")
        }
        self.units = size_class(len(rows["train"]) / CLIENTS)
        self.delta = 10.0 ** min(-3, math.floor(-math.log10(10 * self.units)))

    def start(self, kind: str, seed: int) -> tuple[Array, Array]:
        """First weights (classes, width), and which training records stay private."""
        names, private = self.of["names"], np.ones(len(self.classes["train"]), dtype=bool)
        if kind == "zero":
            return np.zeros_like(names), private
        if kind == "names":
            return names * _LOGIT, private
        draw = np.random.default_rng(seed)
        chosen = np.concatenate(
            [draw.permutation(np.flatnonzero(self.classes["train"] == each))[:PUBLIC]
             for each in range(len(self.labels))]
        )  # fmt: skip
        private[chosen] = False
        inputs, targets = self.of["train"][chosen], self.classes["train"][chosen]
        if kind == "means":
            means = [(names[each] + inputs[targets == each].sum(0)) for each in range(len(names))]
            sums = np.array(means)
            return sums / np.linalg.norm(sums, axis=1, keepdims=True) * _LOGIT, private
        if kind == "random":
            targets = draw.permutation(targets)
        length = math.sqrt(names.shape[1])
        fitted = _fitted(inputs, targets.tolist(), names * _LOGIT / length)
        return np.asarray(fitted, dtype=np.float64) * length, private


def trained(data: Features, arm: Arm, epsilon: float, seed: int) -> float:
    """Accuracy on the test records after a simulated run."""
    head, private = data.start(arm.start, seed)
    inputs, targets = data.of["train"][private], data.classes["train"][private]
    sigma = analytic_sigma(epsilon, data.delta) * math.sqrt(arm.rounds)
    draw, clip, speed = np.random.default_rng(1000 + seed), arm.clip, np.zeros_like(head)
    heads, variance = [head], 0.0
    for _ in range(arm.rounds):
        rate = rate_of(data, arm, sigma, clip)
        logits = inputs @ head.T
        logits -= logits.max(1, keepdims=True)
        errors = np.exp(logits)
        errors /= errors.sum(1, keepdims=True)
        errors[np.arange(len(targets)), targets] -= 1
        norms = np.linalg.norm(errors, axis=1)
        errors *= np.minimum(1, clip / norms.clip(1e-12))[:, None]
        noise = sigma * clip / (math.sqrt(CLIENTS) * data.units)
        step = errors.T @ inputs / (CLIENTS * data.units) + draw.normal(0, noise, head.shape)
        if arm.each is not None:
            step = arm.each(step, noise)
        speed = arm.momentum * speed + step
        head = head - rate * (1 - arm.momentum) * speed
        heads.append(head)
        variance += (rate * noise) ** 2
        if arm.adaptive:  # Andrew et al. 2021, arXiv 1905.03871
            below = (norms <= clip).mean() + draw.normal(0, 0.05 / math.sqrt(CLIENTS))
            clip *= math.exp(-0.2 * (below - 0.5))
    if arm.after is not None:
        head = arm.after(heads, math.sqrt(variance))
    guesses = (data.of["test"] @ head.T).argmax(1)
    return float((guesses == data.classes["test"]).mean())


def rate_of(data: Features, arm: Arm, sigma: float, clip: float) -> float:
    """The recipe's rate on features of length 1."""
    classes, width = data.of["names"].shape
    signal = signal_to_noise(
        noise=sigma,
        steps=arm.rounds,
        batch_size=data.units,
        clients=CLIENTS,
        parameters=classes * (width + 1),
    )
    deviation = min(max(_LOGIT_NOISE * signal, _LEAST_NOISE), _MOST_NOISE)
    rate = deviation * data.units * math.sqrt(CLIENTS / arm.rounds) / (sigma * clip)
    return min(rate, _BOUND + _BOUND_OF_A_CLASS * classes)


def lines(names: Sequence[str], epsilons: Sequence[float], seeds: Sequence[int]) -> Iterator[str]:
    """Yields the table."""
    data = {name: Features(name) for name in names}
    cells = [f"{name}, ε = {epsilon:g}" for name in names for epsilon in epsilons]
    yield f"| arm | {' | '.join(cells)} |\n|{'---|' * (len(cells) + 1)}"
    for title, arm in ARMS.items():
        row = []
        for name in names:
            for epsilon in epsilons:
                scores = [trained(data[name], arm, epsilon, seed) for seed in seeds]
                spread = max(scores) - min(scores)
                row.append(f"{statistics.mean(scores):.3f} ± {spread / 2:.3f}")
        yield f"| {title} | {' | '.join(row)} |"


def printed(about: str | None, lines: Callable[..., Iterator[str]]) -> None:
    """Reads what is asked for, and prints a table.

    Args:
        about: The text of ``--help``.
        lines: Yields the lines for sets, epsilons and seeds.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"left out: {', '.join(SETS)}")
    parser.add_argument("--epsilon", nargs="+", type=float, default=[8.0, 3.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    asked = parser.parse_args()
    for line in lines(asked.names or SETS, asked.epsilon, asked.seeds):
        print(line, flush=True)


if __name__ == "__main__":
    printed(__doc__, lines)
