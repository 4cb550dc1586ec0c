"""Partitions the training split among the clients of a simulation.

The partitioners of flwr-datasets see only row numbers and the column they partition by, never the
records: partitioning a data set larger than memory takes little memory.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr
from typing import TYPE_CHECKING, Any, assert_never

from fedslm.config import DataConfig
from fedslm.data.missing import is_missing
from fedslm.data.owners import owner_of
from fedslm.data.tables import batches, named
from fedslm.errors import DataError, plural
from fedslm.rng import stream

if TYPE_CHECKING:
    from datasets import Dataset

_ROW, _KEY = "row", "key"
_Rows = list[tuple[str, list[int]]]


def partition(
    dataset: Dataset, config: DataConfig, num_clients: int, seed: int
) -> list[tuple[str, Dataset]]:
    """Partitions a data set.

    Args:
        dataset: The training split.
        config: Kind of partition and its columns.
        num_clients: Number of shards.
        seed: Seed of all draws.

    Returns:
        One (name, shard) per client. "shard" drops the remainder of len(dataset) divided by
        num_clients * config.shards_per_client, from the end of the sorted split, so that all shards are
        equal; "natural" drops records without a client, and all but the largest clients.

    Raises:
        DataError: The partition is not possible, or a shard would be empty.
    """
    if config.partition != "natural" and len(dataset) < num_clients:
        raise DataError(
            f"{plural(len(dataset), 'record')} cannot be divided among "
            f"federation.num_clients={num_clients}; use fewer clients"
        )
    shared = _rows(dataset, config, num_clients, seed)
    for name, rows in shared:
        if not rows:
            raise DataError(
                f"client {name!r} has no records; use fewer clients than records, or a larger "
                f"data.dirichlet_alpha"
            )
    return [(name, dataset.select(rows)) for name, rows in shared]


def _rows(dataset: Dataset, config: DataConfig, num_clients: int, seed: int) -> _Rows:
    """Returns (name, row numbers) of each client."""
    match config.partition:
        case "iid":
            return _iid(len(dataset), num_clients, seed)
        case "size":
            return _size(len(dataset), config, num_clients, seed)
        case "dirichlet":
            return _dirichlet(dataset, config, num_clients, seed)
        case "shard":
            return _shard(dataset, config, num_clients, seed)
        case "natural":
            return _natural(dataset, config, num_clients)
        case _:
            assert_never(config.partition)


def _slim(keys: list[Any]) -> Dataset:
    """Returns the row numbers and the column that a partitioner uses."""
    from datasets import Dataset

    return Dataset.from_dict({_ROW: list(range(len(keys))), _KEY: keys})


def _named(load: Callable[[int], Dataset], num_clients: int) -> _Rows:
    """Loads the row numbers of all partitions under generated names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about empty clients in a draw, and old Arrow options
        return [(f"client-{index}", list(load(index)[_ROW])) for index in range(num_clients)]


def _iid(size: int, num_clients: int, seed: int) -> _Rows:
    """Returns equal shards of a shuffled data set."""
    from flwr_datasets.partitioner import IidPartitioner

    partitioner = IidPartitioner(num_partitions=num_clients)
    partitioner.dataset = _slim([0] * size).shuffle(seed=seed, keep_in_memory=True)
    return _named(partitioner.load_partition, num_clients)


def _size(size: int, config: DataConfig, num_clients: int, seed: int) -> _Rows:
    """Size skew: one record each, and shares of the rest drawn from a Dirichlet distribution."""
    import numpy as np
    from flwr_datasets.partitioner import SizePartitioner

    alphas = np.full(num_clients, config.dirichlet_alpha)
    shares = stream(seed, "partition-sizes").dirichlet(alphas)
    ends = np.rint(np.cumsum(shares) * (size - num_clients)).astype(int)
    ends[-1] = size - num_clients
    sizes = [int(each) + 1 for each in np.diff(ends, prepend=0)]
    partitioner = SizePartitioner(partition_sizes=sizes)
    partitioner.dataset = _slim([0] * size).shuffle(seed=seed, keep_in_memory=True)
    return _named(partitioner.load_partition, num_clients)


def _dirichlet(dataset: Dataset, config: DataConfig, num_clients: int, seed: int) -> _Rows:
    """Label skew: the clients' label shares are Dirichlet draws, with at most ten attempts."""
    from flwr_datasets.partitioner import DirichletPartitioner

    partitioner = DirichletPartitioner(
        num_partitions=num_clients,
        partition_by=_KEY,
        alpha=config.dirichlet_alpha,
        min_partition_size=1,
        seed=seed,
    )
    partitioner.dataset = _slim(_keys(dataset, config))
    try:
        return _named(partitioner.load_partition, num_clients)
    except ValueError as error:
        raise DataError(
            f"no Dirichlet partition into federation.num_clients={num_clients} at "
            f"data.dirichlet_alpha={config.dirichlet_alpha}: ten draws left a client without records; "
            f"use fewer clients or a larger data.dirichlet_alpha"
        ) from error


def _shard(dataset: Dataset, config: DataConfig, num_clients: int, seed: int) -> _Rows:
    """Few labels per client: sorts by label and cuts it into equal shards; each client gets some."""
    from flwr_datasets.partitioner import ShardPartitioner

    shards = num_clients * config.shards_per_client
    if len(dataset) < shards:
        raise DataError(
            f"{plural(len(dataset), 'record')} cannot be cut into {shards} shards; use fewer clients "
            f"(federation.num_clients={num_clients}) or data.shards_per_client="
            f"{config.shards_per_client}"
        )
    partitioner = ShardPartitioner(
        num_partitions=num_clients,
        partition_by=_KEY,
        num_shards_per_partition=config.shards_per_client,
        seed=seed,
    )
    partitioner.dataset = _slim(_keys(dataset, config))
    return _named(partitioner.load_partition, num_clients)


def _keys(dataset: Dataset, config: DataConfig) -> list[int]:
    """Returns the rank of each record's value in the skewed column: numbers compare fast."""
    key = "label_column" if config.partition_column is None else "partition_column"
    column = config.partition_column or config.label_column or ""
    values = _column(dataset, column, f"data.{key}")
    empty = [row for row, value in enumerate(values) if value is None]
    if empty:
        raise DataError(
            f"data.{key}={column!r} is empty in {plural(len(empty), 'record')} ({named(empty)}), so "
            f"data.partition={config.partition!r} cannot use it; set data.partition_column"
        )
    ranks = {value: rank for rank, value in enumerate(sorted(set(values)))}
    return [ranks[value] for value in values]


def _column(dataset: Dataset, column: str, key: str) -> list[Any]:
    """Returns all values of a column: None if missing; text is stripped of spaces."""
    if column not in dataset.column_names:
        there = ", ".join(dataset.column_names)
        raise DataError(f"{key}={column!r} is not a column; there are {there}")
    values = [value for _, batch in batches(dataset, [column]) for value in batch[column]]
    if any(isinstance(value, list | dict) for value in values):
        raise DataError(f"{key}={column!r} holds lists; name a column with one value for each record")
    if any(isinstance(value, bytes) for value in values):
        raise DataError(f"{key}={column!r} holds bytes; save one text or whole number for each record")
    known = (None if is_missing(value) else value for value in values)
    return [value.strip() if isinstance(value, str) else value for value in known]


def _natural(dataset: Dataset, config: DataConfig, num_clients: int) -> _Rows:
    """Returns the largest natural clients; records without a client are dropped."""
    from flwr_datasets.partitioner import NaturalIdPartitioner

    column = config.natural_column
    owners = [owner_of(value) for value in _column(dataset, column, "data.natural_column")]
    owned = [row for row, owner in enumerate(owners) if owner]
    available = len({owners[row] for row in owned})
    if available < num_clients:
        raise DataError(
            f"data.natural_column={column!r} names {plural(available, 'client')}, fewer than "
            f"federation.num_clients={num_clients}"
        )
    partitioner = NaturalIdPartitioner(partition_by=_KEY)
    partitioner.dataset = _slim(owners).select(owned)
    with redirect_stderr(io.StringIO()):  # the partitioner draws its own progress bar
        shards = [list(partitioner.load_partition(index)[_ROW]) for index in range(available)]
    everybody = [(owners[rows[0]], rows) for rows in shards]
    return sorted(everybody, key=lambda each: (-len(each[1]), each[0]))[:num_clients]
