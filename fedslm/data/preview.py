"""What a simulation's data looks like, before anything is trained or spent."""

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
        name: Its name.
        records: Number of records.
        units: Number of users; None if the unit is not the user.
        labels: Name to how many records (token-classification: words) have it.
    """

    name: str
    records: int
    units: int | None
    labels: dict[str, int]


@dataclass(frozen=True)
class Preview:
    """Shared-out data in figures: for the researcher's eyes, since they come from private records.

    Attributes:
        clients: In the order of the simulation.
        labels: All names, the most frequent first.
        records: Records of the whole training split.
        left_out: Training records that no client has.
        evaluation_records: Records of the public split.
        duplicates: Training records that are in the public split too.
        cut_share: Share of the records looked at that are longer than the task's longest length; None
            if no tokenizer is at hand.
        unusable: How many of those give no example; None likewise.
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
        """Values for JSON."""
        return asdict(self)


def look(shared: Shared, data: DataConfig, task: TaskConfig, privacy: PrivacyConfig) -> Preview:
    """Counts what each client has.

    Args:
        shared: Loaded and shared-out data.
        data: Columns.
        task: Says what a label is.
        privacy: Says whether users are counted.
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
    """Labels of a shard; for tasks without, the values that the partition goes by."""
    if data.partition_column is None:
        found = counts(shard, data, task)
        if found or data.partition not in ("dirichlet", "shard"):
            return found
    column = data.partition_column or str(data.label_column)
    values = (value for _, batch in batches(shard, [column]) for value in batch[column])
    return Counter(map(name_of, values))
