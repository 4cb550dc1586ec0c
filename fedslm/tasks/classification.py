"""Sequence classification: one label for each text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedslm.tasks.base import Example, Prepared, Tensors, pad

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Classification:
    """Sequence classification.

    Attributes:
        labels: Class names in the order of the logits.
        text_column: Column with the text.
        label_column: Column with the class name.
        max_length: Longest sequence in tokens.
    """

    labels: tuple[str, ...]
    text_column: str
    label_column: str
    max_length: int

    @property
    def headline(self) -> str:
        """Accuracy."""
        return "accuracy"

    def prepare(
        self, rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase
    ) -> Prepared:
        """Tokenises texts and looks labels up; a record with another label is skipped and counted.

        Skipping depends on the record alone: failing would tell everybody that there is such a record.
        A simulation refuses unknown labels before it starts.
        """
        if not rows:
            return Prepared((), ())
        index = {label: position for position, label in enumerate(self.labels)}
        examples, kept = [], []
        special = tokenizer.num_special_tokens_to_add()
        encoded = tokenizer(
            [str(row[self.text_column]) for row in rows],
            truncation=True,
            max_length=self.max_length,
        )["input_ids"]
        for number, (row, tokens) in enumerate(zip(rows, encoded, strict=True)):
            label = str(row[self.label_column])
            if label in index and len(tokens) > special:
                examples.append(Example(tuple(tokens), index[label]))
                kept.append(number)
        return Prepared(tuple(examples), tuple(kept))

    def collate(self, examples: Sequence[Example], pad_token_id: int) -> Tensors:
        """Pads texts; ``labels`` are class indices of shape (batch,)."""
        import torch

        labels = torch.tensor([example.target for example in examples], dtype=torch.long)
        return {**pad(examples, pad_token_id), "labels": labels}

    def per_example_loss(self, logits: torch.Tensor, batch: Tensors) -> torch.Tensor:
        """Cross-entropy of logits (batch, classes) in float32."""
        import torch.nn.functional as F

        return F.cross_entropy(logits.float(), batch["labels"], reduction="none")

    def per_example_score(self, logits: torch.Tensor, batch: Tensors) -> torch.Tensor:
        """1 where the class is right, else 0."""
        return (logits.argmax(dim=-1) == batch["labels"]).float()

    def sums(self, logits: torch.Tensor, batch: Tensors) -> dict[str, float]:
        """Counts records and hits, and adds losses."""
        return {
            "records": float(len(logits)),
            "correct": float(self.per_example_score(logits, batch).sum()),
            "loss": float(self.per_example_loss(logits, batch).double().sum()),
        }

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Accuracy and mean loss."""
        records = sums["records"]
        return {"accuracy": sums["correct"] / records, "loss": sums["loss"] / records}
