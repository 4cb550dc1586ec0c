"""Distillation targets per position, and one loss for each method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import assert_never

import torch

from fedslm.config import DistillConfig, DistillMethod
from fedslm.distillation import losses
from fedslm.distillation.contexts import Context
from fedslm.distillation.models import LANGUAGE, Student, Teacher
from fedslm.distillation.schedule import confidence_coefficient
from fedslm.errors import ConfigError, Problem

_MOST_NUMBERS = 1 << 24  # float32 values of vocabulary-wide work at once: 64 MiB
ONLY_CLASSES = ("gated-reverse-kl", "log-confidence")
ONLY_LANGUAGE = ("proxy-target", "sequence")


@dataclass(frozen=True)
class Target:
    """Targets for one batch of positions, without gradient.

    Attributes:
        log_probabilities: (positions, vocabulary), float32; None if sampled.
        ids: Sampled tokens, (positions, samples); None if not sampled.
        weights: Their importance weights, of the same shape.
    """

    log_probabilities: torch.Tensor | None = None
    ids: torch.Tensor | None = None
    weights: torch.Tensor | None = None


@dataclass(frozen=True)
class Objective:
    """A distillation method with its settings.

    Attributes:
        method: Any method other than "auto".
        settings: Temperatures, weights and thresholds.
        vocabulary: Number of tokens that both models share; for classification, the number of classes.
        steps: Total number of optimizer steps.
    """

    method: DistillMethod
    settings: DistillConfig
    vocabulary: int
    steps: int

    def target(self, teacher: Teacher, student: Student | None, contexts: Sequence[Context]) -> Target:
        """Computes the targets for these contexts; proxy-target also runs the plain student."""
        examples = [context.teacher for context in contexts]
        tuned = teacher.logits(examples)[:, : self.vocabulary]
        if self.method == "proxy-target":
            if student is None:
                raise ConfigError([_NEEDS_BOTH])
            untuned = teacher.untuned_logits(examples)[:, : self.vocabulary]
            base = student.base_logits([context.student for context in contexts])
            return Target(
                losses.proxy_target(
                    base[:, : self.vocabulary],
                    tuned,
                    untuned,
                    alpha=self.settings.alpha,
                    clip=self.settings.clip,
                )
            )
        return Target(losses.soft_target(tuned, self.temperature))

    @property
    def temperature(self) -> float:
        """Temperature of both models; methods without a temperature use 1."""
        tempered = self.method in ("forward-kl", "reverse-kl", "jsd")
        return self.settings.temperature if tempered else 1.0

    def loss(self, logits: torch.Tensor, target: Target, step: int) -> torch.Tensor:
        """Returns the sum of the losses over positions, float32, with gradient.

        Args:
            logits: The student's logits, (positions, student vocabulary).
            target: From :meth:`target`.
            step: Number of this optimizer step, counted from 0.
        """
        logits = logits[:, : self.vocabulary]
        if target.log_probabilities is None:
            if target.ids is None or target.weights is None:
                raise ConfigError([_NEEDS_BOTH])
            sparse = (target.ids, target.weights)
            return losses.in_pieces(losses.sparse_forward_kl, logits, *sparse, most=_MOST_NUMBERS).sum()
        wanted = target.log_probabilities.to(logits.device)
        if self.method == "log-confidence":  # its class shares are those of the whole batch
            return self._log_confidence(logits, wanted, step).sum()
        return losses.in_pieces(self._per_position(), logits, wanted, most=_MOST_NUMBERS).sum()

    def _per_position(self) -> Callable[..., torch.Tensor]:
        """Returns the loss function of a position."""
        settings, temperature = self.settings, self.temperature
        match self.method:
            case "forward-kl" | "proxy-target":
                return lambda logits, target: losses.forward_kl(logits, target, temperature)
            case "reverse-kl":
                return lambda logits, target: losses.reverse_kl(logits, target, temperature)
            case "jsd":
                return lambda logits, target: losses.jsd(logits, target, settings.beta, temperature)
            case "gated-reverse-kl":
                return self._gated
            case "log-confidence" | "sequence" | "labels" | "auto":
                raise ConfigError([Problem("distill.method", f"value {self.method!r} has no target")])
            case _:
                assert_never(self.method)

    def _gated(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Reverse KL where the teacher is confident, 0 elsewhere."""
        gate = losses.confidence_gate(target, self.settings.confidence)
        return gate * losses.reverse_kl(logits, losses.softened(target))

    def _log_confidence(self, logits: torch.Tensor, target: torch.Tensor, step: int) -> torch.Tensor:
        """Mixes the teacher's soft labels with the student's hardened ones, whose weight increases."""
        most = self.settings.self_confidence
        coefficient = confidence_coefficient(step, self.steps, most)
        return losses.log_confidence(logits.float(), target, coefficient, target.exp().mean(dim=0))


_NEEDS_BOTH = Problem(
    "distill.cached_samples",
    'needs method="forward-kl": the other targets of language are not unbiased when sampled, or need '
    "both models",
)


def resolved_method(settings: DistillConfig, task_name: str, vocabulary: int | None) -> DistillMethod:
    """Returns the method that will run.

    Args:
        settings: The requested settings.
        task_name: The run's task.
        vocabulary: Number of tokens that both models share; None if their tokenizers differ.

    Raises:
        ConfigError: The method does not support the task or the tokenizers; names one that does.
    """
    method, language = settings.method, task_name in LANGUAGE
    if method == "auto":
        if not language:
            return "gated-reverse-kl"
        return "sequence" if vocabulary is None else "proxy-target"
    if language and method in ONLY_CLASSES:
        message = f"value {method!r} is for classes; for {task_name} use proxy-target or forward-kl"
        raise ConfigError([Problem("distill.method", message)])
    if not language and method in ONLY_LANGUAGE:
        message = f"value {method!r} is for language; for {task_name} use gated-reverse-kl"
        raise ConfigError([Problem("distill.method", message)])
    if language and vocabulary is None and method not in ("sequence", "labels"):
        message = (
            f"value {method!r} compares token by token, but student and teacher have different "
            f'tokenizers; use method="sequence"'
        )
        raise ConfigError([Problem("distill.method", message)])
    if language and settings.cached_samples and method not in ("forward-kl", "sequence", "labels"):
        raise ConfigError([_NEEDS_BOTH])
    return method
