"""What is learned: one file for each task."""

from __future__ import annotations

from typing import assert_never

from fedslm.config import DataConfig, TaskConfig
from fedslm.tasks.base import Task
from fedslm.tasks.causal_lm import CausalLM
from fedslm.tasks.classification import Classification


def build(task: TaskConfig, data: DataConfig, labels: tuple[str, ...]) -> Task:
    """Builds the task that a config names.

    Args:
        task: Name and length.
        data: Columns.
        labels: Class names, from the config or the public split.
    """
    match task.name:
        case "classification":
            column = str(data.label_column)
            return Classification(labels, data.text_column, column, task.max_length)
        case "causal-lm":
            return CausalLM(data.text_column, task.max_length)
        case _:
            assert_never(task.name)
