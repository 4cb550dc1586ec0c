"""Every task with examples of its own, and a fake model in which no row touches another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from fedslm.tasks.base import Example, Task, Tensors, Tokens
from fedslm.tasks.causal_lm import CausalLM
from fedslm.tasks.classification import Classification
from fedslm.tasks.instruction import Instruction
from fedslm.tasks.multi_label import MultiLabel
from fedslm.tasks.preference import Preference
from fedslm.tasks.prompts import Prompts
from fedslm.tasks.seq2seq import Seq2Seq
from fedslm.tasks.token_classification import TokenClassification
from fedslm.tasks.tokens import IGNORED

PAD, VOCABULARY, LENGTH = 0, 17, 16
TAGS = ("O", "B-Drug", "I-Drug", "B-Pain", "I-Pain")
PROMPTS = Prompts("{text}", "plain", LENGTH, 6)
CLASSES = Classification(("cold", "flu", "other"), "text", "label", LENGTH)
LANGUAGE = CausalLM("text", LENGTH)
KINDS: dict[str, Task] = {
    "classification": CLASSES,
    "multi-label": MultiLabel(("cold", "flu", "other"), "text", "labels", LENGTH),
    "token-classification": TokenClassification(TAGS, "words", "tags", LENGTH),
    "causal-lm": LANGUAGE,
    "instruction": Instruction(PROMPTS, "answer"),
    "seq2seq": Seq2Seq(PROMPTS, "answer"),
    "preference": Preference(PROMPTS, "answer", "worse", 0.5),
}
SEQUENCES: tuple[Tokens, ...] = ((3, 5, 7), (4, 4), (6, 1, 2, 9, 8, 3, 3), (2, 9, 9, 1), (8, 3, 4, 1))
LONG: Tokens = tuple(range(1, 16))


def example_of(name: str, sequence: Tokens, number: int) -> Example:
    """A token sequence as an example of a task."""
    generator = np.random.default_rng(number)
    plain = Example(sequence, number % 3)
    match name:
        case "multi-label":
            return replace(plain, targets=tuple(int(x) for x in generator.integers(0, 2, 3)))
        case "token-classification":
            tags = (int(x) for x in generator.integers(0, len(TAGS), len(sequence)))
            return replace(plain, targets=(IGNORED, *tags)[: len(sequence)])
        case "causal-lm":
            return replace(plain, targets=tuple(1 + at // 2 for at in range(len(sequence))))
        case "instruction":
            return replace(plain, targets=(IGNORED, *sequence[1:]))
        case "seq2seq":
            return replace(plain, targets=sequence[::-1][:5])
        case "preference":
            other = (*sequence[:1], *((token + number) % VOCABULARY for token in sequence[1:]), 5)
            worse = Example(other, targets=(IGNORED, *other[1:]))
            return replace(plain, targets=(IGNORED, *sequence[1:]), rejected=worse)
    return plain


def examples_of(name: str) -> list[Example]:
    """Examples of very different lengths."""
    return [example_of(name, sequence, number) for number, sequence in enumerate(SEQUENCES)]


def logits_of(task: Task, batch: Tensors) -> torch.Tensor:
    """A fake model in double precision: a row's logits depend on its own tokens alone."""
    if task.uses_base:
        batch["base_logits"] = _table(1)[batch["input_ids"]].cumsum(dim=1)
    by_token = _table(0)[batch["input_ids"]].cumsum(dim=1)
    if "decoder_input_ids" in batch:
        read = (_table(2)[batch["input_ids"]] * batch["attention_mask"].unsqueeze(-1)).sum(1, True)
        return read + _table(0)[batch["decoder_input_ids"]].cumsum(dim=1)
    if not task.labels:
        return by_token
    classes = len(task.labels)
    if isinstance(task, TokenClassification):
        return by_token[:, :, :classes]
    last = batch["attention_mask"].sum(dim=1) - 1
    return by_token[torch.arange(len(last)), last][:, :classes]


def _table(seed: int) -> torch.Tensor:
    """Random logits for each token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(VOCABULARY, VOCABULARY, generator=generator, dtype=torch.double)


def losses_of(task: Task, examples: Sequence[Example]) -> torch.Tensor:
    """Per-example losses under the fake model."""
    batch = task.collate(examples, PAD)
    return task.per_example_loss(logits_of(task, batch), batch)


def metrics_of(task: Task, logits: torch.Tensor, batch: Tensors) -> dict[str, float]:
    """Metrics of one batch."""
    return task.metrics(sums_of(task, logits, batch))


def sums_of(task: Task, logits: torch.Tensor, batch: Tensors) -> dict[str, np.ndarray]:
    """Added-up statistics of one batch."""
    found = task.statistics(logits, batch)
    return {name: values.double().sum(dim=0).numpy() for name, values in found.items()}


def by_hand(logits: torch.Tensor, target: int) -> float:
    """Negative log-probability of a class, in plain Python."""
    values = [float(value) for value in logits]
    return math.log(sum(math.exp(value) for value in values)) - values[target]


def added(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Sums of sums."""
    total: dict[str, np.ndarray] = {}
    for part in parts:
        total = {name: total.get(name, 0.0) + value for name, value in part.items()}
    return total
