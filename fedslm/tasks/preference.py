"""Preference tuning (DPO): makes the better of two answers to a prompt more likely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fedslm.tasks import tokens
from fedslm.tasks.base import Example, Prepared, Row, Sums, Tensors, made_up_tokens, pad, pad_inputs
from fedslm.tasks.prompts import EncodedPrompt, Prompts

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Preference:
    """Direct preference optimisation against the base without its adapter.

    Each example has two rows in a batch, the preferred answer and the rejected one; its loss depends
    only on these two.

    Attributes:
        prompts: Builds a prompt from a row.
        chosen_column: Column with the preferred answer.
        rejected_column: Column with the other answer.
        beta: Strength of the pull towards the base, > 0.

    References:
        Rafailov et al. 2023, Direct Preference Optimization (arXiv 2305.18290).
    """

    prompts: Prompts
    chosen_column: str
    rejected_column: str
    beta: float

    labels = ()
    rows_per_example = 2
    uses_base = True
    headline = "accuracy"

    def prepare(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> Prepared:
        """Tokenises both answers; skips a record with one missing, equal ones or two prompts."""
        columns = (self.chosen_column, self.rejected_column)
        said = [[self.prompts.said(row, column) for row in rows] for column in columns]
        asked = [_unlearned(each) for each in self.prompts.asked(said[0], tokenizer)]
        better, worse = (
            self.prompts.completions([each.answer for each in side], tokenizer) for side in said
        )
        made = []
        for number, (prompt, good, bad) in enumerate(zip(asked, *said, strict=True)):
            chosen, cut = self.prompts.join(prompt, better[number])
            rejected, cut_too = self.prompts.join(prompt, worse[number])
            there = prompt.ids and good.answer.strip() and bad.answer.strip()
            if there and good.turns == bad.turns and chosen != rejected:
                made.append((number, replace(chosen, rejected=rejected), cut or cut_too))
        return Prepared.of(made)

    def made_up(self, length: int = 5) -> Example:
        """Returns an example with three prompt tokens; the others are either of two answers."""
        ignored, made = (tokens.IGNORED,) * 3, made_up_tokens(length)
        other = (*made[:3], *made[: length - 3])
        worse = Example(other, targets=(*ignored, *other[3:]))
        return Example(made, targets=(*ignored, *made[3:]), rejected=worse)

    def collate(self, examples: Sequence[Example], pad_token_id: int) -> Tensors:
        """Pads; rows are chosen, rejected, chosen, …: shape (2·batch, longest)."""
        rows = [row for example in examples for row in (example, example.rejected or example)]
        inputs = pad_inputs([row.input_ids for row in rows], pad_token_id)
        targets = pad([row.targets for row in rows], tokens.IGNORED)
        return {**inputs, "labels": tokens.following(targets)}

    def per_example_loss(self, logits: torch.Tensor, batch: Tensors) -> torch.Tensor:
        """Returns −log σ(margin), shape (batch,)."""
        import torch.nn.functional as F

        return -F.logsigmoid(self._margins(logits, batch))

    def _margins(self, logits: torch.Tensor, batch: Tensors) -> torch.Tensor:
        """Returns β·(chosen answer's gain over the base − rejected answer's gain), shape (batch,)."""
        gains = _log_likelihoods(logits, batch) - _log_likelihoods(batch["base_logits"], batch)
        pairs = gains.view(-1, 2)
        return self.beta * (pairs[:, 0] - pairs[:, 1])

    def per_example_score(self, logits: torch.Tensor, batch: Tensors) -> torch.Tensor:
        """Returns 1 if the chosen answer gained more, 1/2 if both gained equally, else 0."""
        margins = self._margins(logits, batch)
        return (margins > 0).float() + 0.5 * (margins == 0).float()

    def statistics(self, logits: torch.Tensor, batch: Tensors) -> Tensors:
        """Returns counts of pairs and correct pairs, margins and losses."""
        margins = self._margins(logits, batch)
        return {
            "records": margins.new_ones(len(margins)),
            "correct": self.per_example_score(logits, batch),
            "margin": margins,
            "loss": self.per_example_loss(logits, batch),
        }

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Returns the share of pairs whose chosen answer gained more, mean margin and mean loss."""
        records = float(sums["records"])
        return {
            "accuracy": float(sums["correct"]) / records,
            "margin": float(sums["margin"]) / records,
            "loss": float(sums["loss"]) / records,
        }


def _unlearned(prompt: EncodedPrompt) -> EncodedPrompt:
    """Masks the prompt's earlier answers, which are neither of the two that are compared."""
    return replace(prompt, targets=(tokens.IGNORED,) * len(prompt.ids))


def _log_likelihoods(logits: torch.Tensor, batch: Tensors) -> torch.Tensor:
    """Returns the log-likelihood of each row's completion in nats, shape (rows,)."""
    return -tokens.losses(logits, batch["labels"]).sum(dim=1)
