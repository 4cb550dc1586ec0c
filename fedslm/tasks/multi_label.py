"""Multi-label classification: any number of labels per text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedslm.data.columns import names_in
from fedslm.data.values import text_in
from fedslm.tasks.base import (
    Example,
    Prepared,
    Row,
    Sums,
    Tensors,
    Tokens,
    made_up_tokens,
    pad_inputs,
    tokenise,
)
from fedslm.tasks.scores import f1, mean_of_present

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class MultiLabel:
    """Multi-label classification; ``targets`` of an example are 0 or 1 for each class.

    Attributes:
        labels: Class names in the order of the logits.
        text_column: Column with the text.
        label_column: Column with the class names: a list, or a text with commas between the names.
        max_length: Maximum sequence length in tokens.
    """

    labels: tuple[str, ...]
    text_column: str
    label_column: str
    max_length: int

    rows_per_example = 1
    uses_base = False
    headline = "f1_micro"

    def prepare(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> Prepared:
        """Tokenises texts; skips a record with an unknown label, which depends only on the record."""
        special = tokenizer.num_special_tokens_to_add()
        texts = [text_in(row[self.text_column]) for row in rows]
        encoded = tokenise(texts, tokenizer, self.max_length)
        return Prepared.of(
            (number, Example(each.input_ids, targets=targets), each.cut)
            for number, (row, each) in enumerate(zip(rows, encoded, strict=True))
            if (targets := self._targets(row)) and len(each.input_ids) > special
        )

    def _targets(self, row: Row) -> Tokens:
        """Returns 0 or 1 for each class; empty if a name is unknown."""
        named = set(names_in(row[self.label_column]))
        return () if named - set(self.labels) else tuple(int(each in named) for each in self.labels)

    def made_up(self, length: int = 5) -> Example:
        """Returns an example without any class."""
        return Example(made_up_tokens(length), targets=(0,) * len(self.labels))

    def collate(self, examples: Sequence[Example], pad_token_id: int) -> Tensors:
        """Pads texts; ``labels`` are 0 or 1, shape (batch, classes)."""
        import torch

        labels = torch.tensor([example.targets for example in examples], dtype=torch.long)
        return {**pad_inputs([each.input_ids for each in examples], pad_token_id), "labels": labels}

    def per_example_loss(self, logits: torch.Tensor, batch: Tensors) -> torch.Tensor:
        """Returns the binary cross-entropy in float32, the mean over an example's classes."""
        import torch.nn.functional as F

        labels = batch["labels"].float()
        losses = F.binary_cross_entropy_with_logits(logits.float(), labels, reduction="none")
        return losses.mean(dim=1)

    def per_example_score(self, logits: torch.Tensor, batch: Tensors) -> torch.Tensor:
        """Returns the share of each example's classes that are correct."""
        return ((logits > 0) == (batch["labels"] > 0)).float().mean(dim=1)

    def statistics(self, logits: torch.Tensor, batch: Tensors) -> Tensors:
        """Returns records, exact matches and losses; and for each class records, guesses and hits."""
        guessed, actual = logits > 0, batch["labels"] > 0
        exact = (guessed == actual).all(dim=1)
        return {
            "records": exact.new_ones(len(exact)).float(),
            "exact": exact.float(),
            "loss": self.per_example_loss(logits, batch),
            "actual": actual.float(),
            "guessed": guessed.float(),
            "right": (guessed & actual).float(),
        }

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Returns micro and macro F1, the share of records with all classes correct, and mean loss."""
        counts = (sums["right"], sums["guessed"], sums["actual"])
        records = float(sums["records"])
        return {
            "f1_micro": float(f1(*(count.sum() for count in counts))),
            "f1_macro": mean_of_present(f1(*counts), sums["actual"]),
            "exact_match": float(sums["exact"]) / records,
            "loss": float(sums["loss"]) / records,
        }
