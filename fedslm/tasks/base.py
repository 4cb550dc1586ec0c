"""The interface between a task and all other code.

A task prepares rows into examples, collates examples into a padded batch, returns one loss per example
(never a mean over a batch: examples must not be coupled), and turns summed statistics into metrics.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

Tokens = tuple[int, ...]
Tensors = dict[str, "torch.Tensor"]
Sums = Mapping[str, NDArray[np.float64]]
Row = Mapping[str, Any]
MADE_UP = (1, 2, 3, 2, 1)
INPUTS = (  # tensors that a network takes
    "input_ids",
    "attention_mask",
    "decoder_input_ids",
    "logits_to_keep",
)
CHARACTERS = 32  # characters of a text per token wanted: a public bound on the cost of one record


@dataclass(frozen=True)
class Example:
    """One record, tokenised.

    Attributes:
        input_ids: Token ids, at least one.
        target: Class index; -1 if the task has another kind of target.
        owner: The owner of the record, if privacy.unit = "user"; otherwise empty.
        targets: Depends on the task: a tag, a word or a label for each token, the tokens to generate,
            or 0 and 1 for each class.
        rejected: The same prompt with the worse answer (preference).
    """

    input_ids: Tokens
    target: int = -1
    owner: str = ""
    targets: Tokens = ()
    rejected: Example | None = None

    @property
    def length(self) -> int:
        """Length of the longest sequence that the example needs."""
        own = max(len(self.input_ids), len(self.targets))
        return own if self.rejected is None else max(own, self.rejected.length)


@dataclass(frozen=True)
class Prepared:
    """A client's examples.

    Attributes:
        examples: The usable examples.
        kept: Row index of each example. Records without tokens or with an unknown label are skipped;
            whether one is depends only on the record itself.
        truncated: Number of examples that were truncated to the maximum length.
    """

    examples: tuple[Example, ...]
    kept: tuple[int, ...]
    truncated: int = 0

    @classmethod
    def of(cls, made: Iterable[tuple[int, Example, bool]]) -> Prepared:
        """Collects (row index, example, whether it was truncated)."""
        rows = list(made)
        return cls(
            tuple(example for _, example, _ in rows),
            tuple(number for number, _, _ in rows),
            sum(cut for _, _, cut in rows),
        )


class Task(Protocol):
    """A training task."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names; empty if the task has no classes."""

    @property
    def rows_per_example(self) -> int:
        """Number of adjacent batch rows that belong to one example."""

    @property
    def uses_base(self) -> bool:
        """True if a batch needs ``base_logits``: those of the base without its adapter."""

    @property
    def headline(self) -> str:
        """Name of the main metric."""

    def prepare(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> Prepared:
        """Tokenises rows into examples."""

    def made_up(self, length: int = 5) -> Example:
        """Returns an artificial example of ``length`` >= 5 tokens: no user's data."""

    def collate(self, examples: Sequence[Example], pad_token_id: int) -> Tensors:
        """Pads examples on the right into ``input_ids``, ``attention_mask`` and ``labels``."""

    def per_example_loss(self, logits: torch.Tensor, batch: Tensors) -> torch.Tensor:
        """Returns the loss of each example, shape (batch,), independent of the other examples."""

    def per_example_score(self, logits: torch.Tensor, batch: Tensors) -> torch.Tensor:
        """Returns each example's score in [0, 1], shape (batch,), independent of other examples."""

    def statistics(self, logits: torch.Tensor, batch: Tensors) -> Tensors:
        """Returns the additive statistics behind the metrics, each of shape (batch, …)."""

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Turns summed statistics into metrics."""


@dataclass(frozen=True)
class Encoded:
    """One text, tokenised.

    Attributes:
        input_ids: Token ids.
        cut: True if the text was longer and was truncated.
        offsets: Start and end character of each token; (0, 0) for special ones. Empty if unknown.
    """

    input_ids: Tokens
    cut: bool
    offsets: tuple[tuple[int, int], ...] = ()


def tokenise(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int, **options: bool
) -> list[Encoded]:
    """Tokenises texts, each truncated to ``max_length`` tokens.

    Only the first :data:`CHARACTERS` × ``max_length`` characters of a very long text are used.

    Args:
        texts: Any number of texts, including none.
        tokenizer: The base model's tokenizer.
        max_length: Maximum length in tokens, including special ones.
        options: Further tokenizer options, such as ``add_special_tokens=False``.
    """
    if not texts:
        return []
    room = CHARACTERS * max_length
    longer = [len(text) > room for text in texts]
    encoded = tokenizer(
        [text[:room] for text in texts], truncation=True, max_length=max_length, **options
    )
    fast = getattr(encoded, "encodings", None)
    if fast is None:  # a Python tokenizer does not report what it truncated
        return [Encoded(tuple(ids), len(ids) >= max_length) for ids in encoded["input_ids"]]
    return [
        Encoded(tuple(one.ids), bool(one.overflowing) or cut, tuple(map(tuple, one.offsets)))
        for one, cut in zip(fast, longer, strict=True)
    ]


def made_up_tokens(length: int) -> Tokens:
    """Returns ``length`` token ids that every vocabulary has.

    >>> made_up_tokens(7)
    (1, 2, 3, 2, 1, 1, 2)
    """
    return (MADE_UP * -(-length // len(MADE_UP)))[:length]


def pad(sequences: Sequence[Tokens], value: int) -> torch.Tensor:
    """Right-pads sequences to the longest one.

    Returns:
        int64 of shape (sequences, longest).
    """
    import torch

    longest = max(map(len, sequences))
    rows = [(*sequence, *([value] * (longest - len(sequence)))) for sequence in sequences]
    return torch.tensor(rows, dtype=torch.long)


def pad_inputs(sequences: Sequence[Tokens], pad_token_id: int) -> Tensors:
    """Right-pads token ids.

    Returns:
        ``input_ids`` and ``attention_mask``, both int64 of shape (sequences, longest).
    """
    mask = pad([(1,) * len(sequence) for sequence in sequences], 0)
    return {"input_ids": pad(sequences, pad_token_id), "attention_mask": mask}
