"""The table of tasks: every task has a row, and what depends on the task agrees with its code."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import transformers
from support.tiny import changed, problems

from fedslm.config import DataConfig, DistillConfig, TaskConfig, TaskName
from fedslm.config.tasks import TASKS, TaskKind, as_table
from fedslm.distillation.objective import resolved_method
from fedslm.privacy.policy import EXAMPLE
from fedslm.tasks import build

ROOT = Path(__file__).parent.parent
EACH = pytest.mark.parametrize(("name", "kind"), TASKS.items(), ids=TASKS)


def test_every_task_has_a_row_and_stands_in_the_pages() -> None:
    """The names of the config, of the table, of the policy's example; docs hold the table to the letter."""
    assert tuple(TASKS) == get_args(TaskName)
    assert all(f'"{name}"' in EXAMPLE for name in TASKS)
    assert as_table() in (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")


@EACH
def test_a_row_says_what_the_task_does(name: TaskName, kind: TaskKind) -> None:
    """Rows of an example, and the class that transformers knows."""
    task = build(TaskConfig(name=name), DataConfig(source="demo"), ("a", "b"))
    assert task.rows_per_example == kind.rows_per_example
    assert hasattr(transformers, kind.auto_class)
    assert kind.predicts or kind.generates
    assert not kind.has_references or kind.generates
    if kind.teaches != "nothing":
        assert resolved_method(DistillConfig(student="demo-large", source="demo"), name, 10)


@EACH
def test_a_config_asks_for_what_the_row_needs(name: TaskName, kind: TaskKind) -> None:
    """A label column that is missing, and a worse answer's, are named exactly where they are needed."""
    wrong = ("lora.dropout", 0.5)  # so that something is wrong
    keys = problems(
        changed(("task.name", name), ("data.label_column", ""), ("data.text_column", "other"), wrong)
    )
    assert ("data.label_column" in keys) == (kind.label == "needed")
    assert ("data.rejected_column" in keys) == kind.has_rejected
