"""Common column layouts of fine-tuning data sets, so that a config need not name the columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedslm.config import DataConfig, TaskConfig
from fedslm.config.tasks import TASKS
from fedslm.data.sources import column_names
from fedslm.errors import DataError

_PLAIN = ("instruction", "seq2seq")


@dataclass(frozen=True)
class Layout:
    """A column layout and the matching config values.

    Attributes:
        tasks: Names of the tasks that can read the columns.
        columns: Columns that must all exist.
        data: Keys of ``data`` to values.
        prompt: The task's prompt; None: the text column.
    """

    tasks: tuple[str, ...]
    columns: tuple[str, ...]
    data: Mapping[str, str | None] = field(default_factory=dict)
    prompt: str | None = None


_ANSWERS = {"label_column": "chosen", "rejected_column": "rejected"}
LAYOUTS = (
    Layout(("preference",), ("prompt", "chosen", "rejected"), {**_ANSWERS, "text_column": "prompt"}),
    Layout(("preference",), ("chosen", "rejected"), {**_ANSWERS, "text_column": "chosen"}),
    *(
        Layout(("instruction",), (name,), {"text_column": name, "label_column": None})
        for name in ("messages", "conversations")
    ),
    Layout(
        _PLAIN,
        ("prompt", "completion"),
        {"text_column": "prompt", "label_column": "completion"},
    ),
    Layout(
        _PLAIN,
        ("instruction", "input", "output"),
        {"label_column": "output"},
        "{instruction}\n\n{input}\n\n",
    ),
    Layout(
        _PLAIN,
        ("instruction", "output"),
        {"label_column": "output"},
        "{instruction}\n\n",
    ),
)


def laid_out(
    data: DataConfig, task: TaskConfig, seed: int, there: Sequence[str] | None = None
) -> tuple[DataConfig, TaskConfig]:
    """Fills in column names from the data where the two sections do not set them.

    Only the column names of the public split are read, nothing else of the data.

    Args:
        data: Sources and columns; explicitly set columns are kept.
        task: The task section, including ``format``.
        seed: Seed of the demo data.
        there: The column names of the public split, if they are known; None: they are read.

    Raises:
        DataError: The public split cannot be read, or a preference data set has unknown columns.
    """
    named = [key for key in ("text_column", "label_column") if _is_named(data, key)]
    may = task.format == "auto" and task.prompt is None and data.rejected_column is None and not named
    if not may or task.name not in {name for layout in LAYOUTS for name in layout.tasks}:
        return data, task
    there = column_names(data, seed) if there is None else there
    if not {data.text_column, data.label_column} <= set(there):
        for layout in LAYOUTS:
            if task.name in layout.tasks and set(layout.columns) <= set(there):
                found = {"prompt": layout.prompt}
                return data.model_copy(update=dict(layout.data)), task.model_copy(update=found)
    if TASKS[task.name].has_rejected:
        raise DataError(
            f"data.rejected_column is missing: the public split has {', '.join(there)}, not prompt, "
            f"chosen and rejected; name the columns of the prompt and of both answers"
        )
    return data, task


def _is_named(data: DataConfig, key: str) -> bool:
    """Whether a config sets a column name other than the default."""
    return bool(getattr(data, key) != DataConfig.model_fields[key].default)
