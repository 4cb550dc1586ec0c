"""Tasks: one module per task."""

from __future__ import annotations

from typing import assert_never

from fedslm.config import DataConfig, TaskConfig
from fedslm.tasks.base import Task
from fedslm.tasks.causal_lm import CausalLM
from fedslm.tasks.classification import Classification
from fedslm.tasks.instruction import Instruction
from fedslm.tasks.multi_label import MultiLabel
from fedslm.tasks.preference import Preference
from fedslm.tasks.prompts import Prompts
from fedslm.tasks.seq2seq import Seq2Seq
from fedslm.tasks.token_classification import TokenClassification


def build(task: TaskConfig, data: DataConfig, labels: tuple[str, ...]) -> Task:
    """Builds the task that a config names.

    Args:
        task: Name, lengths and prompt of the task.
        data: Columns of the data.
        labels: Class names, from the config or the public split.
    """
    text, target = data.text_column, str(data.label_column)
    match task.name:
        case "classification":
            return Classification(labels, text, target, task.max_length)
        case "multi-label":
            return MultiLabel(labels, text, target, task.max_length)
        case "token-classification":
            return TokenClassification(labels, text, target, task.max_length)
        case "causal-lm":
            return CausalLM(text, task.max_length)
        case "instruction":
            return Instruction(Prompts.of(task, data), data.label_column)
        case "seq2seq":
            return Seq2Seq(Prompts.of(task, data), target)
        case "preference":
            rejected = str(data.rejected_column)
            return Preference(Prompts.of(task, data), target, rejected, task.beta)
        case _:
            assert_never(task.name)
