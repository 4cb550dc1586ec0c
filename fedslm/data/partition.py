"""Partitions the training split among the clients of a simulation.

Only row numbers and the column to partition by are read, never the records: partitioning a data set
larger than memory takes little memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, assert_never, overload

from fedslm.config import DataConfig
from fedslm.data.missing import is_missing
from fedslm.data.owners import owner_of
from fedslm.data.tables import batches, named
from fedslm.errors import DataError, plural
from fedslm.rng import stream

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from datasets import Dataset

    Numbers = npt.NDArray[np.int64]

_MOST_DRAWS = 11


@dataclass(frozen=True, eq=False)
class Partition(Sequence[tuple[str, "Dataset"]]):
    """A name and records for each client.

    A client costs two numbers and a name until it is looked at: a data set of its own takes 5 ms.

    Attributes:
        dataset: The training split.
        names: Name of each client.
        rows: Row numbers of all clients, one client after another.
        ends: For each client, where its row numbers end in ``rows``.
        changed: Client to records that stand in place of its own, as many as these.
    """

    dataset: Dataset
    names: Sequence[str]
    rows: Numbers
    ends: Numbers
    changed: Mapping[int, Dataset] = field(default_factory=dict)

    @property
    def sizes(self) -> list[int]:
        """Number of records of each client."""
        import numpy as np

        return [int(each) for each in np.diff(self.ends, prepend=0)]

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> tuple[str, Dataset]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[str, Dataset]]: ...
    def __getitem__(self, index: int | slice) -> tuple[str, Dataset] | list[tuple[str, Dataset]]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        client = range(len(self))[index]
        if client in self.changed:
            return self.names[client], self.changed[client]
        return self.names[client], self._between(client, client + 1)

    def with_changed(self, changed: Mapping[int, Dataset]) -> Partition:
        """Returns the partition with other records for some clients."""
        return replace(self, changed=changed)

    def pieces(self) -> Iterator[Dataset]:
        """Yields the records of all clients in order, in as few data sets as possible."""
        first = 0
        for client in sorted(self.changed):
            if first < client:
                yield self._between(first, client)
            yield self.changed[client]
            first = client + 1
        if first < len(self):
            yield self._between(first, len(self))

    def _between(self, first: int, last: int) -> Dataset:
        """Returns the records of some clients, up to but without ``last``."""
        start = int(self.ends[first - 1]) if first else 0
        return self.dataset.select(self.rows[start : int(self.ends[last - 1])])


def partition(dataset: Dataset, config: DataConfig, num_clients: int, seed: int) -> Partition:
    """Partitions a data set.

    Args:
        dataset: The training split.
        config: Kind of partition and its columns.
        num_clients: Number of shards.
        seed: Seed of all draws.

    Returns:
        Name and shard of each client. "shard" drops the remainder of len(dataset) divided by
        num_clients * config.shards_per_client, so that all shards are equal: random shards,
        and what is less than a shard from the end of the sorted split; "natural" drops records without
        a client, and all but the largest clients.

    Raises:
        DataError: The partition is not possible, or a shard would be empty.
    """
    if config.partition != "natural" and len(dataset) < num_clients:
        raise DataError(
            f"{plural(len(dataset), 'record')} cannot be divided among "
            f"federation.num_clients={num_clients}; use fewer clients"
        )
    found = _partition(dataset, config, num_clients, seed)
    for name, size in zip(found.names, found.sizes, strict=True):
        if not size:
            raise DataError(
                f"client {name!r} has no records; use fewer clients than records, or a larger "
                f"data.dirichlet_alpha"
            )
    return found


def _partition(dataset: Dataset, config: DataConfig, num_clients: int, seed: int) -> Partition:
    """Partitions a data set; clients may be empty."""
    match config.partition:
        case "iid":
            return _iid(dataset, num_clients, seed)
        case "size":
            return _size(dataset, config, num_clients, seed)
        case "dirichlet":
            return _dirichlet(dataset, config, num_clients, seed)
        case "shard":
            return _shard(dataset, config, num_clients, seed)
        case "natural":
            return _natural(dataset, config, num_clients)
        case _:
            assert_never(config.partition)


def _of_sizes(dataset: Dataset, rows: Numbers, sizes: Sequence[int] | Numbers) -> Partition:
    """Returns a partition under generated names."""
    import numpy as np

    names = [f"client-{index}" for index in range(len(sizes))]
    return Partition(dataset, names, rows, np.cumsum(sizes, dtype=np.int64))


def _shuffled(size: int, seed: int) -> Numbers:
    """Returns the row numbers in random order, as ``Dataset.shuffle`` does."""
    import numpy as np

    return np.random.default_rng(seed).permutation(size).astype(np.int64, copy=False)


def _iid(dataset: Dataset, num_clients: int, seed: int) -> Partition:
    """Returns equal shards of a shuffled data set, those of flwr-datasets' IidPartitioner."""
    each, more = divmod(len(dataset), num_clients)
    sizes = [each + (client < more) for client in range(num_clients)]
    return _of_sizes(dataset, _shuffled(len(dataset), seed), sizes)


def _size(dataset: Dataset, config: DataConfig, num_clients: int, seed: int) -> Partition:
    """Size skew: one record each, and shares of the rest drawn from a Dirichlet distribution."""
    import numpy as np

    size, alphas = len(dataset), np.full(num_clients, config.dirichlet_alpha)
    shares = stream(seed, "partition-sizes").dirichlet(alphas)
    ends = np.rint(np.cumsum(shares) * (size - num_clients)).astype(int)
    ends[-1] = size - num_clients
    return _of_sizes(dataset, _shuffled(size, seed), np.diff(ends, prepend=0) + 1)


def _dirichlet(dataset: Dataset, config: DataConfig, num_clients: int, seed: int) -> Partition:
    """Label skew: the clients' shares of a label are Dirichlet draws, repeated if a client gets none.

    References:
        Yurochkin et al. 2019 (arXiv 1905.12022).
    """
    import numpy as np

    keys, drawn = np.array(_keys(dataset, config)), np.random.default_rng(seed)
    rows_of = [np.flatnonzero(keys == key) for key in range(int(keys.max()) + 1)]
    alphas = np.full(num_clients, config.dirichlet_alpha)
    for _ in range(_MOST_DRAWS):
        cuts = [(np.cumsum(drawn.dirichlet(alphas)) * len(rows)).astype(int)[:-1] for rows in rows_of]
        parts = [np.split(rows, cut) for rows, cut in zip(rows_of, cuts, strict=True)]
        clients = [np.concatenate(own) for own in zip(*parts, strict=True)]
        if all(len(own) for own in clients):
            return _shuffled_clients(dataset, clients, drawn)
    raise DataError(
        f"no Dirichlet partition into federation.num_clients={num_clients} at "
        f"data.dirichlet_alpha={config.dirichlet_alpha}: {_MOST_DRAWS} draws left a client without "
        f"records; use fewer clients or a larger data.dirichlet_alpha"
    )


def _shard(dataset: Dataset, config: DataConfig, num_clients: int, seed: int) -> Partition:
    """Few labels per client: sorts by label and cuts it into equal shards; each client gets some.

    References:
        McMahan et al. 2017 (arXiv 1602.05629).
    """
    import numpy as np

    each = config.shards_per_client
    shards = num_clients * each
    if len(dataset) < shards:
        raise DataError(
            f"{plural(len(dataset), 'record')} cannot be cut into {shards} shards; use fewer clients "
            f"(federation.num_clients={num_clients}) or data.shards_per_client={each}"
        )
    size, drawn = len(dataset) // shards, np.random.default_rng(seed)
    order = np.argsort(np.array(_keys(dataset, config)), kind="stable")
    whole = len(dataset) // size  # may be more than are dealt: then which are left out is random too
    pieces = order[: whole * size].reshape(whole, size)
    dealt = drawn.permutation(whole)[:shards]
    clients = [pieces[own].ravel() for own in np.split(dealt, num_clients)]
    return _shuffled_clients(dataset, clients, drawn)


def _shuffled_clients(
    dataset: Dataset, clients: list[Numbers], drawn: np.random.Generator
) -> Partition:
    """Returns a partition in which each client's rows are in random order."""
    import numpy as np

    for rows in clients:
        drawn.shuffle(rows)
    return _of_sizes(dataset, np.concatenate(clients), [len(rows) for rows in clients])


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


def _natural(dataset: Dataset, config: DataConfig, num_clients: int) -> Partition:
    """Returns the largest natural clients; records without a client are dropped."""
    import numpy as np

    column = config.natural_column
    rows_of: dict[str, list[int]] = {}
    for row, value in enumerate(_column(dataset, column, "data.natural_column")):
        if owner := owner_of(value):
            rows_of.setdefault(owner, []).append(row)
    if len(rows_of) < num_clients:
        raise DataError(
            f"data.natural_column={column!r} names {plural(len(rows_of), 'client')}, fewer than "
            f"federation.num_clients={num_clients}"
        )
    largest = sorted(rows_of.items(), key=lambda each: (-len(each[1]), each[0]))[:num_clients]
    rows = np.array([row for _, own in largest for row in own], dtype=np.int64)
    ends = np.cumsum([len(own) for _, own in largest], dtype=np.int64)
    return Partition(dataset, [name for name, _ in largest], rows, ends)
