"""Token classification: one tag per word, such as named entities in BIO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedslm.data.missing import name_of
from fedslm.errors import ModelError
from fedslm.tasks import tokens
from fedslm.tasks.base import (
    CHARACTERS,
    Example,
    Prepared,
    Row,
    Sums,
    Tensors,
    made_up_tokens,
    pad,
    pad_inputs,
)
from fedslm.tasks.scores import f1, ratio

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

Entity = tuple[str, int, int]


@dataclass(frozen=True)
class TokenClassification:
    """Token classification; ``targets`` of an example are the tags on each word's first piece.

    Attributes:
        labels: Tags in the order of the logits, such as O, B-Disease, I-Disease.
        text_column: Column with the words, a list.
        label_column: Column with the tags, a list of the same length.
        max_length: Maximum length in word pieces; words beyond it are neither learned nor scored.
    """

    labels: tuple[str, ...]
    text_column: str
    label_column: str
    max_length: int

    rows_per_example = 1
    uses_base = False
    headline = "f1"

    def prepare(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> Prepared:
        """Splits words into pieces; skips a record whose words and tags do not match.

        Raises:
            ModelError: The tokenizer does not report which word a piece belongs to.
        """
        if not tokenizer.is_fast:
            raise ModelError("token-classification needs a fast tokenizer (tokenizer.json)")
        index = {label: position for position, label in enumerate(self.labels)}
        fitting = [(number, row) for number, row in enumerate(rows) if self._fits(row, index)]
        if not fitting:
            return Prepared((), ())
        room = CHARACTERS * self.max_length
        encoded = tokenizer(
            [[word[:room] for word in row[self.text_column][:room]] for _, row in fitting],
            is_split_into_words=True,
            truncation=True,
            max_length=self.max_length,
        ).encodings
        made = []
        for (number, row), each in zip(fitting, encoded, strict=True):
            tags = [index[name_of(tag)] for tag in row[self.label_column]]
            targets = _on_first_pieces(each.word_ids, tags)
            if any(target != tokens.IGNORED for target in targets):
                example = Example(tuple(each.ids), targets=targets)
                made.append((number, example, bool(each.overflowing)))
        return Prepared.of(made)

    def _fits(self, row: Row, index: dict[str, int]) -> bool:
        """True if a row has as many known tags as words."""
        words, tags = row[self.text_column], row[self.label_column]
        lists = isinstance(words, list | tuple) and isinstance(tags, list | tuple)
        return (
            lists
            and len(words) == len(tags) > 0
            and all(isinstance(word, str) for word in words)
            and all(name_of(tag) in index for tag in tags)
        )

    def made_up(self, length: int = 5) -> Example:
        """Returns an example with the first tag everywhere."""
        return Example(made_up_tokens(length), targets=(0,) * length)

    def collate(self, examples: Sequence[Example], pad_token_id: int) -> Tensors:
        """Pads sentences; ``labels`` are tag indices of shape (batch, longest), others are ignored."""
        inputs = pad_inputs([example.input_ids for example in examples], pad_token_id)
        return {**inputs, "labels": pad([each.targets for each in examples], tokens.IGNORED)}

    def per_example_loss(self, logits: torch.Tensor, batch: Tensors) -> torch.Tensor:
        """Returns the mean loss over each sentence's own words."""
        return tokens.own_mean(tokens.losses(logits, batch["labels"]), batch["labels"])

    def per_example_score(self, logits: torch.Tensor, batch: Tensors) -> torch.Tensor:
        """Returns the share of each sentence's tags that are correct."""
        return tokens.own_mean(tokens.hits(logits, batch["labels"]), batch["labels"])

    def statistics(self, logits: torch.Tensor, batch: Tensors) -> Tensors:
        """Returns counts of words, correct tags and losses; and of guessed, true and found entities."""
        import torch

        labels = batch["labels"]
        counts = [self._entities(*pair) for pair in zip(logits.argmax(dim=-1), labels, strict=True)]
        guessed, actual, right = torch.tensor(counts, dtype=torch.float32).T
        return {
            "tokens": (labels != tokens.IGNORED).sum(dim=1),
            "correct": tokens.hits(logits, labels).sum(dim=1),
            "loss": tokens.losses(logits, labels).sum(dim=1),
            "guessed": guessed,
            "actual": actual,
            "right": right,
        }

    def _entities(self, guesses: torch.Tensor, labels: torch.Tensor) -> tuple[int, int, int]:
        """Counts the guessed, true and correctly found entities of one sentence."""
        at = labels != tokens.IGNORED
        guessed = entities([self.labels[number] for number in guesses[at].tolist()])
        actual = entities([self.labels[number] for number in labels[at].tolist()])
        return len(guessed), len(actual), len(guessed & actual)

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Returns entity F1, precision and recall (micro), share of correct tags, and loss per word."""
        words = float(sums["tokens"])
        return {
            "f1": float(f1(sums["right"], sums["guessed"], sums["actual"])),
            "precision": float(ratio(sums["right"], sums["guessed"])),
            "recall": float(ratio(sums["right"], sums["actual"])),
            "tag_accuracy": float(sums["correct"]) / words,
            "loss": float(sums["loss"]) / words,
        }


def entities(tags: Sequence[str]) -> set[Entity]:
    """Returns each entity's kind, first and last word, as CoNLL's scorer does, also for invalid tags.

    Tags are O, B (begins), I (inside), E (ends) and S (one word), each with its kind.

    References:
        Tjong Kim Sang and De Meulder 2003, Introduction to the CoNLL-2003 shared task; seqeval's
        default mode.

    >>> sorted(entities(["B-Drug", "I-Drug", "O", "B-Pain"]))
    [('Drug', 0, 1), ('Pain', 3, 3)]
    """
    found: set[Entity] = set()
    begin, before, kind_before = 0, "O", ""
    for at, tag in enumerate([*tags, "O"]):
        now, kind = tag[0], tag[1:].split("-", 1)[-1] or "_"
        other = kind != kind_before
        if before in "ES" or (before in "BI" and now in "BSO") or (before not in "O." and other):
            found.add((kind_before, begin, at - 1))
        if now in "BS" or (before in "ESO" and now in "EI") or (now not in "O." and other):
            begin = at
        before, kind_before = now, kind
    return found


def _on_first_pieces(words: Sequence[int | None], tags: Sequence[int]) -> tuple[int, ...]:
    """Puts the tag of each word on its first piece; other pieces and special tokens are ignored."""
    targets, before = [], None
    for word in words:
        first = word is not None and word != before
        targets.append(tags[word] if first and word is not None else tokens.IGNORED)
        before = word
    return tuple(targets)
