"""Frozen data classes exchanged by client, server and report; NumPy only, no torch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedslm.errors import ModelError, OutOfRange, PrivacyError

FloatArray = NDArray[np.float32]
LARGEST_DELTA = 0.1  # with delta = 0.1, one unit in ten could be published outright
_LARGEST, _MOST = 1e100, 10**12
_ROUNDING = 1e-9  # relative; kernels of different processors changed epsilon by up to 6e-11 of itself
INFINITE = "infinite"  # JSON value of an epsilon that no number bounds


@dataclass(frozen=True, eq=False)
class AdapterState:
    """The tensors of an adapter, float32 and C-contiguous, in sorted key order.

    States are compared by :meth:`sha256`.

    Attributes:
        tensors: Key to array. Keys are PEFT state-dict keys.
        flat: All values in this order, if they lie in one buffer, of which the tensors are views; else
            None. What reads all values reads this one array.

    Raises:
        ModelError: A tensor is not float32.

    >>> state = AdapterState({"b": np.zeros(2, np.float32), "a": np.ones((1, 2), np.float32)})
    >>> list(state)
    ['a', 'b']
    >>> state.num_parameters, state.num_bytes
    (4, 16)
    """

    tensors: Mapping[str, FloatArray]
    flat: FloatArray | None = field(default=None, repr=False)

    @classmethod
    def of_flat(cls, flat: FloatArray, shapes: Mapping[str, tuple[int, ...]]) -> AdapterState:
        """Views of one buffer.

        Args:
            flat: All values, one axis, in the sorted order of the keys.
            shapes: Key to shape.

        Raises:
            ModelError: There are more values, or fewer.

        >>> state = AdapterState.of_flat(np.arange(3, dtype=np.float32), {"b": (1,), "a": (2,)})
        >>> state["a"], state["b"]
        (array([0., 1.], dtype=float32), array([2.], dtype=float32))
        """
        size = sum(map(math.prod, shapes.values()))
        if size != flat.size:
            raise ModelError(f"an adapter of {size} values cannot be made of {flat.size}")
        tensors, end = {}, 0
        for key, shape in sorted(shapes.items()):
            begin, end = end, end + math.prod(shape)
            tensors[key] = flat[begin:end].reshape(shape)
        return cls(tensors, flat)

    def __post_init__(self) -> None:
        for key, tensor in self.tensors.items():
            if tensor.dtype != np.float32:
                raise ModelError(f"adapter tensor {key} has dtype={tensor.dtype}; float32 expected")
        contiguous = {
            key: tensor if tensor.flags.c_contiguous else tensor.copy(order="C")
            for key, tensor in sorted(self.tensors.items())
        }
        object.__setattr__(self, "tensors", contiguous)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.flat is not None:  # once, not once more in views
            return AdapterState.of_flat, (self.flat, self.shapes)
        return AdapterState, (self.tensors,)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, key: str) -> FloatArray:
        return self.tensors[key]

    @property
    def num_parameters(self) -> int:
        """Number of values in all tensors."""
        return sum(tensor.size for tensor in self.tensors.values())

    @property
    def num_bytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Key to shape."""
        return {key: tensor.shape for key, tensor in self.tensors.items()}

    def sha256(self) -> str:
        """Hash of keys, shapes and little-endian bytes; equal on every machine."""
        digest = hashlib.sha256()
        for key, tensor in self.tensors.items():
            digest.update(f"{key}{tensor.shape}".encode())
            digest.update(np.ascontiguousarray(tensor, dtype="<f4").tobytes())
        return digest.hexdigest()

    def merged(self, other: AdapterState) -> AdapterState:
        """Returns this state with the tensors of ``other`` added or replaced."""
        return AdapterState({**self.tensors, **other.tensors})

    def select(self, keys: Set[str]) -> AdapterState:
        """Returns the tensors whose keys are in ``keys``."""
        return AdapterState({key: value for key, value in self.tensors.items() if key in keys})

    def minus(self, start: AdapterState) -> AdapterState:
        """Returns the difference between these tensors and those with the same keys in ``start``."""
        if self.flat is not None and start.flat is not None and self.shapes == start.shapes:
            return AdapterState.of_flat(self.flat - start.flat, self.shapes)
        return AdapterState({key: value - start[key] for key, value in self.tensors.items()})

    def plus(self, delta: AdapterState) -> AdapterState:
        """Returns this state plus ``delta``; tensors that ``delta`` does not contain stay unchanged."""
        moved = {key: self[key] + value for key, value in delta.tensors.items()}
        return AdapterState({**self.tensors, **moved})

    def norm(self) -> float:
        """L2 norm over all tensors together."""
        flat = (tensor.ravel() for tensor in self._parts())
        return math.sqrt(sum(float(np.dot(each, each)) for each in flat))

    def is_finite(self) -> bool:
        """True if no tensor holds NaN or infinity."""
        return all(bool(np.isfinite(part).all()) for part in self._parts())

    def largest(self) -> float:
        """The largest absolute value; 0 if there is none.

        >>> AdapterState({"a": np.array([1, -3], np.float32)}).largest()
        3.0
        """
        return max((float(np.abs(part).max(initial=0.0)) for part in self._parts()), default=0.0)

    def _parts(self) -> Iterable[FloatArray]:
        """All values, in as few arrays as they lie in."""
        return self.tensors.values() if self.flat is None else (self.flat,)


def is_number(value: object) -> bool:
    """True for a finite number that every accountant can compute with; a boolean does not count.

    >>> is_number(0.5), is_number(True), is_number(float("nan")), is_number(10**400)
    (True, False, False, False)
    """
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def is_count(value: object) -> bool:
    """True for a whole number from 1 up to 10^12; a boolean does not count.

    >>> is_count(1), is_count(0), is_count(1.0), is_count(True)
    (True, False, False, False)
    """
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MOST


def within(spent: float, budget: float) -> bool:
    """Whether an epsilon is within a budget that may have been computed on another machine.

    Two processors may round the last digits of the same epsilon differently. So that honest machines
    agree, the budget may be exceeded by 1e-9 of itself (below 1: by 1e-9).

    >>> within(8.0 + 1e-9, 8.0), within(8.0 + 1e-6, 8.0), within(float("nan"), 8.0)
    (True, False, False)
    """
    return spent <= budget + _ROUNDING * max(1.0, budget)


def epsilon_as_json(epsilon: float) -> float | str:
    """Returns an epsilon in a form that JSON can represent: JSON has no infinity.

    >>> epsilon_as_json(2.5), epsilon_as_json(math.inf)
    (2.5, 'infinite')
    """
    return INFINITE if epsilon == math.inf else epsilon


def epsilon_of_json(value: object) -> float:
    """Reads the output of :func:`epsilon_as_json`; any other value is refused.

    Raises:
        PrivacyError: The value is neither a finite number >= 0 nor the word "infinite".

    >>> epsilon_of_json("infinite"), epsilon_of_json(2.5)
    (inf, 2.5)
    """
    if value == INFINITE and isinstance(value, str):
        return math.inf
    if isinstance(value, int | float) and is_number(value) and value >= 0:
        return value
    raise PrivacyError(f"epsilon={str(value)[:40]!r} must be a finite number >= 0, or {INFINITE!r}")


@dataclass(frozen=True)
class Event:
    """The privacy cost of one release: ``steps`` Poisson-sampled Gaussian steps.

    Attributes:
        sample_rate: Probability in (0, 1] that a record takes part in a step.
        noise_multiplier: Noise standard deviation divided by the clip norm, > 0.
        steps: Number of steps, >= 1.
        honest_nodes: None: the node added all of the noise, a continuous Gaussian. Otherwise only sums
            over several nodes were seen, and their discrete Gaussian noise is that of so many nodes,
            this one included: the cost holds only if so many added their share and keep it to
            themselves (:mod:`fedslm.privacy.shares`).

    Raises:
        PrivacyError: A value has the wrong type or is out of range: no accountant may see it.
    """

    sample_rate: float
    noise_multiplier: float
    steps: int
    honest_nodes: int | None = None

    def __post_init__(self) -> None:
        valid = (
            is_number(self.sample_rate)
            and is_number(self.noise_multiplier)
            and is_count(self.steps)
            and 0 < self.sample_rate <= 1
            and self.noise_multiplier > 0
            and (self.honest_nodes is None or is_count(self.honest_nodes))
        )
        if not valid:
            raise OutOfRange(
                f"sample_rate={self.sample_rate!r} must be in (0, 1], "
                f"noise_multiplier={self.noise_multiplier!r} in (0, inf), steps={self.steps!r} a whole "
                f"number >= 1 and honest_nodes={self.honest_nodes!r} one too, or None"
            )

    def as_values(self) -> dict[str, float]:
        """The values as a ledger stores them; without honest_nodes if the noise was not shared.

        >>> Event(0.1, 1.0, 2).as_values()
        {'sample_rate': 0.1, 'noise_multiplier': 1.0, 'steps': 2}
        """
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class PrivacySpent:
    """Privacy loss spent so far on one client's data.

    Attributes:
        epsilon: Upper bound; it may be infinite (in JSON: "infinite").
        delta: The delta at which epsilon holds.
        steps: Number of noisy steps charged.
    """

    epsilon: float
    delta: float
    steps: int


@dataclass(frozen=True)
class ClientUpdate:
    """One client's checked reply.

    Attributes:
        client: Index of the client in the population.
        delta: The tensors that were sent, minus those from which the client started.
        weight: Weight in the aggregate, > 0; 1 under privacy.
    """

    client: int
    delta: AdapterState
    weight: float


@dataclass(frozen=True)
class RoundRecord:
    """One line of ``rounds.jsonl``.

    Attributes:
        round: Counts from 1.
        cohort: Number of clients asked.
        completed: Number of updates in the aggregate.
        failed: Clients that raised, died or sent something unusable.
        late: Clients that missed the deadline.
        refused: Clients that refused (for example, because their budget is exhausted).
        kept: False if the adapter was updated, True if too few replies arrived and it stayed unchanged.
        epsilon: Epsilon of the network so far (the largest over clients, or all of them composed if
            units overlap); infinite (in JSON: "infinite") without privacy.
        metrics: Metrics on the public evaluation split; empty if this round was not evaluated.
        signal_to_noise: See :func:`fedslm.aggregation.mean.signal_to_noise`; None if unknown.
        bytes_down: Bytes of tensors sent to clients in this round.
        bytes_up: Bytes of tensors received from clients in this round.
        seconds: Wall time of the round.
        evaluation_seconds: The part of it that the evaluation took; 0 if this round was not evaluated,
            and in runs of older versions.
        reasons: One line for each client that is missing from the aggregate: its name and the reason.
        left_out: Indices of these clients, in the same order; empty in runs of older versions.
        unknown: Indices of clients that may have paid for the round although no statement of it came:
            those that were late or failed, or all of a round that the server lost.
        private_metric: Mean score of the round's starting adapter on the clients' own data, from noisy
            releases; None if it was not requested.
    """

    round: int
    cohort: int
    completed: int
    failed: int
    late: int
    refused: int
    kept: bool
    epsilon: float
    metrics: dict[str, float]
    signal_to_noise: float | None
    bytes_down: int
    bytes_up: int
    seconds: float
    reasons: tuple[str, ...] = field(default=())
    left_out: tuple[int, ...] = field(default=())
    private_metric: float | None = None
    evaluation_seconds: float = 0.0
    unknown: tuple[int, ...] = field(default=())
