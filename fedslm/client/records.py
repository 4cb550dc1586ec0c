"""A client's own records: read and tokenised, each with its owner; some are held out."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import islice

from fedslm.client.node import Node
from fedslm.data import store
from fedslm.data.columns import needed
from fedslm.data.holdout import is_held_out, record_name
from fedslm.data.owners import owner_of
from fedslm.privacy.keys import data_commitment
from fedslm.privacy.plan import PrivatePlan, UserPlan
from fedslm.protocol.loading import model_for, task_for
from fedslm.protocol.setup import Setup
from fedslm.tasks.base import Example, Prepared, Row
from fedslm.tasks.lazy import LazyExamples

logger = logging.getLogger(__name__)
_CACHED_CLIENTS = 64
_PIECE_ROWS = 1000
_STOPS = (KeyboardInterrupt, SystemExit, GeneratorExit)  # meant for the process, not caused by a record


@dataclass(frozen=True)
class ClientRecords:
    """A client's examples, each with its owner.

    Attributes:
        trained: The examples for training.
        measured: The examples for the noisy metric: the held-out ones if ``data.validation_fraction``
            requests them, else those for training.
        commitment: Keyed hash of all its records, with all columns; empty without privacy.
    """

    trained: Sequence[Example]
    measured: Sequence[Example]
    commitment: str


def records_of(setup: Setup, node: Node) -> ClientRecords:
    """A client's records, read once per process.

    A deployed node caches one setup's records: a server that varies its requests cannot fill memory.

    Formal guarantees:
        * Whether a record is left out (no tokens, an unknown label, no owner, or it cannot be
          tokenised) depends only on this record, and no record makes this fail.
        * Whether a unit is held out depends only on its name (:func:`is_held_out`).
        * With ``data.streaming`` examples and their order are the same; rows and tokens stay on disk.
    """
    return (_only if node.deployed else _each)(setup, node)


def _read(setup: Setup, node: Node) -> ClientRecords:
    """Reads and tokenises the records."""
    model = model_for(setup)
    task, plan = task_for(setup), setup.plan
    unit = plan.unit_column if isinstance(plan, UserPlan) else None
    columns = set(needed(setup.data, setup.task).values()) | ({unit} if unit is not None else set())
    commitment = _commitment(node) if isinstance(plan, PrivatePlan) else ""
    rows = store.read_client(node.data, node.shard, columns)
    prepare = partial(task.prepare, tokenizer=model.tokenizer)
    prepare([])  # an error of the tokenizer itself shows here, whatever the records
    lazy, fraction = setup.data.streaming, setup.data.validation_fraction
    sides = {False: _Side(), True: _Side()}
    truncated = 0
    for first, piece in _pieces(rows):
        prepared = _prepared(prepare, piece)
        truncated += prepared.truncated
        for number, example in zip(prepared.kept, prepared.examples, strict=True):
            owner = "" if unit is None else owner_of(piece[number].get(unit))
            if unit is not None and not owner:
                continue
            held_out = fraction > 0 and is_held_out(
                owner or record_name(piece[number]), fraction, setup.seed
            )
            sides[held_out].add(first + number, owner, None if lazy else example)
    trained, validated = (
        LazyExamples(rows, side.rows, side.owners, prepare) if lazy else side.examples
        for side in sides.values()
    )
    _log(node.client, len(rows) - len(trained) - len(validated), truncated)
    return ClientRecords(trained, validated if fraction > 0 else trained, commitment)


def _commitment(node: Node) -> str:
    """Keyed hash of a client's whole records; the columns that a server requests do not change it."""
    return data_commitment(node.directory, store.read_client(node.data, node.shard))


_only = lru_cache(maxsize=1)(_read)
_each = lru_cache(maxsize=_CACHED_CLIENTS)(_read)


def _prepared(prepare: Callable[[Sequence[Row]], Prepared], piece: list[Row]) -> Prepared:
    """Prepares rows together, or one by one if that raises; a row that raises by itself is left out.

    A tokenizer that panics in Rust raises an error that is not an ``Exception``, and would end the
    process.
    """
    try:
        return prepare(piece)
    except _STOPS:
        raise
    except BaseException:  # no record's effect on a tokenizer or a template may be visible
        logger.warning("some records cannot be prepared", exc_info=True)
    made = []
    for number, row in enumerate(piece):
        try:
            one = prepare([row])
        except _STOPS:
            raise
        except BaseException:  # noqa: S112  (see above; only this record decides)
            continue
        made += [(number, example, one.truncated > 0) for example in one.examples]
    return Prepared.of(made)


@dataclass
class _Side:
    """The records for training, or the held-out ones."""

    rows: array[int] = field(default_factory=lambda: array("q"))
    owners: list[str] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    _names: dict[str, str] = field(default_factory=dict)

    def add(self, row: int, owner: str, example: Example | None) -> None:
        """Adds one record; its example only if examples are kept in memory."""
        self.rows.append(row)
        self.owners.append(self._names.setdefault(owner, owner))
        if example is not None:
            self.examples.append(replace(example, owner=owner) if owner else example)


def _pieces(rows: Sequence[Row]) -> Iterator[tuple[int, list[Row]]]:
    """Yields (number of the first row, rows), a thousand rows at a time."""
    iterator, first = iter(rows), 0
    while piece := list(islice(iterator, _PIECE_ROWS)):
        yield first, piece
        first += len(piece)


def _log(client: int, unusable: int, truncated: int) -> None:
    """Writes to the client's own log what is not used, or is truncated."""
    if unusable:
        text = "client %d: %d records have no tokens, an unknown label or no owner"
        logger.warning(text, client, unusable)
    if truncated:
        text = "client %d: %d records are longer than the task's lengths and are cut"
        logger.warning(text, client, truncated)
