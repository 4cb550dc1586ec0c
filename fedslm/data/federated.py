"""A simulation's data, loaded, checked and partitioned, before it is written to disk or previewed."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedslm.config import AttackConfig, DataConfig, PrivacyConfig, TaskConfig
from fedslm.data import labels as names
from fedslm.data.columns import needed, needed_to_share
from fedslm.data.duplicates import count_duplicates
from fedslm.data.owners import owners_in
from fedslm.data.partition import Partition, partition
from fedslm.data.poison import hostile_clients, poisoned
from fedslm.data.sources import cut, load_evaluation, load_public, load_train
from fedslm.errors import DataError, have

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)
NO_ATTACK = AttackConfig()


@dataclass(frozen=True)
class Public:
    """The data that a server may see.

    Attributes:
        evaluation: The public split, limited to its maximum size.
        labels: Class names or tags; empty for tasks without.
        records: Public records available for training; None if there are none.
        whole: The complete public split.
    """

    evaluation: Dataset
    labels: tuple[str, ...]
    records: Dataset | None
    whole: Dataset


@dataclass(frozen=True)
class Shared:
    """Loaded and checked data, memory-mapped.

    Attributes:
        train: The whole private split.
        evaluation: The public split, limited to its maximum size.
        labels: Class names or tags; empty for tasks without.
        shards: Name and records of each client.
        duplicates: Number of private records whose input also occurs in the public split.
        public: Public records available for training; None if there are none.
    """

    train: Dataset
    evaluation: Dataset
    labels: tuple[str, ...]
    shards: Partition
    duplicates: int
    public: Dataset | None = None


def load_what_is_public(
    data: DataConfig,
    task: TaskConfig,
    seed: int,
    scratch: Path | None = None,
    *,
    beside_private: bool = True,
) -> Public:
    """Loads and checks the public split, and the public training records if there are any.

    Args:
        data: Sources and columns.
        task: The learning task.
        seed: The run's seed.
        scratch: Directory for memory-mapped copies; None: the system's temporary directory.
        beside_private: Whether the private split is loaded too (a simulation): the two must differ.

    Raises:
        DataError: The public data has a defect that would stop a run later.
    """
    whole = load_evaluation(data, task, seed, scratch, beside_private=beside_private)
    names.check(whole, data, task, "evaluation")
    labels = names.resolve(data, task, whole)
    names.check_known(whole, data, task, labels, "evaluation")
    records = load_public(data, task, seed, scratch, beside_private=beside_private)
    if records is not None:
        records = cut(records, data.max_evaluation_records, seed)
    return Public(cut(whole, data.max_evaluation_records, seed), labels, records, whole)


def share_out(
    data: DataConfig,
    task: TaskConfig,
    privacy: PrivacyConfig,
    *,
    num_clients: int,
    seed: int,
    scratch: Path | None = None,
    attack: AttackConfig = NO_ATTACK,
) -> Shared:
    """Loads, checks and partitions a simulation's data.

    Args:
        data: Sources, columns and kind of partition.
        task: The learning task.
        privacy: Determines whether a unit column is needed.
        num_clients: Number of shards.
        seed: The run's seed.
        scratch: Directory for memory-mapped copies; None: the system's temporary directory.
        attack: How hostile clients modify their own records.

    Raises:
        DataError: The data has a defect that would stop a client later.
    """
    train = load_train(data, task, seed, scratch, more=needed_to_share(data, privacy))
    public = load_what_is_public(data, task, seed, scratch)
    labels = public.labels
    names.check(train, data, task, "training")
    names.check_known(train, data, task, labels, "training")
    duplicates = count_duplicates(train, public.whole, inputs(data, task))
    if duplicates:
        logger.warning(
            "%d of %d training records (%.1f %%) are in the public evaluation split too: metrics on it "
            "overestimate the model; remove them",
            duplicates,
            len(train),
            100 * duplicates / len(train),
        )
    shards = partition(train, data, num_clients, seed)
    hostile = hostile_clients(attack, num_clients, seed)
    columns = {"text_column": data.text_column, "label_column": str(data.label_column)}
    shards = shards.with_changed(
        {client: poisoned(shards[client][1], attack, labels, **columns) for client in hostile}
    )
    if privacy.unit == "user":
        _check_units(shards, str(privacy.unit_column), privacy.overlapping)
    return Shared(train, public.evaluation, labels, shards, duplicates, public.records)


def inputs(data: DataConfig, task: TaskConfig) -> list[str]:
    """Returns the model's input columns: all that a task reads but the targets, or the text column."""
    targets = (data.label_column, data.rejected_column)
    columns = dict.fromkeys(needed(data, task).values())
    return [column for column in columns if column not in targets] or [data.text_column]


def _check_units(shards: Partition, column: str, overlapping: bool) -> None:
    """Refuses records without a unit, and units shared by clients unless this was declared."""
    owners = [owner for piece in shards.pieces() for owner in owners_in(piece, column)]
    missing = sum(not owner for owner in owners)
    clients: Counter[str] = Counter()
    start = 0
    for end in shards.ends:
        clients.update(set(owners[start:end]))
        start = int(end)
    if missing:
        raise DataError(
            f"{have(missing, 'record')} no value in privacy.unit_column={column!r}; remove them"
        )
    straddling = [owner for owner, count in clients.items() if count > 1]
    if straddling and not overlapping:
        raise DataError(
            f"{len(straddling)} of {len(clients)} units are in several clients, so the largest epsilon "
            f"of a client is not theirs; use data.partition=natural with a data.natural_column "
            f"that keeps them together, or set privacy.overlapping=true, which composes the clients"
        )
