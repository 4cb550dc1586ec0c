"""From what is asked to what will run: the sampler, the clip, the noise and the charge are one object.

Two plans stand behind :class:`Plan`: :class:`ExamplePlan` (DP-SGD at the client, one record is the
unit) and :class:`NoPrivacy`. A client's loop takes what the plan gives and never asks which it is.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, assert_never

import numpy as np
from numpy.typing import NDArray

from fedslm.config import PrivacyConfig, TrainingConfig
from fedslm.errors import PrivacyError
from fedslm.privacy import accounting
from fedslm.records import Event
from fedslm.rng import operating_system_seed

Batch = NDArray[np.int64]


class Plan(Protocol):
    """What one client does in one round, and what it costs."""

    @property
    def steps_per_round(self) -> int:
        """Optimizer steps in a round."""

    @property
    def round_event(self) -> Event | None:
        """The charge of one round; None if nothing is promised."""

    def batches(self, num_records: int, seeded: np.random.Generator) -> Iterator[Batch]:
        """Yields the record indices of each step."""

    def to_json(self) -> str:
        """Serialises the plan for :func:`from_json`."""


@dataclass(frozen=True)
class ExamplePlan:
    """DP-SGD with one record as the unit.

    Formal guarantees:
        * Zero-out (add-or-remove) adjacency of one record of one client. Each step releases the sum
          of per-record gradients, each clipped to ``clip_norm``, plus Gaussian noise of standard
          deviation ``noise_multiplier * clip_norm`` on every coordinate, over a Poisson sample drawn
          at ``sample_rate`` from operating-system entropy, divided by ``normaliser``.
        * ``sample_rate`` and ``normaliser`` are public constants: neither depends on the client's
          number of records.
        * An empty sample still releases noise and is charged.
        * ``rounds`` rounds cost at most ``epsilon`` at ``delta`` for every client, against the
          server, the other clients and everybody downstream.

    Attributes:
        epsilon: Budget of each client over the whole run, > 0.
        delta: In (0, 1).
        clip_norm: Largest L2 norm of one record's gradient, > 0.
        noise_multiplier: Noise standard deviation / clip norm, > 0.
        sample_rate: In (0, 1].
        normaliser: What the noisy sum is divided by (records), >= 1.
        steps_per_round: Noisy steps in a round, >= 1.

    References:
        Abadi et al. 2016 (arXiv 1607.00133).
    """

    epsilon: float
    delta: float
    clip_norm: float
    noise_multiplier: float
    sample_rate: float
    normaliser: int
    steps_per_round: int

    def __post_init__(self) -> None:
        bounds = {
            "epsilon": 0 < self.epsilon < math.inf,
            "delta": 0 < self.delta < 1,
            "clip_norm": 0 < self.clip_norm < math.inf,
            "noise_multiplier": 0 < self.noise_multiplier < math.inf,
            "sample_rate": 0 < self.sample_rate <= 1,
            "normaliser": self.normaliser >= 1,
            "steps_per_round": self.steps_per_round >= 1,
        }
        for name, holds in bounds.items():
            if not holds:
                raise PrivacyError(f"{name}={getattr(self, name)} is out of range for a private plan")

    @property
    def round_event(self) -> Event:
        """The charge of one round."""
        return Event(self.sample_rate, self.noise_multiplier, self.steps_per_round)

    def batches(self, num_records: int, seeded: np.random.Generator) -> Iterator[Batch]:
        """Yields Poisson samples; ``seeded`` is ignored, since whoever knows it must not know them.

        Args:
            num_records: The client's records, >= 0.
            seeded: Not used.
        """
        generator = np.random.default_rng(operating_system_seed(128))
        for _ in range(self.steps_per_round):
            yield np.flatnonzero(generator.random(num_records) < self.sample_rate)

    def to_json(self) -> str:
        """Serialises the plan."""
        return json.dumps({"unit": "record", **dataclasses.asdict(self)})


@dataclass(frozen=True)
class NoPrivacy:
    """Plain local training; nothing is promised (epsilon is infinite).

    Attributes:
        batch_size: Records in a step, >= 1.
        steps_per_round: Steps in a round, >= 1.
    """

    batch_size: int
    steps_per_round: int

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.steps_per_round < 1:
            raise PrivacyError(
                f"batch_size={self.batch_size} and steps_per_round={self.steps_per_round} must be >= 1"
            )

    @property
    def round_event(self) -> None:
        """Nothing is charged, since nothing is promised."""
        return None

    def batches(self, num_records: int, seeded: np.random.Generator) -> Iterator[Batch]:
        """Yields shuffled batches, epoch after epoch; the last of an epoch is filled from the next.

        >>> plan = NoPrivacy(batch_size=2, steps_per_round=2)
        >>> [len(batch) for batch in plan.batches(3, np.random.default_rng(0))]
        [2, 2]
        """
        size = min(self.batch_size, num_records)
        pending = np.empty(0, dtype=np.int64)
        for _ in range(self.steps_per_round):
            if len(pending) < size:
                pending = np.concatenate([pending, seeded.permutation(num_records)])
            yield pending[:size]
            pending = pending[size:]

    def to_json(self) -> str:
        """Serialises the plan."""
        return json.dumps({"unit": "none", **dataclasses.asdict(self)})


def calibrated(privacy: PrivacyConfig, training: TrainingConfig, rounds: int) -> Plan:
    """Turns what is asked into what will run, for the worst case: a client joins every round.

    Args:
        privacy: What is asked.
        training: Steps and batch size.
        rounds: Rounds of the run.

    Returns:
        The plan that every client follows.

    Raises:
        PrivacyError: A value is missing or out of reach, or a given noise multiplier would exceed
            epsilon.

    References:
        The accountant is :mod:`fedslm.privacy.accounting`.
    """
    match privacy.unit:
        case "none":
            return NoPrivacy(training.batch_size, training.local_steps)
        case "record":
            return _example_plan(privacy, training, rounds)
        case _:
            assert_never(privacy.unit)


def from_json(text: str) -> ExamplePlan | NoPrivacy:
    """Reads what :meth:`Plan.to_json` wrote.

    Raises:
        PrivacyError: The text is not a plan, or a value is out of range.

    >>> from_json(NoPrivacy(4, 2).to_json())
    NoPrivacy(batch_size=4, steps_per_round=2)
    """
    try:
        values = json.loads(text)
        unit = values.pop("unit")
        if unit == "record":
            return ExamplePlan(**values)
        if unit == "none":
            return NoPrivacy(**values)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise PrivacyError(f"the plan cannot be read: {error}") from error
    raise PrivacyError(f"the plan names an unknown unit {unit!r}")


def _example_plan(privacy: PrivacyConfig, training: TrainingConfig, rounds: int) -> ExamplePlan:
    """Calibrates DP-SGD to the budget over all steps that a client can take."""
    epsilon, delta = privacy.epsilon, privacy.delta
    clip_norm, sample_rate = privacy.clip_norm, privacy.sample_rate
    if epsilon is None or delta is None or clip_norm is None or sample_rate is None:
        raise PrivacyError("privacy needs epsilon, delta, clip_norm and sample_rate; none is assumed")
    steps = rounds * training.local_steps
    noise = privacy.noise_multiplier
    if noise is None:
        noise = accounting.calibrate(epsilon, delta, sample_rate, steps)
    spent = accounting.epsilon([Event(sample_rate, noise, steps)], delta)
    if spent > epsilon:
        raise PrivacyError(
            f"privacy.noise_multiplier={noise} costs epsilon={spent:.3f} over {steps} steps, more "
            f"than privacy.epsilon={epsilon}; raise either, or leave noise_multiplier out"
        )
    return ExamplePlan(
        epsilon=epsilon,
        delta=delta,
        clip_norm=clip_norm,
        noise_multiplier=noise,
        sample_rate=sample_rate,
        normaliser=training.batch_size,
        steps_per_round=training.local_steps,
    )
