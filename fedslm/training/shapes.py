"""Public shapes of the private step's passes: which records share a pass, and padded to what length.

With ``privacy.passes = "fixed"`` a record's length decides the length that it is padded to, and empty
slots hold made-up records that are left out of the sum. A record's gradient is then a pure function of
the record, if the bits of a row depend neither on its slot nor on the other rows: that is measured for
each shape on this machine (:mod:`fedslm.verification.bit_proof`), and only the shapes that passed are
used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fedslm.tasks.base import Example, Task, Tensors
from fedslm.training.batches import Unit, micro_batches

_LENGTHS = (16, 24, 32, 48, 64, 72, 96)
"""Padded lengths. Multiples of 8: elementwise kernels then start every row alike. 72 is for the records
that are cut at 64 tokens, since one column is always padding. A longer record has a pass of its own:
there, sharing a pass saves a few per cent at most, and padding costs more."""
_TOKENS = 576  # in one pass on a CPU: more no longer fits into its caches
_TOKENS_GPU = 16_384
_MOST_ROWS = 16
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
        withdrawn: Set by the step if a pass did not repeat: nothing is proved any more.
    """

    proved: Mapping[int, tuple[int, ...]]
    withdrawn: bool = field(default=False)

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


def candidates(longest: int, values: int, most_records: int, *, on_gpu: bool) -> dict[int, int]:
    """Returns the shapes that are worth a proof: padded length to number of slots. All of it is public.

    Args:
        longest: Longest record, in tokens: no longer length is needed.
        values: Trained values, which bound the slots.
        most_records: ``training.micro_batch_size``.
        on_gpu: Whether the model is on a GPU.

    >>> candidates(40, 10_000, 32, on_gpu=False)
    {16: 16, 24: 16, 32: 16, 48: 12}
    """
    tokens = _TOKENS_GPU if on_gpu else _TOKENS
    most = min(_MOST_ROWS, most_records, max(1, _MOST_VALUES // max(values, 1)))
    slots = {length: min(most, tokens // length) for length in _LENGTHS}
    needed = [length for length in _LENGTHS if length <= longest]
    needed += [length for length in _LENGTHS if length > longest][:1]
    return {length: slots[length] for length in needed if slots[length] > 1}


def isolated(units: Sequence[Unit], most_tokens: int = _TOKENS) -> Iterator[Part]:
    """Yields a part for each unit; its records share no pass with another unit's.

    Args:
        units: The units of a step.
        most_tokens: Padded tokens in a pass, unless one record has more on its own.
    """
    for unit in units:
        chosen: list[Example] = []
        passes = []
        for record in sorted(unit, key=lambda each: each.length):
            if chosen and (len(chosen) + 1) * record.length > most_tokens:
                passes.append(Pass(tuple(chosen), (0,) * len(chosen)))
                chosen = []
            chosen.append(record)
        passes.append(Pass(tuple(chosen), (0,) * len(chosen)))
        yield Part(1, tuple(passes))


def shared(units: Sequence[Unit], most_records: int) -> Iterator[Part]:
    """Yields parts of several units that share a pass, padded to the longest record among them.

    Args:
        units: The units of a step.
        most_records: Most records in a pass, unless one unit has more.
    """
    for some in micro_batches(units, most_records):
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
        passes = tuple(_packed(some, shapes))
        if not by_record:
            yield Part(len(some), passes)
            continue
        for each in passes:
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


def collated(task: Task, records: Sequence[Example], shape: Shape, pad_token_id: int) -> Tensors:
    """Collates records into a public shape; made-up records fill the empty slots, at the end.

    Args:
        task: The task that collates.
        records: At most ``shape.records``, each shorter than ``shape.length``.
        shape: The shape.
        pad_token_id: The tokenizer's padding token.
    """
    empty = shape.records - len(records)
    # One made-up record as long as the shape makes every tensor that long, whatever the task's tensors
    # are.
    ruler = task.made_up(shape.length)
    batch = task.collate([*records, *[task.made_up()] * empty, ruler], pad_token_id)
    rows = shape.records * task.rows_per_example
    return {name: tensor[:rows] for name, tensor in batch.items()}
