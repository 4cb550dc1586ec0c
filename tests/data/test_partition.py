"""Tests of whose the examples are in a simulation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from fedslm.config import DataConfig
from fedslm.data.partition import partition
from fedslm.errors import DataError

LABELS = ("x", "y", "z")


def dataset(size: int = 300) -> Dataset:
    """Rows with a unique text, a balanced label, and clients of sizes 3, 2, 1 and none."""
    owners = ["big", "big", "big", "middle", "middle", "small", None]
    rows = [{"text": f"note {n}", "label": LABELS[n % 3], "client": owners[n % 7]} for n in range(size)]
    return Dataset.from_list(rows)


def shared_out(
    kind: str, num_clients: int = 4, seed: int = 0, data: Dataset | None = None, **values: Any
) -> dict[str, list[str]]:
    """Client name to texts."""
    config = DataConfig(source="x", partition=kind, **values)  # type: ignore[arg-type]
    source = dataset() if data is None else data
    return {name: list(shard["text"]) for name, shard in partition(source, config, num_clients, seed)}


@pytest.mark.parametrize("kind", ["iid", "dirichlet"])
@pytest.mark.parametrize("num_clients", [1, 4, 7])
def test_every_record_has_exactly_one_owner(kind: str, num_clients: int) -> None:
    """Shards are disjoint, and together they are the whole split."""
    shards = shared_out(kind, num_clients)
    assert list(shards) == [f"client-{index}" for index in range(num_clients)]
    texts = [text for shard in shards.values() for text in shard]
    assert sorted(texts) == sorted(dataset()["text"])


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "natural"])
def test_partitions_repeat(kind: str) -> None:
    """The same seed gives the same shards in the same order."""
    assert shared_out(kind, 3, 5) == shared_out(kind, 3, 5)


@pytest.mark.parametrize("kind", ["iid", "dirichlet"])
def test_another_seed_gives_other_shards(kind: str) -> None:
    """Random partitions follow the seed."""
    assert shared_out(kind, 3, 0) != shared_out(kind, 3, 1)


def test_iid_shards_are_equal_and_shuffled() -> None:
    """Sizes differ by at most one, and no shard is a stretch of the file."""
    shards = shared_out("iid", 7)
    sizes = [len(shard) for shard in shards.values()]
    assert max(sizes) - min(sizes) <= 1
    assert all(shard != sorted(shard, key=lambda text: int(text[5:])) for shard in shards.values())


def _skew(alpha: float) -> float:
    """Mean total-variation distance of the clients' labels from balance."""
    config = DataConfig(source="x", partition="dirichlet", dirichlet_alpha=alpha)
    shards = [shard["label"] for _, shard in partition(dataset(), config, 5, 0)]
    shares = [[list(shard).count(label) / len(shard) for label in LABELS] for shard in shards]
    return float(np.abs(np.array(shares) - 1 / 3).sum(axis=1).mean() / 2)


def test_a_small_alpha_skews_labels() -> None:
    """The Dirichlet concentration does what its name says."""
    assert _skew(0.1) > 0.3
    assert _skew(1000.0) < 0.1


def test_the_largest_natural_clients_are_taken() -> None:
    """Clients come by size and keep their names; records of nobody are in no shard."""
    shards = shared_out("natural", 2)
    assert list(shards) == ["big", "middle"]
    rows = dataset().to_list()
    for name, texts in shards.items():
        assert texts == [row["text"] for row in rows if row["client"] == name]


def test_natural_clients_of_equal_size_come_by_name() -> None:
    """Ties do not depend on the order of the rows."""
    rows = [{"text": f"{owner}{n}", "client": owner} for owner in "cab" for n in range(2)]
    for data in (rows, rows[::-1]):
        shards = shared_out("natural", 2, data=Dataset.from_list(data), label_column=None)
        assert list(shards) == ["a", "b"]


def test_natural_clients_may_be_numbers() -> None:
    """An identifier that is a number names its client too."""
    rows = [{"text": f"{n}", "client": n % 2} for n in range(5)]
    shards = shared_out("natural", 2, data=Dataset.from_list(rows), label_column=None)
    assert shards == {"0": ["0", "2", "4"], "1": ["1", "3"]}


@pytest.mark.parametrize(
    ("kind", "part"),
    [("iid", "use fewer clients"), ("dirichlet", "num_clients=301"), ("natural", "3 ")],
)
def test_too_many_clients_are_refused(kind: str, part: str) -> None:
    """More clients than there can be is an error that names the number."""
    with pytest.raises(DataError, match=r"federation\.num_clients=301") as caught:
        shared_out(kind, 301)
    assert part in str(caught.value)


def test_nobody_owning_anything_is_refused() -> None:
    """A column of nothing but blanks names no client."""
    data = Dataset.from_dict({"text": ["a", "b"], "client": [None, None]})
    with pytest.raises(DataError, match="names 0 clients"):
        shared_out("natural", 1, data=data, label_column=None)


def test_a_missing_natural_column_lists_what_is_there() -> None:
    """A column that is not there is an error with the columns there are."""
    with pytest.raises(DataError, match=r"natural_column='ward' is not a column.* text, label, client"):
        shared_out("natural", 2, natural_column="ward")


def test_a_dirichlet_partition_that_does_not_come_about_is_refused() -> None:
    """Where the draw would leave a client without records, it is an error that names alpha."""
    with pytest.raises(DataError, match=r"dirichlet_alpha=1e-06|dirichlet_alpha"):
        shared_out("dirichlet", 12, data=dataset(13), dirichlet_alpha=1e-6)
