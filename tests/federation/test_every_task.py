"""Each task end to end under privacy: data, plan, ledger, rounds, report, and the adapter outside fedslm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.saved import check_adapter
from support.tiny import PATIENT, PRIVATE, WORDS, write_rows

from fedslm import simulation
from fedslm.config import Config

MakeConfig = Callable[..., Config]
FamilyDirectory = Callable[[str, str], Path]
PROMPT = "note: {text} plan:"
# task: (family, None for the embedded model), task keys, data keys, metrics that are reported
TASKS: dict[str, tuple[str | None, dict[str, Any], dict[str, Any], set[str]]] = {
    "multi-label": (
        None,
        {"pooling": "mean", "labels": ["heart", "bone", "long"]},
        {"label_column": "labels"},
        {"f1_micro", "f1_macro", "exact_match", "loss"},
    ),
    "token-classification": (
        None,
        {"pooling": "native", "labels": ["O", "B-heart", "B-bone"]},
        {"text_column": "words", "label_column": "tags"},
        {"f1", "precision", "recall", "tag_accuracy", "loss"},
    ),
    "causal-lm": (
        "llama",
        {"pooling": "native"},
        {"label_column": ""},
        {"loss", "perplexity", "next_token_accuracy", "next_token_top3"},
    ),
    "instruction": (
        "llama",
        {"pooling": "native", "prompt": PROMPT},
        {"label_column": "answer"},
        {"loss", "perplexity", "next_token_accuracy", "next_token_top3"},
    ),
    "seq2seq": (
        "t5",
        {"pooling": "native", "prompt": PROMPT},
        {"label_column": "answer"},
        {"loss", "perplexity", "next_token_accuracy", "next_token_top3"},
    ),
    "preference": (
        "llama",
        {"pooling": "native", "beta": 0.5},
        {"label_column": "answer", "rejected_column": "worse"},
        {"accuracy", "margin", "loss"},
    ),
}


def rows_of(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows with a column for every task."""
    generator = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        kind, other = ("heart", "bone") if index % 2 else ("bone", "heart")
        words = [str(word) for word in generator.choice(WORDS[kind], int(generator.integers(3, 9)))]
        rows.append(
            {
                "text": " ".join(words),
                "labels": [kind, *(["long"] if len(words) > 5 else [])],
                "words": words,
                "tags": [f"B-{kind}" if len(word) > 5 else "O" for word in words],
                "answer": f"{kind} {words[0]}",
                "worse": f"{other} {words[0]}",
                "client": f"site-{index % 3}",
                "patient": f"site-{index % 3} {index // 9}",
            }
        )
    return rows


@pytest.fixture(scope="session")
def wide_notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with train.jsonl and test.jsonl that every task can use."""
    directory = tmp_path_factory.mktemp("wide")
    write_rows(directory / "train.jsonl", rows_of(60, 0))
    write_rows(directory / "test.jsonl", rows_of(24, 1))
    return directory


@pytest.mark.parametrize("name", TASKS)
def test_a_task_runs_privately_from_data_to_adapter(
    name: str, make_config: MakeConfig, family_directory: FamilyDirectory, wide_notes: Path
) -> None:
    """Every client trains in every round, spends its plan, and the adapter reloads as what was reported."""
    family, task, data, metrics = TASKS[name]
    targets = ["3.output.dense"] if family is None else ["all-linear"]
    base = "demo" if family is None else str(family_directory(family, name))
    config = make_config(
        model={"base": base},
        lora={"target_modules": targets},
        data={"source": str(wide_notes), **data},
        task={"name": name, "max_length": 32, **task},
        privacy=PATIENT if name in ("token-classification", "preference") else PRIVATE,
        federation={"rounds": 2},
    )
    report = simulation.simulate(config)
    assert report["failures"] == []
    assert metrics <= set(report["metrics_after"])
    assert set(report["metrics_before"]) == set(report["metrics_after"])
    assert report["metrics_after"]["loss"] != report["metrics_before"]["loss"]
    assert all(0 < spent["epsilon"] <= 8.0 for spent in report["privacy"].values())
    assert {spent["steps"] for spent in report["privacy"].values()} == {4}
    check_adapter(config, report)


def test_conversations_run_as_they_come(
    make_config: MakeConfig, family_directory: FamilyDirectory, tmp_path: Path
) -> None:
    """A data set of turns needs no column named: it trains privately, and the run's config names them."""
    roles = ("user", "assistant", "user", "assistant")
    for split, seed in (("train", 0), ("test", 1)):
        write_rows(
            tmp_path / f"{split}.jsonl",
            [
                {
                    "messages": [
                        {"role": role, "content": text}
                        for role, text in zip(roles, (row["text"], row["answer"]) * 2, strict=True)
                    ],
                    "client": row["client"],
                }
                for row in rows_of(30, seed)
            ],
        )
    config = make_config(
        model={"base": str(family_directory("llama", "instruction"))},
        lora={"target_modules": ["all-linear"]},
        data={"source": str(tmp_path)},
        task={"name": "instruction", "pooling": "native", "max_length": 64},
        privacy=PRIVATE,
        federation={"rounds": 1},
    )
    report = simulation.simulate(config)
    assert report["failures"] == []
    assert report["metrics_after"]["loss"] != report["metrics_before"]["loss"]
    written = (Path(str(config.run.directory)) / "config.toml").read_text()
    assert 'text_column = "messages"\nlabel_column = ""' in written
