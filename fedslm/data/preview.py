"""A preview of a simulation's data, before training starts or budget is spent."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from fedslm.config import DataConfig, PrivacyConfig, TaskConfig
from fedslm.data.federated import Shared
from fedslm.data.labels import counts
from fedslm.data.missing import name_of
from fedslm.data.owners import owners_in
from fedslm.data.tables import batches


@dataclass(frozen=True)
class ClientView:
    """One client of a simulation.

    Attributes:
        name: Name of the client.
        records: Number of records.
        units: Number of users; None if the unit is not the user.
        labels: Name to the number of records (token-classification: words) that have it.
    """

    name: str
    records: int
    units: int | None
    labels: dict[str, int]


@dataclass(frozen=True)
class Preview:
    """Statistics of the partitioned data: only for the researcher, since they show private records.

    Attributes:
        clients: Clients in the order of the simulation.
        labels: All names, most frequent first.
        records: Records of the whole training split.
        left_out: Training records that no client has.
        evaluation_records: Records of the public split.
        duplicates: Training records that also occur in the public split.
        cut_share: Share of the tokenised records that exceed the task's maximum length; None if no
            tokenizer is available.
        unusable: Number of tokenised records that give no example; None in the same case.
        looked_at: Number of training records that were tokenised.
    """

    clients: tuple[ClientView, ...]
    labels: tuple[str, ...]
    records: int
    left_out: int
    evaluation_records: int
    duplicates: int
    cut_share: float | None = None
    unusable: int | None = None
    looked_at: int = 0

    def to_json(self) -> dict[str, Any]:
        """Returns the values for JSON."""
        return asdict(self)


def look(shared: Shared, data: DataConfig, task: TaskConfig, privacy: PrivacyConfig) -> Preview:
    """Counts the records, units and labels of each client.

    Args:
        shared: Loaded and partitioned data.
        data: Names of the columns.
        task: Determines what a label is.
        privacy: Determines whether users are counted.
    """
    column = str(privacy.unit_column) if privacy.unit == "user" else None
    clients = tuple(
        ClientView(
            name,
            len(shard),
            None if column is None else len(set(owners_in(shard, column))),
            dict(_counts(shard, data, task).most_common()),
        )
        for name, shard in shared.shards
    )
    total: Counter[str] = Counter()
    for client in clients:
        total.update(client.labels)
    names = [name for name, _ in total.most_common()]
    return Preview(
        clients,
        (*names, *(name for name in shared.labels if name not in total)),
        len(shared.train),
        len(shared.train) - sum(client.records for client in clients),
        len(shared.evaluation),
        shared.duplicates,
    )


def _counts(shard: Any, data: DataConfig, task: TaskConfig) -> Counter[str]:
    """Counts the labels of a shard; for tasks without labels, the values used for partitioning."""
    if data.partition_column is None:
        found = counts(shard, data, task)
        if found or data.partition not in ("dirichlet", "shard"):
            return found
    column = data.partition_column or str(data.label_column)
    values = (value for _, batch in batches(shard, [column]) for value in batch[column])
    return Counter(map(name_of, values))
