"""A loaded tiny model, its task and a padded batch of examples, for each architecture."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedslm import tasks
from fedslm.config import DataConfig, LoraConfig, ModelConfig, TaskConfig
from fedslm.models.adapter import initial_state
from fedslm.models.loaded import LoadedModel, load
from fedslm.records import AdapterState
from fedslm.tasks.base import Example, Task

LABELS = ("bone", "heart", "skin")


def load_family(directory: Path, name: str, pooling: str = "native", rank: int = 3) -> LoadedModel:
    """Loads a tiny model with LoRA on every linear layer."""
    labels = len(LABELS) if name == "classification" else 0
    return load(
        ModelConfig(base=str(directory), device="cpu"),
        LoraConfig(rank=rank, alpha=2.0 * rank),
        TaskConfig(name=name, pooling=pooling, max_length=32),  # type: ignore[arg-type]
        labels,
    )


def task_of(name: str) -> Task:
    """The task for a name."""
    config = TaskConfig(name=name, max_length=32)  # type: ignore[arg-type]
    return tasks.build(config, DataConfig(source="none"), LABELS if name == "classification" else ())


def examples_of(count: int, seed: int = 0) -> list[Example]:
    """Examples of very different lengths, so that batches are padded."""
    generator = np.random.default_rng(seed)
    return [
        Example(
            tuple(int(token) for token in generator.integers(5, 1700, size=int(length))),
            int(generator.integers(len(LABELS))),
        )
        for length in generator.integers(3, 20, size=count)
    ]


def random_state(model: LoadedModel, seed: int = 0) -> AdapterState:
    """An adapter in general position: B is not zero."""
    start = initial_state(model.adapter.read().shapes, seed)
    generator = np.random.default_rng(seed)
    return AdapterState(
        {
            key: start[key] + 0.1 * generator.standard_normal(start[key].shape).astype(np.float32)
            for key in start
        }
    )
