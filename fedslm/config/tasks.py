"""Differences between tasks, as data: all task-dependent code reads this table.

A new task needs one file in ``tasks/``, one name in :data:`fedslm.config.base.TaskName`, one row here,
and whatever mypy then reports as missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from fedslm.config.base import TaskName

Classes = Literal["none", "one", "several", "each word"]
Network = Literal["classifier", "tagger", "decoder", "encoder-decoder"]
Teaches = Literal["nothing", "classes", "tokens"]


@dataclass(frozen=True)
class TaskKind:
    """Properties of one task.

    Attributes:
        columns: Content of ``text_column`` and ``label_column``, for people.
        metrics: Names of the metrics, for people.
        network: Kind of model.
        auto_class: The transformers class that loads an exported model.
        classes: Kind of class names in a record.
        label: Whether it needs ``data.label_column``; "turns": not if conversations have the answers.
        has_rejected: Whether it needs ``data.rejected_column``.
        has_prompt: Whether rows become prompts: ``task.prompt``, ``task.max_target_length``.
        reads_turns: Whether a column may contain the turns of a conversation.
        rows_per_example: Number of rows that one example takes in a batch.
        predicts: Whether ``fedslm predict`` supports it.
        generates: Whether ``fedslm generate`` supports it.
        has_references: Whether generated texts are scored against reference answers.
        teaches: What a student learns from it.
    """

    columns: str
    metrics: str
    network: Network
    auto_class: str
    classes: Classes = "none"
    label: Literal["needed", "turns", "none"] = "needed"
    has_rejected: bool = False
    has_prompt: bool = False
    reads_turns: bool = False
    rows_per_example: int = 1
    predicts: bool = False
    generates: bool = False
    has_references: bool = False
    teaches: Teaches = "nothing"


TASKS: Mapping[TaskName, TaskKind] = {
    "classification": TaskKind(
        columns="text, class",
        metrics="accuracy, macro F1",
        network="classifier",
        auto_class="AutoModelForSequenceClassification",
        classes="one",
        predicts=True,
        teaches="classes",
    ),
    "multi-label": TaskKind(
        columns='text, list of classes (or `"a, b"`)',
        metrics="micro and macro F1, exact match",
        network="classifier",
        auto_class="AutoModelForSequenceClassification",
        classes="several",
        predicts=True,
    ),
    "token-classification": TaskKind(
        columns="list of words, list of tags (`O`, `B-…`, `I-…`)",
        metrics="entity F1 (as in CoNLL), precision, recall",
        network="tagger",
        auto_class="AutoModelForTokenClassification",
        classes="each word",
        predicts=True,
    ),
    "causal-lm": TaskKind(
        columns='text (`label_column = ""`)',
        metrics="perplexity, next token and next word (top 1, top 3)",
        network="decoder",
        auto_class="AutoModelForCausalLM",
        label="none",
        predicts=True,
        generates=True,
        teaches="tokens",
    ),
    "instruction": TaskKind(
        columns=(
            "prompt, completion, as text or turns; whole conversations ([TRL, ShareGPT]"
            '(data.md#conversations)); or `prompt = "Question: {question}"`, with columns in braces; '
            "uses the chat template if there is one"
        ),
        metrics="perplexity of the completion",
        network="decoder",
        auto_class="AutoModelForCausalLM",
        label="turns",
        has_prompt=True,
        reads_turns=True,
        generates=True,
        has_references=True,
        teaches="tokens",
    ),
    "seq2seq": TaskKind(
        columns="text, text (a T5 base)",
        metrics="perplexity; ROUGE by `fedslm evaluate --generate`",
        network="encoder-decoder",
        auto_class="AutoModelForSeq2SeqLM",
        has_prompt=True,
        generates=True,
        has_references=True,
    ),
    "preference": TaskKind(
        columns="prompt, better answer; `rejected_column` (DPO)",
        metrics="accuracy, margin; the reference is the base model",
        network="decoder",
        auto_class="AutoModelForCausalLM",
        has_rejected=True,
        has_prompt=True,
        reads_turns=True,
        rows_per_example=2,
        generates=True,
    ),
}


def tasks_that(holds: Callable[[TaskKind], bool]) -> tuple[TaskName, ...]:
    """Returns the names of the tasks with a given property, in the table's order.

    >>> tasks_that(lambda kind: kind.teaches == "tokens")
    ('causal-lm', 'instruction')
    """
    return tuple(name for name, kind in TASKS.items() if holds(kind))


def as_table() -> str:
    """Returns the table of ``docs/configuration.md``."""
    head = "| task | columns: `text_column`, `label_column` | metrics |\n|---|---|---|\n"
    return head + "".join(
        f"| `{name}` | {kind.columns} | {kind.metrics} |\n" for name, kind in TASKS.items()
    )
