"""Ways to break the privacy code, each as small as a mistake would be: the self-test must see them all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from fedslm.errors import LedgerError
from fedslm.privacy import accounting, chain
from fedslm.privacy.encoding import grid_of
from fedslm.privacy.gaussian import GaussianNoise
from fedslm.privacy.plan import ExamplePlan, UserPlan
from fedslm.privacy.randomness import SecureStream
from fedslm.training import metric, noisy_optimizer, steps
from fedslm.training.shapes import Part, Pass
from fedslm.verification.harness import AdversarialTask

Patch = pytest.MonkeyPatch

DRAW, BERNOULLI = GaussianNoise.draw, SecureStream.bernoulli
CLIP, CALL = noisy_optimizer.clip_, steps.PrivateStep.__call__
LOSS = AdversarialTask.per_example_loss
BATCHES = {plan: plan.batches for plan in (ExamplePlan, UserPlan)}
PLD = accounting._pld


def too_little_noise(patch: Patch) -> None:
    """Two thirds of the planned standard deviation."""
    patch.setattr(GaussianNoise, "draw", lambda self, shape, std: DRAW(self, shape, std * 2 / 3))


def laplace_noise(patch: Patch) -> None:
    """Another distribution with the same standard deviation."""

    def draw(self: GaussianNoise, shape: tuple[int, ...], stddev: float) -> np.ndarray:
        uniform = self._stream.uniform(int(np.prod(shape))) - 0.5
        values = -np.sign(uniform) * np.log1p(-2 * np.abs(uniform))
        return (values * stddev / np.sqrt(2)).reshape(shape)

    patch.setattr(GaussianNoise, "draw", draw)


def noise_of_torch(patch: Patch) -> None:
    """Noise from torch's global generator."""
    patch.setattr(
        GaussianNoise, "draw", lambda self, shape, std: torch.randn(shape).double().numpy() * std
    )


def noise_of_numpy(patch: Patch) -> None:
    """Noise from NumPy's global generator."""
    patch.setattr(GaussianNoise, "draw", lambda self, shape, std: np.random.normal(0, std, shape))


def noise_of_opacus(patch: Patch) -> None:
    """Opacus' own noise, from torch's global generator, in place of ours."""
    patch.setattr(noisy_optimizer, "with_noise", lambda optimizer: optimizer)


def noise_repeated_in_each_step(patch: Patch) -> None:
    """The noise of a round's first step, in all its steps."""
    original = noisy_optimizer.with_noise

    def with_noise(optimizer: Any) -> Any:
        class Repeating(original(optimizer)):  # type: ignore[misc]
            def add_noise(self) -> None:
                if "kept" not in vars(self):
                    super().add_noise()
                    self.kept = [p.grad - p.summed_grad for p in self.params]
                for p, noise in zip(self.params, self.kept, strict=True):
                    p.grad = (p.summed_grad + noise).to(p)

        return Repeating

    patch.setattr(noisy_optimizer, "with_noise", with_noise)


def noise_shared_by_tensors(patch: Patch) -> None:
    """One noise for all tensors of a shape."""

    def draw(self: GaussianNoise, shape: tuple[int, ...], stddev: float) -> np.ndarray:
        return self.__dict__.setdefault("kept", {}).setdefault(shape, DRAW(self, shape, stddev))

    patch.setattr(GaussianNoise, "draw", draw)


def sampler_of(plan: type, change: Callable[[list], list]) -> Callable[[Patch], None]:
    """Changes every sample of a plan."""
    original = BATCHES[plan]

    def batches(self: Any, owners: Sequence[str], seeded: Any) -> Iterator[list]:
        yield from map(change, original(self, owners, seeded))

    return lambda patch: patch.setattr(plan, "batches", batches)


def cut_at(size: int) -> Callable[[list], list]:
    """Samples of at most a size."""
    return lambda sample: sample[:size]


def fixed_size(plan: type) -> Callable[[Patch], None]:
    """As many units in every sample."""

    def mutate(patch: Patch) -> None:
        def bernoulli(self: SecureStream, count: int, rate: float) -> np.ndarray:
            chosen = np.zeros(count, dtype=bool)
            chosen[self.subset(count, round(count * rate))] = True
            return chosen

        def batches(self: Any, owners: Sequence[str], seeded: Any) -> Iterator[list]:
            with pytest.MonkeyPatch.context() as inner:
                inner.setattr(SecureStream, "bernoulli", bernoulli)
                yield from list(BATCHES[plan](self, owners, seeded))

        patch.setattr(plan, "batches", batches)

    return mutate


def rate_times(factor: float) -> Callable[[Patch], None]:
    """Another rate."""

    def mutate(patch: Patch) -> None:
        patch.setattr(
            SecureStream, "bernoulli", lambda self, count, rate: BERNOULLI(self, count, rate * factor)
        )

    return mutate


def half_are_never_sampled(patch: Patch) -> None:
    """Every second unit is never in a sample, the others at twice the rate."""

    def bernoulli(self: SecureStream, count: int, rate: float) -> np.ndarray:
        chosen = BERNOULLI(self, count, 2 * rate)
        chosen[::2] = False
        return chosen

    patch.setattr(SecureStream, "bernoulli", bernoulli)


def seeded_sampler(patch: Patch) -> None:
    """Samples from NumPy's global generator."""
    patch.setattr(SecureStream, "bernoulli", lambda self, count, rate: np.random.random(count) < rate)


def no_clipping(patch: Patch) -> None:
    """Gradients are added up as they are."""
    patch.setattr(
        noisy_optimizer, "clip_", lambda units, clip, bits: units.div_(grid_of(clip, bits)).round_()
    )


def clipping_by_tensor(patch: Patch) -> None:
    """Each part of a gradient is clipped by itself, so that all together are longer than the clip norm."""
    patch.setattr(
        noisy_optimizer,
        "clip_",
        lambda units, clip_norm, bits: torch.cat(
            [CLIP(part.clone(), clip_norm, bits) for part in units.chunk(8, 1)], 1
        ),
    )


def clipping_by_record(patch: Patch) -> None:
    """A patient's records are clipped one by one."""
    whole = steps.PrivateStep._sums

    def sums(self: steps.PrivateStep, part: Part, repeated: Pass | None) -> torch.Tensor:
        rows = [self.rows(each).clone() for each in part.passes]
        return torch.cat(rows) if rows else whole(self, part, repeated)

    patch.setattr(steps.PrivateStep, "_sums", sums)


def loss_is_a_mean(patch: Patch) -> None:
    """Each loss is divided by the number of records in the batch."""

    def loss(self: Any, logits: torch.Tensor, batch: Any) -> torch.Tensor:
        return LOSS(self, logits, batch) / len(logits)

    patch.setattr(AdversarialTask, "per_example_loss", loss)


def loss_is_weighted(patch: Patch) -> None:
    """Losses are weighted by the class frequencies of the batch."""

    def loss(self: Any, logits: torch.Tensor, batch: Any) -> torch.Tensor:
        losses, labels = LOSS(self, logits, batch), batch["labels"]
        return losses / (labels[:, None] == labels[None, :]).float().mean(dim=1)

    patch.setattr(AdversarialTask, "per_example_loss", loss)


def infinities_stay(patch: Patch) -> None:
    """Gradients that are not finite are not zeroed."""
    patch.setattr(steps, "zero_non_finite", lambda rows: 0)


def failures_stop(patch: Patch) -> None:
    """A record that cannot be computed stops the batch."""

    def gradients(self: Any, each: Any) -> Any:
        raise ValueError("a record cannot be computed")

    patch.setattr(steps.PrivateStep, "_one_by_one", gradients)


def empty_batches_are_skipped(patch: Patch) -> None:
    """No records, no step."""
    patch.setattr(
        steps.PrivateStep, "__call__", lambda self, units: CALL(self, units) if units else None
    )


def empty_batches_have_no_noise(patch: Patch) -> None:
    """No records, no noise."""

    def call(self: Any, units: Any) -> None:
        if not units:
            self.optimizer.noise_multiplier = 1e-12
        CALL(self, units)

    patch.setattr(steps.PrivateStep, "__call__", call)


def ledger_is_not_checked(patch: Patch) -> None:
    """Neither signatures nor links: whatever can be parsed is taken."""
    chain._parse.cache_clear()
    patch.setattr(chain, "is_signed", lambda *arguments: True)

    def entries(path: Any, lines: list[bytes], key: Any) -> Iterator[Any]:
        for line in lines:
            try:
                yield chain._parse(line, chain.public_hex(key))
            except ValueError as error:
                raise LedgerError("no line of a ledger") from error

    patch.setattr(chain, "_entries", entries)


def halved(patch: Patch) -> None:
    """The accountant of record says half of epsilon."""
    patch.setattr(accounting, "_pld", lambda grouped, delta: PLD(grouped, delta) / 2)
    accounting._cross_checked.cache_clear()


def halved_without_cross_check(patch: Patch) -> None:
    """What the ledger asks says half of epsilon."""
    patch.setattr(accounting, "epsilon", lambda e, d: PLD(accounting._grouped(e, d), d) / 2)


def no_limit(patch: Patch) -> None:
    """The ledger takes everything."""
    patch.setattr("fedslm.privacy.ledger._check_limits", lambda *arguments: None)


def metric_by_record(patch: Patch) -> None:
    """The metric's unit is the record in every plan."""
    patch.setattr(UserPlan, "unit", "record")


def metric_without_sensitivity(patch: Patch) -> None:
    """The metric's noise is for one number, not for two."""
    patch.setattr(metric, "METRIC_SENSITIVITY", 1.0)
