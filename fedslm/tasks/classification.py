"""Sequence classification: one label per text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedslm.data.missing import name_of
from fedslm.data.values import text_in
from fedslm.tasks.base import (
    Example,
    Prepared,
    Row,
    Sums,
    Tensors,
    made_up_tokens,
    pad_inputs,
    tokenise,
)
from fedslm.tasks.scores import f1, mean_of_present

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
        max_length: Maximum sequence length in tokens.
    """

    labels: tuple[str, ...]
    text_column: str
    label_column: str
    max_length: int

    rows_per_example = 1
    uses_base = False
    headline = "accuracy"

    def prepare(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> Prepared:
        """Tokenises texts and looks labels up; a record with an unknown label is skipped and counted.

        Skipping depends only on the record itself; an error would reveal that such a record exists.
        A simulation refuses unknown labels before it starts.
        """
        index = {label: position for position, label in enumerate(self.labels)}
        special = tokenizer.num_special_tokens_to_add()
        texts = [text_in(row[self.text_column]) for row in rows]
        encoded = tokenise(texts, tokenizer, self.max_length)
        return Prepared.of(
            (number, Example(each.input_ids, index[label]), each.cut)
            for number, (row, each) in enumerate(zip(rows, encoded, strict=True))
            if (label := name_of(row[self.label_column])) in index and len(each.input_ids) > special
        )

    def made_up(self, length: int = 5) -> Example:
        """Returns an example with the first class."""
        return Example(made_up_tokens(length), 0)

    def collate(self, examples: Sequence[Example], pad_token_id: int) -> Tensors:
        """Pads texts; ``labels`` are class indices of shape (batch,)."""
        import torch

        labels = torch.tensor([example.target for example in examples], dtype=torch.long)
        return {**pad_inputs([each.input_ids for each in examples], pad_token_id), "labels": labels}

    def per_example_loss(self, logits: torch.Tensor, batch: Tensors) -> torch.Tensor:
        """Returns the cross-entropy of logits (batch, classes) in float32."""
        import torch.nn.functional as F

        return F.cross_entropy(logits.float(), batch["labels"], reduction="none")

    def per_example_score(self, logits: torch.Tensor, batch: Tensors) -> torch.Tensor:
        """Returns 1 if the class is correct, else 0."""
        return (logits.argmax(dim=-1) == batch["labels"]).float()

    def statistics(self, logits: torch.Tensor, batch: Tensors) -> Tensors:
        """Returns records, hits and losses; and for each class records, guesses and hits."""
        import torch.nn.functional as F

        right = self.per_example_score(logits, batch)
        actual = F.one_hot(batch["labels"], len(self.labels))
        return {
            "records": right.new_ones(len(right)),
            "correct": right,
            "loss": self.per_example_loss(logits, batch),
            "actual": actual,
            "guessed": F.one_hot(logits.argmax(dim=-1), len(self.labels)),
            "right": actual * right.unsqueeze(-1),
        }

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Returns accuracy, macro F1 (over classes that occur) and mean loss."""
        records = float(sums["records"])
        by_class = f1(sums["right"], sums["guessed"], sums["actual"])
        return {
            "accuracy": float(sums["correct"]) / records,
            "f1_macro": mean_of_present(by_class, sums["actual"]),
            "loss": float(sums["loss"]) / records,
        }
