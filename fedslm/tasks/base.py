"""The seam between what is learned and everything else.

A task prepares rows into examples, collates examples into a padded batch, gives one loss per example
(never a mean over a batch: examples must not be coupled), and turns sums into metrics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

Tokens = tuple[int, ...]
Tensors = dict[str, "torch.Tensor"]


@dataclass(frozen=True)
class Example:
    """One record, tokenised.

    Attributes:
        input_ids: Token ids, at least one.
        target: Class index; -1 where the tokens are the target.
        owner: Whose the record is, where that matters (privacy.unit = "patient").
    """

    input_ids: Tokens
    target: int = -1
    owner: str = ""


@dataclass(frozen=True)
class Prepared:
    """A client's examples.

    Attributes:
        examples: What can be trained on.
        kept: Index of the row behind each example. Records without tokens or with an unknown label are
            left out; whether one is depends on it alone.
    """

    examples: tuple[Example, ...]
    kept: tuple[int, ...]


class Task(Protocol):
    """What is learned."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names; empty if the task has no classes."""

    def prepare(
        self, rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase
    ) -> Prepared:
        """Tokenises rows."""

    def collate(self, examples: Sequence[Example], pad_token_id: int) -> Tensors:
        """Pads examples on the right into ``input_ids``, ``attention_mask`` and ``labels``."""

    def per_example_loss(self, logits: torch.Tensor, batch: Tensors) -> torch.Tensor:
        """Loss of each example, shape (batch,), independent of the other examples."""

    def per_example_score(self, logits: torch.Tensor, batch: Tensors) -> torch.Tensor:
        """How right each example is, in [0, 1], shape (batch,), independent of the other examples."""

    def sums(self, logits: torch.Tensor, batch: Tensors) -> dict[str, float]:
        """Additive statistics of a batch."""

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Turns added-up statistics into metrics."""

    @property
    def headline(self) -> str:
        """Name of the metric that people look at first."""


def pad(examples: Sequence[Example], pad_token_id: int) -> Tensors:
    """Right-pads token ids to the longest of the batch.

    Returns:
        ``input_ids`` and ``attention_mask``, both int64 of shape (batch, longest).
    """
    import torch

    longest = max(len(example.input_ids) for example in examples)
    input_ids = torch.full((len(examples), longest), pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros((len(examples), longest), dtype=torch.long)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        input_ids[row, :length] = torch.tensor(example.input_ids, dtype=torch.long)
        attention_mask[row, :length] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}
