"""From the requested privacy to a plan: sampler, clipping, noise and charge are one object.

A :class:`Plan` is an :class:`ExamplePlan` or a :class:`UserPlan` (DP-SGD at the client; the unit is
one record, or all records of one user), a :class:`ClientPlan` (the unit is all that a client has), or
:class:`NoPrivacy`. A client's training loop works with any of them and does not distinguish between
them.
"""

from __future__ import annotations

import dataclasses
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from fedslm.errors import OutOfRange, PrivacyError
from fedslm.privacy import accounting
from fedslm.privacy.agreement import Accounts
from fedslm.privacy.lines import stored_unit
from fedslm.privacy.randomness import SecureStream
from fedslm.privacy.shares import NoiseShares
from fedslm.records import LARGEST_DELTA, Event, is_count, is_number, within

Records = NDArray[np.int64]
Batch = list[Records]  # one array of record indices for each unit in the sample
Passes = Literal["shared", "fixed", "isolated"]
WEAKEST_FIRST: tuple[Passes, ...] = ("shared", "fixed", "isolated")
MOST_RECORDS_PER_UNIT = 2**11  # the sum of so many records is exact: fedslm.training.sums
METRIC_SENSITIVITY = math.sqrt(2.0)  # a unit moves (sum of scores, number of units) by at most (1, 1)
ONE_STEP = "how far one unit moves the sum of several steps has no simple bound"
"""Why clients that share the noise take one step a round."""
_LONGEST = 4096  # longest plan, in characters
_LEAST_CLIP_NORM = 1e-6  # far below, an update is lost to float32 rounding


class Plan(Protocol):
    """One client's work in one round, and its cost."""

    @property
    def steps_per_round(self) -> int:
        """Optimizer steps in a round."""

    @property
    def round_events(self) -> tuple[Event, ...]:
        """The charges of one round; none without a privacy guarantee."""

    def batches(self, owners: Sequence[str], seeded: np.random.Generator) -> Iterator[Batch]:
        """Yields the units of each step, each as the indices of its records."""

    def to_json(self) -> str:
        """Serialises the plan for :func:`from_json`."""


@dataclass(frozen=True)
class PrivatePlan(ABC):
    """DP-SGD at the client.

    Formal guarantees:
        * Add-or-remove adjacency: two data sets of one client are neighbours if one of them has one
          unit more. Each step releases the sum of per-unit gradients, each clipped to ``clip_norm``,
          plus Gaussian noise of standard deviation ``noise_multiplier * clip_norm`` on every
          coordinate, over a Poisson sample of units drawn at ``sample_rate`` from secure randomness,
          divided by ``normaliser``.
        * ``sample_rate`` and ``normaliser`` are constants that the guarantee takes as public. Whoever
          chooses them from private data reveals that choice, which epsilon does not cover: a
          simulation that counts the size class of its clients (:mod:`fedslm.recipes.facts`) says so.
        * An empty sample still releases noise and is charged.
        * A batch is never cut to a maximum size: that would cost more than the accountant counts.
        * ``rounds`` rounds cost at most ``epsilon`` at ``delta`` for every client, against the server,
          the other clients and everybody downstream; :meth:`verify` checks it.
        * With ``shares`` a client releases only its part of a sum over clients: the exact sum of its
          units' clipped gradients, each a whole vector of at most C / γ steps of the grid, plus a share
          of discrete Gaussian noise (:mod:`fedslm.privacy.shares`). What is said above then holds for
          the sum, for one step a round, and if ``shares.honest_nodes`` clients, this one included, add
          their share and keep it to themselves.

    Attributes:
        epsilon: Budget of each client over the whole run, > 0.
        delta: In (0, 0.1].
        clip_norm: Largest L2 norm of one unit's gradient, >= 1e-6.
        noise_multiplier: Noise standard deviation / clip norm, > 0.
        sample_rate: Probability in (0, 1] with which a unit joins a step.
        normaliser: Divisor of the noisy sum (units), >= 1.
        steps_per_round: Noisy steps in a round, >= 1.
        rounds: Rounds that the budget pays for, >= 1.
        metric_noise_multiplier: Noise of the optional metric of each round; None: no metric is sent.
        passes: Which units share a pass. "isolated": none, so a unit's gradient is a function of its
            own records to the last bit. "fixed": records share passes of public shapes; the same holds
            if the bits of a row depend only on the row, which each node tests for its machine.
            "shared": any, padded to the longest; it holds up to rounding, which a crafted adapter can
            amplify.
        shares: How clients share the noise; None: each adds all of it.

    References:
        Abadi et al. 2016 (arXiv 1607.00133).
    """

    unit: ClassVar[str]
    shares_one_step: ClassVar[bool] = True

    epsilon: float
    delta: float
    clip_norm: float
    noise_multiplier: float
    sample_rate: float
    normaliser: int
    steps_per_round: int
    rounds: int = 1
    metric_noise_multiplier: float | None = None
    passes: Passes = "fixed"
    shares: NoiseShares | None = None

    def __post_init__(self) -> None:
        metric = self.metric_noise_multiplier
        bounds = {
            "epsilon": is_number(self.epsilon) and self.epsilon > 0,
            "delta": is_number(self.delta) and 0 < self.delta <= LARGEST_DELTA,
            "clip_norm": is_number(self.clip_norm) and self.clip_norm >= _LEAST_CLIP_NORM,
            "noise_multiplier": is_number(self.noise_multiplier) and self.noise_multiplier > 0,
            "sample_rate": is_number(self.sample_rate) and 0 < self.sample_rate <= 1,
            "normaliser": is_count(self.normaliser),
            "steps_per_round": is_count(self.steps_per_round),
            "rounds": is_count(self.rounds),
            "metric_noise_multiplier": metric is None or (is_number(metric) and metric > 0),
            "passes": self.passes in WEAKEST_FIRST,
        }
        for name, holds in bounds.items():
            if not holds:
                raise OutOfRange(f"{name}={getattr(self, name)} is out of range for a private plan")
        if self.shares is not None:
            several = self.shares_one_step and self.steps_per_round != 1
            if several or metric is not None:
                raise OutOfRange(
                    f"steps_per_round={self.steps_per_round} must be 1 and metric_noise_multiplier="
                    f"{metric} absent if clients share the noise: {ONE_STEP}"
                )
            self.shares.variance(self.clip_norm, self.noise_multiplier)

    @property
    def training_event(self) -> Event:
        """The charge of one round's training."""
        honest = None if self.shares is None else self.shares.honest_nodes
        return Event(self.sample_rate, self.noise_multiplier, self.steps_per_round, honest)

    @property
    def own_noise_multiplier(self) -> float:
        """Noise / clip norm of what one client sends: all of the noise, or its share."""
        shared = 1 if self.shares is None else self.shares.honest_nodes
        return self.noise_multiplier / math.sqrt(shared)

    @property
    def metric_event(self) -> Event | None:
        """The charge of one round's metric: a Gaussian release over all units; None without it."""
        metric = self.metric_noise_multiplier
        return None if metric is None else Event(1.0, metric, 1)

    @property
    def round_events(self) -> tuple[Event, ...]:
        """The charges of one round."""
        metric = self.metric_event
        return (self.training_event,) if metric is None else (self.training_event, metric)

    @property
    def run_events(self) -> tuple[Event, ...]:
        """The charges of all rounds."""
        return tuple(
            dataclasses.replace(event, steps=event.steps * self.rounds) for event in self.round_events
        )

    def verify(self) -> Accounts:
        """Checks with three accountants that all rounds cost at most ``epsilon``, up to rounding.

        The server and the nodes check the same plan on different processors: see :func:`within`.

        Raises:
            PrivacyError: They cost more, or the accountants disagree.
        """
        spent = accounting.epsilon(self.run_events, self.delta)
        if not within(spent, self.epsilon):
            raise PrivacyError(
                f"noise_multiplier={self.noise_multiplier} costs epsilon={spent:.3f} over "
                f"{self.rounds} rounds, more than epsilon={self.epsilon:g}"
            )
        return accounting.cross_check(self.run_events, self.delta)

    def to_json(self) -> str:
        """Serialises the plan."""
        values = {"unit": stored_unit(self.unit), **dataclasses.asdict(self)}
        if self.shares is None:  # as older versions write it; they refuse a plan with it
            del values["shares"]
        return json.dumps(values, allow_nan=False)

    @abstractmethod
    def batches(self, owners: Sequence[str], seeded: np.random.Generator) -> Iterator[Batch]:
        """Yields Poisson samples; ``seeded`` is ignored: samples must be unpredictable to its holders.

        Args:
            owners: The owner of each of the client's records.
            seeded: Not used.
        """


@dataclass(frozen=True)
class ExamplePlan(PrivatePlan):
    """DP-SGD with one record as the unit."""

    unit: ClassVar[str] = "record"

    def batches(self, owners: Sequence[str], seeded: np.random.Generator) -> Iterator[Batch]:
        """Yields Poisson samples of records."""
        stream = SecureStream()
        for _ in range(self.steps_per_round):
            sample = np.flatnonzero(stream.bernoulli(len(owners), self.sample_rate))
            yield [sample[index : index + 1] for index in range(len(sample))]


@dataclass(frozen=True)
class UserPlan(PrivatePlan):
    """DP-SGD with all records of one user (a patient, an author) as the unit.

    Formal guarantees:
        * Units are sampled, not records. From a sampled unit, ``max_records_per_unit`` records chosen
          at random take part; their gradients are summed and clipped once. The contribution of a unit
          to the sum depends only on its own records.

    Attributes:
        unit_column: Column that identifies the owner of a record.
        max_records_per_unit: Most records of a unit in one step, 1 to 2048; a public constant.

    References:
        Charles et al. 2024, user-level sampling (arXiv 2407.07737).
    """

    unit: ClassVar[str] = "user"

    unit_column: str = ""
    max_records_per_unit: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        named = isinstance(self.unit_column, str) and bool(self.unit_column)
        cap = self.max_records_per_unit
        if not named or not is_count(cap) or cap > MOST_RECORDS_PER_UNIT:
            raise OutOfRange(
                f"unit_column={self.unit_column!r} must name a column and max_records_per_unit={cap} "
                f"be in 1..{MOST_RECORDS_PER_UNIT}"
            )

    def batches(self, owners: Sequence[str], seeded: np.random.Generator) -> Iterator[Batch]:
        """Yields Poisson samples of units."""
        records: dict[str, list[int]] = {}
        for index, owner in enumerate(owners):
            records.setdefault(owner, []).append(index)
        units = [np.array(indices, dtype=np.int64) for indices in records.values()]
        stream = SecureStream()
        for _ in range(self.steps_per_round):
            sample = np.flatnonzero(stream.bernoulli(len(units), self.sample_rate))
            yield [units[u][stream.subset(len(units[u]), self.max_records_per_unit)] for u in sample]


@dataclass(frozen=True)
class ClientPlan(PrivatePlan):
    """All that a client has as the unit: its whole update is clipped once, and clients share the noise.

    Formal guarantees:
        * Two federations are neighbours if one client's part of a round's sum is its clipped update in
          one of them, and nothing but its share of the noise in the other. A round releases the sum of
          the clients' updates, each a whole vector of at most C / γ steps of the grid, and the noise of
          ``shares``. So what is hidden is a client's data, not whether it takes part.
        * Cohorts are public, so no sampling amplifies it: each round in which a client takes part costs
          one Gaussian release, whatever its steps. They are plain steps on its own records.
        * A client whose training fails, or that has no records, adds nothing but noise: whether
          training fails depends on its data.
        * A single record or user of a client is not protected at this epsilon: a change of its data
          moves the update by up to 2 · C. So this unit neither contains the others nor is contained.

    Attributes:
        batch_size: Records in a client's own step, >= 1.

    References:
        McMahan et al. 2018 (arXiv 1710.06963); Kairouz, Liu and Steinke 2021 (arXiv 2102.06387).
    """

    unit: ClassVar[str] = "client"
    shares_one_step: ClassVar[bool] = False

    batch_size: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shares is None or (self.sample_rate, self.normaliser) != (1.0, 1):
            raise OutOfRange(
                f"a plan for whole clients shares the noise; sample_rate={self.sample_rate} and "
                f"normaliser={self.normaliser} must be 1"
            )
        _ = self.local

    @property
    def training_event(self) -> Event:
        """The charge of one round: one release, whatever the number of local steps."""
        return dataclasses.replace(super().training_event, steps=1)

    @property
    def local(self) -> NoPrivacy:
        """A client's own training, before its update is clipped."""
        return NoPrivacy(self.batch_size, self.steps_per_round)

    def batches(self, owners: Sequence[str], seeded: np.random.Generator) -> Iterator[Batch]:
        """Yields the batches of a client's own training."""
        yield from self.local.batches(owners, seeded)


@dataclass(frozen=True)
class NoPrivacy:
    """Plain local training without any privacy guarantee (epsilon is infinite).

    Attributes:
        batch_size: Records in a step, >= 1.
        steps_per_round: Steps in a round, >= 1.
    """

    unit: ClassVar[str] = "none"

    batch_size: int
    steps_per_round: int

    def __post_init__(self) -> None:
        if not (is_count(self.batch_size) and is_count(self.steps_per_round)):
            raise OutOfRange(
                f"batch_size={self.batch_size} and steps_per_round={self.steps_per_round} must be >= 1"
            )

    @property
    def round_events(self) -> tuple[Event, ...]:
        """No charges: nothing is guaranteed."""
        return ()

    def batches(self, owners: Sequence[str], seeded: np.random.Generator) -> Iterator[Batch]:
        """Yields shuffled batches, epoch after epoch; the last of an epoch is filled from the next.

        >>> plan = NoPrivacy(batch_size=2, steps_per_round=2)
        >>> [len(batch) for batch in plan.batches(["", "", ""], np.random.default_rng(0))]
        [2, 2]
        """
        size = min(self.batch_size, len(owners))
        pending = np.empty(0, dtype=np.int64)
        for _ in range(self.steps_per_round):
            if len(pending) < size:
                pending = np.concatenate([pending, seeded.permutation(len(owners))])
            yield [pending[index : index + 1] for index in range(size)]
            pending = pending[size:]

    def to_json(self) -> str:
        """Serialises the plan."""
        return json.dumps({"unit": stored_unit(self.unit), **dataclasses.asdict(self)}, allow_nan=False)


RunPlan = ExamplePlan | UserPlan | ClientPlan | NoPrivacy
"""The plans that a run can have; each is a :class:`Plan`."""


def from_json(text: str) -> RunPlan:
    """Reads what :meth:`Plan.to_json` wrote.

    Raises:
        PrivacyError: The text is not a plan, or a value is out of range.

    >>> from_json(NoPrivacy(4, 2).to_json())
    NoPrivacy(batch_size=4, steps_per_round=2)
    """
    kinds = {stored_unit(kind.unit): kind for kind in get_args(RunPlan)}
    if len(text) > _LONGEST:
        raise PrivacyError(f"the plan is longer than {_LONGEST} characters")
    try:
        values = json.loads(text)
        unit = values.pop("unit")
        if values.get("shares") is not None:
            values["shares"] = NoiseShares(**values["shares"])
        if unit in kinds:
            plan: RunPlan = kinds[unit](**values)
            return plan
    except PrivacyError:
        raise
    except (TypeError, KeyError, ValueError, AttributeError, RecursionError) as error:
        raise PrivacyError(f"the plan cannot be read: {str(error)[:100]}") from error
    raise PrivacyError(f"the plan names an unknown unit {str(unit)[:40]!r}")
