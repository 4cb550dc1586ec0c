"""The public records of a search: read once, and divided into training and held-out records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedslm.config import DataConfig, PrivacyConfig, TaskConfig
from fedslm.config.tasks import TASKS
from fedslm.data import labels as names
from fedslm.data.columns import needed_to_share
from fedslm.data.holdout import record_name
from fedslm.data.layouts import laid_out
from fedslm.data.owners import owners_in
from fedslm.data.sources import load_train, same_records
from fedslm.data.split import write_chosen
from fedslm.data.tables import rows_in
from fedslm.errors import ConfigError, DataError, Problem
from fedslm.rng import stream

if TYPE_CHECKING:
    from datasets import Dataset

TRAIN, HELD_OUT, INITIAL = "train", "test", "initial"
CLIENT, UNIT = "tune_client", "tune_unit"
_LABELS = "labels.txt"
_HELD_OUT_SHARE = 1 / 3


@dataclass(frozen=True)
class PublicRecords:
    """Public records that stand in for the private ones.

    Attributes:
        dataset: All records, with the columns that a run reads.
        data: Their columns and their source.
        task: The task, with the columns of its prompt.
        labels: Class names; empty for tasks without.
    """

    dataset: Dataset
    data: DataConfig
    task: TaskConfig
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Sides:
    """How the public records were divided.

    Attributes:
        trained: Units that trials train on.
        held_out: Units that trials are evaluated on.
        per_client: Units of a client.
        copies: How often a trial sees each unit.
    """

    trained: int
    held_out: int
    per_client: float
    copies: int = 1


def source_of(data: DataConfig) -> tuple[str, str]:
    """Returns source and split of the public records.

    Raises:
        ConfigError: The config names none.
        DataError: They are the private training split, or the evaluation split.
    """
    if not data.has_public_records:
        message = (
            "is missing; a search trains only on public records: set data.public_source or "
            "data.public_split, or give --public SOURCE"
        )
        raise ConfigError([Problem("data.public_source", message)])
    found = data.public_source or data.source, data.public_split or data.train_split
    evaluation = data.evaluation_source or data.source, data.evaluation_split
    for other, what, why in (
        ((data.source, data.train_split), "private training", "and no ε covers the trials"),
        (evaluation, "evaluation", "and the final evaluation would be too optimistic"),
    ):
        if _are_same(found, other):
            raise DataError(
                f"data.public_source={found[0]!r} ({found[1]}) is the {what} split, {why}; set "
                f"data.public_source or data.public_split to other public records"
            )
    return found


def _are_same(first: tuple[str, str], second: tuple[str, str]) -> bool:
    """Whether two splits share a file; the second need not exist on this machine."""
    try:
        return same_records(first, second)
    except DataError:  # one of them is not here: then a shared name is all that can be shared
        return first == second


def read(data: DataConfig, task: TaskConfig, privacy: PrivacyConfig, seed: int) -> PublicRecords:
    """Reads and checks the public records.

    Args:
        data: The config's section; of its sources only the public one is read.
        task: The task.
        privacy: Names the column of the unit.
        seed: The run's seed.

    Raises:
        ConfigError: As :func:`source_of`.
        DataError: As :func:`source_of`, or the records cannot be read or lack a column.
    """
    source, split = source_of(data)
    public: dict[str, str | None] = {"source": source, "train_split": split}
    public |= dict.fromkeys(("train_query", "evaluation_query", "public_source", "public_split"))
    if data.partition == "natural":  # the public records have other clients, or none
        public["partition"] = "iid"
    seen = data.model_copy(update={**public, "evaluation_source": source, "evaluation_split": split})
    seen, task = laid_out(seen, task, seed)
    dataset = load_train(seen, task, seed, more=needed_to_share(seen, privacy))
    names.check(dataset, seen, task, "public")
    labels = names.resolve(seen, task, dataset)
    names.check_known(dataset, seen, task, labels, "public")
    return PublicRecords(dataset, seen, task, labels)


def standing_in(
    records: PublicRecords, directory: Path, *, with_initial: bool
) -> tuple[DataConfig, TaskConfig]:
    """Returns the sections with which a run reads the files of :func:`write` as its own data."""
    changes: dict[str, object] = {
        "source": str(directory),
        "train_split": TRAIN,
        "evaluation_source": None,
        "evaluation_split": HELD_OUT,
        "validation_fraction": 0.0,
    }
    if with_initial:
        changes |= {"public_source": str(directory), "public_split": INITIAL}
    if records.data.partition == "iid":
        changes |= {"partition": "natural", "natural_column": CLIENT}
    task = records.task
    if TASKS[task.name].classes != "none" and not task.labels and task.labels_file is None:
        task = task.model_copy(update={"labels_file": str(directory / _LABELS)})
    return records.data.model_copy(update=changes), task


def write_labels(records: PublicRecords, directory: Path) -> None:
    """Writes the class names, so that training and held-out records have the same."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / _LABELS).write_text("\n".join(records.labels), encoding="utf-8")


@dataclass(frozen=True)
class Wanted:
    """What a trial needs of the public records.

    Attributes:
        clients: Number of clients.
        units: Units of a client in the real run.
        copies: Returns how often a trial must see each unit, given a client's public units.
    """

    clients: int
    units: int
    copies: Callable[[float], int]


def write(
    records: PublicRecords, directory: Path, wanted: Wanted, *, unit_column: str | None, seed: int
) -> Sides:
    """Writes the training and the held-out records; no unit is in both.

    Args:
        records: The public records.
        directory: Where the files are written.
        wanted: Sizes; records beyond them are not used.
        unit_column: Column that names a unit; None: each record is one, and equal ones stay together.
        seed: Seed of the division.

    Raises:
        DataError: There are too few units for the clients, or a file cannot be written.
    """
    dataset = records.dataset
    if unit_column is None:
        owners = [record_name(row) for row in rows_in(dataset)]
    else:
        owners = owners_in(dataset, unit_column)
    units = sorted(set(owners) - {""})
    held = max(1, round(_HELD_OUT_SHARE * len(units)))
    most = min(len(units) - held, wanted.clients * wanted.units)
    if most < wanted.clients:
        raise DataError(
            f"the public records have {len(units)} units, of which {held} are held out: too few for "
            f"federation.num_clients={wanted.clients}; give more public records"
        )
    order = [units[at] for at in stream(seed, "tune-public").permutation(len(units))]
    held_out, trained = set(order[:held]), {unit: at for at, unit in enumerate(order[held:][:most])}
    sides = Sides(most, held, most / wanted.clients, wanted.copies(most / wanted.clients))
    chosen = [row for row, owner in enumerate(owners) if owner in held_out]
    write_chosen(dataset, directory / f"{HELD_OUT}.parquet", chosen, {})
    rows = [row for row, owner in enumerate(owners) if owner in trained]
    write_chosen(dataset, directory / f"{INITIAL}.parquet", rows, {})
    numbers = [trained[owners[row]] for row in rows] * sides.copies
    copies = [copy for copy in range(sides.copies) for _ in rows]
    added = {
        CLIENT: [f"client-{number % wanted.clients:05d}" for number in numbers],
        UNIT: [f"{number}-{copy}" for number, copy in zip(numbers, copies, strict=True)],
    }
    write_chosen(dataset, directory / f"{TRAIN}.parquet", rows * sides.copies, added)
    return sides
