"""Whose the examples are in a simulation: the training split shared out among clients."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stderr
from typing import TYPE_CHECKING, assert_never

from fedslm.config import DataConfig
from fedslm.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset


def partition(
    dataset: Dataset, config: DataConfig, num_clients: int, seed: int
) -> list[tuple[str, Dataset]]:
    """Shares a data set out.

    Args:
        dataset: The training split.
        config: Kind of partition and its columns.
        num_clients: Number of shards.
        seed: Seed of the shuffle and of the Dirichlet draw.

    Returns:
        One (name, shard) for each client.

    Raises:
        DataError: The partition is not possible, or a shard would be empty.
    """
    match config.partition:
        case "iid":
            shards = _iid(dataset, num_clients, seed)
        case "dirichlet":
            shards = _dirichlet(dataset, config, num_clients, seed)
        case "natural":
            shards = _natural(dataset, config, num_clients)
        case _:
            assert_never(config.partition)
    for name, shard in shards:
        if len(shard) == 0:
            raise DataError(
                f"client {name!r} has no records; use fewer clients than records, or a larger "
                f"data.dirichlet_alpha"
            )
    return shards


def _iid(dataset: Dataset, num_clients: int, seed: int) -> list[tuple[str, Dataset]]:
    """Equal shards of a shuffled data set."""
    from flwr_datasets.partitioner import IidPartitioner

    if len(dataset) < num_clients:
        raise DataError(
            f"{len(dataset)} records cannot be shared out among "
            f"federation.num_clients={num_clients}; use fewer clients"
        )
    partitioner = IidPartitioner(num_partitions=num_clients)
    partitioner.dataset = dataset.shuffle(seed=seed)
    return _named(partitioner.load_partition, num_clients)


def _dirichlet(
    dataset: Dataset, config: DataConfig, num_clients: int, seed: int
) -> list[tuple[str, Dataset]]:
    """Label skew: each client's label shares are drawn from a Dirichlet distribution."""
    from flwr_datasets.partitioner import DirichletPartitioner

    partitioner = DirichletPartitioner(
        num_partitions=num_clients,
        partition_by=str(config.label_column),
        alpha=config.dirichlet_alpha,
        min_partition_size=1,
        seed=seed,
    )
    partitioner.dataset = dataset
    try:
        return _named(partitioner.load_partition, num_clients)
    except ValueError as error:
        raise DataError(
            f"no Dirichlet partition into federation.num_clients={num_clients} at "
            f"data.dirichlet_alpha={config.dirichlet_alpha}: {error}"
        ) from error


def _natural(dataset: Dataset, config: DataConfig, num_clients: int) -> list[tuple[str, Dataset]]:
    """The largest natural clients; records without one are left out."""
    from flwr_datasets.partitioner import NaturalIdPartitioner

    column = config.natural_column
    if column not in dataset.column_names:
        raise DataError(
            f"data.natural_column={column!r} is not a column; "
            f"there are {', '.join(dataset.column_names)}"
        )
    owners = dataset[column]
    owned = dataset.select([row for row, owner in enumerate(owners) if owner is not None])
    partitioner = NaturalIdPartitioner(partition_by=column)
    partitioner.dataset = owned
    available = len(set(owned[column]))
    if available < num_clients:
        raise DataError(
            f"data.natural_column={column!r} names {available} clients, fewer than "
            f"federation.num_clients={num_clients}"
        )
    with redirect_stderr(io.StringIO()):  # the partitioner draws a progress bar of its own
        shards = [partitioner.load_partition(index) for index in range(available)]
    named = [(str(shard[column][0]), shard) for shard in shards]
    return sorted(named, key=lambda item: (-len(item[1]), item[0]))[:num_clients]


def _named(load: Callable[[int], Dataset], num_clients: int) -> list[tuple[str, Dataset]]:
    """Loads all partitions under generated names."""
    return [(f"client-{index}", load(index)) for index in range(num_clients)]
