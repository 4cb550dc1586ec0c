"""Public shapes of the private step's passes: which records share a pass, and padded to what length.

With ``privacy.passes = "fixed"`` a record's length decides the length that it is padded to, and empty
slots hold made-up records that are left out of the sum. A record's gradient is then a pure function of
the record, if the bits of a row depend neither on its slot nor on the other rows: that is measured for
each shape on this machine (:mod:`fedslm.verification.bit_proof`), and only the shapes that passed are
used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fedslm.tasks.base import Example, Task, Tensors
from fedslm.tasks.passes import GPU_TOKENS, passes
from fedslm.training.batches import Unit, micro_batches


@dataclass(frozen=True)
class _Kind:
    """Which passes are shared for bases of some size.

    Attributes:
        most_parameters: Largest base of this kind.
        lengths: Padded lengths: multiples of 4, so that elementwise kernels start every row alike. 68
            and 132 are for records that are cut at 64 and 128 tokens, since one column is always
            padding. The last one that a job needs is as short as its longest record allows. A record
            longer than all of them has a pass of its own.
        tokens: Most tokens in a pass.
        records: Most records in a pass.
    """

    most_parameters: float
    lengths: tuple[int, ...]
    tokens: int
    records: int


_ON_CPU = (  # the overhead of a pass dominates for a tiny base, cache misses for a small one
    _Kind(4e6, (24, 48, 68, 84, 100, 132, 260, 516), 2304, 32),
    _Kind(5e7, (16, 24, 32, 48, 68, 96), 576, 16),
    _Kind(math.inf, (), 0, 0),  # isolated passes of 128 tokens cost 1.04 of a plain step at 135 M
)
_ON_GPU = _Kind(math.inf, (32, 68, 132, 260, 516), GPU_TOKENS, 64)
_COUNTS = (*range(1, 9), 10, 12, 14, 16, 24, 32, 48, 64)  # of records in a pass
_SHORTEST = 8  # tokens: below, no length is measured
_MOST_VALUES = 1 << 24  # of per-record gradients in one pass: 64 MiB
_UNIT_VALUES = 1 << 23  # of units' sums at once: 64 MiB in float64


@dataclass(frozen=True)
class Shape:
    """The shape of a pass.

    Attributes:
        records: Slots for records, >= 2.
        length: Tokens that every record is padded to; a record in it is at least one token shorter, so
            that a mask is never all ones: transformers would then choose another attention kernel.
    """

    records: int
    length: int


@dataclass
class Shapes:
    """The shapes that were proved on this machine, for one base, precision and number of threads.

    Attributes:
        proved: Maps a padded length to the numbers of slots whose rows agree to the last bit.
        withdrawn: Whether a pass did not repeat: nothing is proved any more.
        on_withdrawal: Keeps that for later processes.
    """

    proved: Mapping[int, tuple[int, ...]]
    withdrawn: bool = False
    on_withdrawal: Callable[[], None] = field(default=lambda: None, compare=False, repr=False)

    def withdraw(self) -> None:
        """Withdraws every shape. This is kept at once: the work that follows may be stopped."""
        self.withdrawn = True
        self.on_withdrawal()

    def of(self, length: int) -> int | None:
        """Returns the padded length for a record; None if it gets a pass of its own."""
        if self.withdrawn:
            return None
        return next((padded for padded in sorted(self.proved) if padded > length), None)


@dataclass(frozen=True)
class Pass:
    """Records that are computed together.

    Attributes:
        records: The records.
        owners: For each record, the index of its unit within the part.
        shape: The public shape; None pads to the longest of ``records``.
    """

    records: tuple[Example, ...]
    owners: tuple[int, ...]
    shape: Shape | None = None


@dataclass(frozen=True)
class Part:
    """Some units of a step, complete: all their records are in these passes.

    Attributes:
        units: Number of units.
        passes: The passes, in any order.
    """

    units: int
    passes: tuple[Pass, ...]


@dataclass(frozen=True)
class Job:
    """What decides which shapes are worth a measurement; all of it is public.

    Attributes:
        base_parameters: Parameters of the base.
        trained_values: Trained values: per-record gradients bound the records in a pass.
        longest: Longest record, in tokens: no longer length is needed.
        positions: Most tokens that the base reads; 0 if there is no bound.
        most_records: ``training.micro_batch_size``.
        rows: Batch rows of a record.
        on_gpu: Whether the model is on a GPU.
    """

    base_parameters: int
    trained_values: int
    longest: int
    most_records: int
    rows: int = 1
    on_gpu: bool = False
    positions: int = 0


def candidates(job: Job) -> dict[int, tuple[int, ...]]:
    """Returns the shapes that are worth a measurement: padded length to numbers of slots.

    >>> candidates(Job(10**7, 10_000, 28, 3))
    {16: (1, 2, 3), 24: (1, 2, 3), 32: (1, 2, 3)}
    """
    kind = next(kind for kind in _ON_CPU if job.base_parameters <= kind.most_parameters)
    kind = _ON_GPU if job.on_gpu else kind
    most = min(kind.records, job.most_records, _MOST_VALUES // max(job.trained_values, 1))
    last = job.longest // 4 * 4 + 4  # the least multiple of 4 with a column of padding
    if job.positions:
        last = min(last, job.positions // 4 * 4)
    needed = [length for length in kind.lengths if length < last]
    if len(needed) < len(kind.lengths) and last >= _SHORTEST:
        needed.append(last)
    slots = {length: min(most, kind.tokens // (length * job.rows)) for length in needed}
    return {
        length: (*(count for count in _COUNTS if count < most), most)
        for length, most in slots.items()
        if most > 1
    }


def isolated(units: Sequence[Unit], most_tokens: int) -> Iterator[Part]:
    """Yields a part for each unit; its records share no pass with another unit's.

    Args:
        units: The units of a step.
        most_tokens: Padded tokens in a pass, unless one record has more on its own.
    """
    for unit in units:
        yield Part(
            1,
            tuple(
                Pass(tuple(unit[number] for number in chosen), (0,) * len(chosen))
                for chosen in passes(unit, most_tokens)
            ),
        )


def shared(units: Sequence[Unit], most_records: int, most_tokens: int) -> Iterator[Part]:
    """Yields parts of several units that share a pass, padded to the longest record among them.

    Args:
        units: The units of a step.
        most_records: Most records in a pass, unless one unit has more.
        most_tokens: Most padded tokens in a pass, with the same exception.
    """
    for some in micro_batches(units, most_records, tokens=most_tokens):
        pairs = [(record, owner) for owner, unit in enumerate(some) for record in unit]
        records, owners = zip(*pairs, strict=True)
        yield Part(len(some), (Pass(records, owners),))


def fixed(units: Sequence[Unit], shapes: Shapes, values: int, *, by_record: bool) -> Iterator[Part]:
    """Yields parts whose passes have public shapes.

    Args:
        units: The units of a step.
        shapes: The proved shapes.
        values: Trained values, which bound the units in a part.
        by_record: Whether each unit is one record; then each pass is a part.
    """
    size = max(1, _UNIT_VALUES // max(values, 1))
    for start in range(0, len(units), size):
        some = units[start : start + size]
        packed = tuple(_packed(some, shapes))
        if not by_record:
            yield Part(len(some), packed)
            continue
        for each in packed:
            count = len(each.records)
            yield Part(count, (Pass(each.records, tuple(range(count)), each.shape),))


def _packed(units: Sequence[Unit], shapes: Shapes) -> Iterator[Pass]:
    """Yields the passes of all records of some units."""
    by_length: dict[int | None, list[tuple[Example, int]]] = {}
    for owner, unit in enumerate(units):
        for record in unit:
            by_length.setdefault(shapes.of(record.length), []).append((record, owner))
    for length, found in by_length.items():
        if length is None:
            for record, owner in found:
                yield Pass((record,), (owner,))
            continue
        while found:
            slots = _slots(len(found), shapes.proved[length])
            chosen, found = found[:slots], found[slots:]
            records, owners = zip(*chosen, strict=True)
            yield Pass(records, owners, Shape(slots, length))


def _slots(waiting: int, proved: Sequence[int]) -> int:
    """Returns the smallest number of slots that holds the waiting records, or the largest."""
    return next((slots for slots in sorted(proved) if slots >= waiting), max(proved))


def in_shape(task: Task, records: Sequence[Example], shape: Shape, pad_token_id: int) -> Tensors:
    """Collates records into a public shape; made-up records fill the empty slots, at the end.

    Args:
        task: The task that collates.
        records: At most ``shape.records``, each shorter than ``shape.length``.
        shape: The shape.
        pad_token_id: The tokenizer's padding token.
    """
    empty = shape.records - len(records)
    # A made-up record as long as the shape makes every tensor that long, for any task's tensors.
    ruler = task.made_up(shape.length)
    batch = task.collate([*records, *[task.made_up()] * empty, ruler], pad_token_id)
    rows = shape.records * task.rows_per_example
    return {name: tensor[:rows] for name, tensor in batch.items()}
