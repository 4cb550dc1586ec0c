"""A simulation's data, loaded, checked and shared out: what is written to disk, or only looked at."""

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
from fedslm.data.partition import partition
from fedslm.data.poison import hostile_clients, poisoned
from fedslm.data.sources import cut, load_evaluation, load_public, load_train
from fedslm.errors import DataError, have

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)
NO_ATTACK = AttackConfig()


@dataclass(frozen=True)
class Public:
    """What a server may see.

    Attributes:
        evaluation: The public split, cut to its largest size.
        labels: Class names or tags; empty for tasks without.
        records: Public records that training may look at; None if there are none.
        whole: The public split, not cut.
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
        evaluation: The public split, cut to its largest size.
        labels: Class names or tags; empty for tasks without.
        shards: (name, records) of each client.
        duplicates: Private records whose input is in the public split too.
        public: Public records that training may look at; None if there are none.
    """

    train: Dataset
    evaluation: Dataset
    labels: tuple[str, ...]
    shards: tuple[tuple[str, Dataset], ...]
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
    """Loads and checks the public split, and public records if there are any.

    Args:
        data: Sources and columns.
        task: What is learned.
        seed: The run's seed.
        scratch: Directory for memory-mapped copies; None: the system's temporary directory.
        beside_private: Whether the private split is here too (a simulation): it must be another.

    Raises:
        DataError: Anything about them that would stop a run later.
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
    """Loads and checks a simulation's data and shares it out.

    Args:
        data: Sources, columns and kind of partition.
        task: What is learned.
        privacy: Says whether a column of units is needed.
        num_clients: Number of shards.
        seed: The run's seed.
        scratch: Directory for memory-mapped copies; None: the system's temporary directory.
        attack: What hostile clients do to their own records.

    Raises:
        DataError: Anything about the data that would stop a client later.
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
    shards = [
        (name, poisoned(shard, attack, labels, **columns) if client in hostile else shard)
        for client, (name, shard) in enumerate(shards)
    ]
    if privacy.unit == "user":
        parts = [shard for _, shard in shards]
        _check_units(parts, str(privacy.unit_column), privacy.overlapping)
    return Shared(train, public.evaluation, labels, tuple(shards), duplicates, public.records)


def inputs(data: DataConfig, task: TaskConfig) -> list[str]:
    """Columns that a model is shown: all that a task reads but its targets, unless these hold both."""
    targets = (data.label_column, data.rejected_column)
    columns = dict.fromkeys(needed(data, task).values())
    return [column for column in columns if column not in targets] or [data.text_column]


def _check_units(parts: list[Dataset], column: str, overlapping: bool) -> None:
    """Refuses records without a unit, and units in several clients unless they were announced."""
    missing = 0
    clients: Counter[str] = Counter()
    for part in parts:
        owners = owners_in(part, column)
        missing += sum(not owner for owner in owners)
        clients.update(set(owners))
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
