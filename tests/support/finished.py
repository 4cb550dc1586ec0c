"""Tiny finished runs, one for each kind of task: everything in them is the real thing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fedslm import simulation
from fedslm.config import Config
from support.tiny import WORDS, write_base, write_rows

PROMPT = "note: {text} plan:"
ANSWER = {"label_column": "answer"}
# kind: (family, None for the embedded model), task keys, data keys
KINDS: dict[str, tuple[str | None, dict[str, Any], dict[str, Any]]] = {
    "classification": (None, {"pooling": "mean"}, {}),
    "normalized": (None, {"name": "classification", "pooling": "normalized", "head": "labels"}, {}),
    "native": ("bert", {"name": "classification", "pooling": "native"}, {}),
    "multi-label": (
        None,
        {"pooling": "mean", "labels": ["heart", "bone", "long"]},
        {"label_column": "labels"},
    ),
    "token-classification": (
        None,
        {"pooling": "native", "labels": ["O", "B-heart", "I-heart", "B-bone", "I-bone"]},
        {"text_column": "words", "label_column": "tags"},
    ),
    "causal-lm": ("llama", {"pooling": "native"}, {"label_column": ""}),
    "gpt2": ("gpt2", {"name": "causal-lm", "pooling": "native"}, {"label_column": ""}),
    "instruction": ("llama", {"pooling": "native", "prompt": PROMPT}, ANSWER),
    "seq2seq": ("t5", {"pooling": "native", "prompt": PROMPT}, ANSWER),
    "preference": ("llama", {"pooling": "native"}, {**ANSWER, "rejected_column": "worse"}),
}


def rows_of(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows with a column for every task; long words are entities of their kind."""
    generator = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        kind, other = ("heart", "bone") if index % 2 else ("bone", "heart")
        words = [str(word) for word in generator.choice(WORDS[kind], int(generator.integers(3, 9)))]
        rows.append(
            {
                "text": " ".join(words),
                "label": kind,
                "labels": [kind, *(["long"] if len(words) > 5 else [])],
                "words": words,
                "tags": _tags(words, kind),
                "answer": f"{kind} {words[0]}",
                "worse": f"{other} {words[0]}",
                "client": f"site-{index % 3}",
            }
        )
    return rows


def _tags(words: list[str], kind: str) -> list[str]:
    """Neighbouring long words are one entity."""
    tags: list[str] = []
    for word in words:
        inside = bool(tags) and tags[-1] != "O"
        tags.append(f"{'I' if inside else 'B'}-{kind}" if len(word) > 5 else "O")
    return tags


def write_sources(directory: Path) -> Path:
    """Writes train.jsonl and test.jsonl that every task can use."""
    write_rows(directory / "train.jsonl", rows_of(60, 0))
    write_rows(directory / "test.jsonl", rows_of(30, 1))
    return directory


def train(
    kind: str,
    directory: Path,
    source: Path,
    config_in: Callable[..., Config],
    **sections: dict[str, Any],
) -> Path:
    """Trains a tiny model without privacy, since what is tried is what comes after."""
    family, task, data = KINDS[kind]
    task = {"name": kind, "max_length": 32, **task}
    base = "demo"
    if family is not None:
        # Larger random weights than usual: what is written is varied, and some of it is likely.
        wide = {"initializer_range": 0.3} if family in ("llama", "gpt2") else {}
        base = str(write_base(directory / "base", family, task["name"], **wide))
    targets = ["3.output.dense"] if family is None else ["all-linear"]
    values: dict[str, dict[str, Any]] = {
        "model": {"base": base},
        "lora": {"target_modules": targets, "rank": 4, "alpha": 8.0},
        "data": {"source": str(source), **data},
        "task": task,
        "training": {"local_steps": 10, "batch_size": 8, "learning_rate": 0.02},
        "federation": {"rounds": 1},
    }
    for section, changes in sections.items():
        values[section] = {**values.get(section, {}), **changes}
    simulation.simulate(config_in(directory / "run", **values))
    return directory / "run"
