"""What a dictionary of tagged words reaches on bc5cdr: without privacy, and at the epsilon of a run.

FEDSLM_ASSETS=… python benchmarks/dictionary.py [--epsilon 8 3] [--delta 1e-4] [--clients 5] [--seeds 0]

The private dictionary counts how often each word has each tag. One sentence adds at most K pairs, each
once and with weight 1 / √K, so the counts have L2 sensitivity 1 for one sentence, and each client adds
the noise of the analytic Gaussian mechanism (Balle and Wang 2018, arXiv 1805.06530) to its own counts.
It is favoured twice: the words of training and test are taken as public, and K and the least count that
a tag needs are the best of several *by the test sentences*. So its F1 is an upper bound.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedslm.tasks.token_classification import entities

PAIRS, LEAST = (2, 4, 8, 16), (0.5, 1, 2, 3, 4, 6)
Sentences = list[dict[str, Any]]


def sentences(split: str) -> Sentences:
    """Sentences of a split."""
    path = Path(os.environ["FEDSLM_ASSETS"]) / "data" / "bc5cdr" / f"{split}.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def analytic_sigma(epsilon: float, delta: float) -> float:
    """The least noise at L2 sensitivity 1 (Balle and Wang 2018, Theorem 8)."""
    normal = statistics.NormalDist().cdf

    def spent(sigma: float) -> float:
        half, shift = 1 / (2 * sigma), epsilon * sigma
        return normal(half - shift) - math.exp(epsilon) * normal(-half - shift)

    low, high = 1e-2, 1e3
    while high - low > 1e-6 * high:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if spent(middle) > delta else (low, middle)
    return high


class Dictionary:
    """Counts of tags for each word.

    Args:
        train: Tagged sentences.
        test: Tagged sentences that the F1 is of.
    """

    def __init__(self, train: Sentences, test: Sentences) -> None:
        self.train, self.test = train, test
        words = sorted({word.lower() for row in (*train, *test) for word in row["tokens"]})
        self.words = {word: at for at, word in enumerate(words)}
        tags = {tag for row in train for tag in row["tags"]}
        self.tags = ["O", *sorted(tags - {"O"})]

    def pairs(self, row: dict[str, Any]) -> list[tuple[int, int]]:
        """Distinct pairs of word and tag of a sentence, entities first: K is for them."""
        found = {
            (self.words[word.lower()], self.tags.index(tag))
            for word, tag in zip(row["tokens"], row["tags"], strict=True)
        }
        return sorted(found, key=lambda pair: pair[1] == 0)

    def counts(self, most: int | None) -> np.ndarray:
        """Counts, [words, tags]; each sentence adds at most ``most`` pairs."""
        total = np.zeros((len(self.words), len(self.tags)))
        for row in self.train:
            for pair in self.pairs(row)[:most]:
                total[pair] += 1
        return total

    def score(self, counts: np.ndarray, least: float) -> float:
        """Entity F1 if each word gets its commonest tag, or O below ``least`` counts."""
        best = np.where(counts[:, 1:].max(1) >= least, counts[:, 1:].argmax(1) + 1, 0)
        chosen = np.where(counts[:, 0] > counts[:, 1:].max(1), 0, best)
        right = guessed = actual = 0
        for row in self.test:
            found = entities([self.tags[chosen[self.words[word.lower()]]] for word in row["tokens"]])
            truth = entities(row["tags"])
            right, guessed, actual = (
                right + len(found & truth),
                guessed + len(found),
                actual + len(truth),
            )
        return 2 * right / max(1, guessed + actual)

    def private(self, sigma: float, seeds: Sequence[int]) -> Iterator[tuple[float, int, float]]:
        """Mean F1 over seeds with its K and least count, under noise for L2 sensitivity 1."""
        for most in PAIRS:
            exact = self.counts(most)
            for least in LEAST:
                scores = [
                    self.score(
                        exact + np.random.default_rng(seed).normal(0, sigma * most**0.5, exact.shape),
                        least * sigma * most**0.5,
                    )
                    for seed in seeds
                ]
                yield statistics.mean(scores), most, least


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epsilon", nargs="+", type=float, default=[8.0, 3.0])
    parser.add_argument("--delta", type=float, default=1e-4)
    parser.add_argument("--clients", type=int, default=5)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    asked = parser.parse_args()
    dictionary = Dictionary(sentences("train"), sentences("test"))
    print(f"not private: F1 {dictionary.score(dictionary.counts(None), 1):.3f}")
    for epsilon in asked.epsilon:
        alone = analytic_sigma(epsilon, asked.delta)
        for clients in sorted({1, asked.clients}):
            best = max(dictionary.private(alone * clients**0.5, asked.seeds))
            print(
                f"epsilon {epsilon:g}, noise of {clients} client{'s' * (clients > 1)}: F1 at most "
                f"{best[0]:.3f} ({best[1]} pairs a sentence, least count {best[2]:g} deviations)",
                flush=True,
            )


if __name__ == "__main__":
    main()
