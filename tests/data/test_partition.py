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


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "size"])
@pytest.mark.parametrize("num_clients", [1, 4, 7])
def test_every_record_has_exactly_one_owner(kind: str, num_clients: int) -> None:
    """Shards are disjoint, and together they are the whole split."""
    shards = shared_out(kind, num_clients)
    assert list(shards) == [f"client-{index}" for index in range(num_clients)]
    texts = [text for shard in shards.values() for text in shard]
    assert sorted(texts) == sorted(dataset()["text"])


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "natural", "shard", "size"])
def test_partitions_repeat(kind: str) -> None:
    """The same seed gives the same shards in the same order."""
    assert shared_out(kind, 3, 5) == shared_out(kind, 3, 5)


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "size"])
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


def test_nan_is_no_natural_client() -> None:
    """Records whose client is NaN are in no shard; 12.0 is the client 12, also beside missing ones."""
    rows = {"text": ["a", "b", "c", "d", "e"], "client": [12.0, float("nan"), 12.0, float("nan"), 7.0]}
    shards = shared_out("natural", 2, data=Dataset.from_dict(rows), label_column=None)
    assert shards == {"12": ["a", "c"], "7": ["e"]}
    with pytest.raises(DataError, match="names 2 clients"):
        shared_out("natural", 3, data=Dataset.from_dict(rows), label_column=None)


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


def test_shards_hold_few_labels() -> None:
    """Sorted by label and cut: two shards of one label each mean at most two labels for a client."""
    data = dataset(300)
    shards = partition(data, DataConfig(source="x", partition="shard"), 6, 0)
    assert all(len(shard) == 50 for _, shard in shards)
    assert max(len(set(shard["label"])) for _, shard in shards) <= 3
    assert sum(len(set(shard["label"])) for _, shard in shards) < 3 * 6
    one = partition(data, DataConfig(source="x", partition="shard", shards_per_client=1), 6, 0)
    assert [len(set(shard["label"])) for _, shard in one] == [1] * 6


def test_equal_shards_leave_a_remainder_out() -> None:
    """Shards are equal, so less records than there are shards are in none."""
    shards = shared_out("shard", 4, data=dataset(303))
    assert [len(shard) for shard in shards.values()] == [74] * 4
    assert len({text for shard in shards.values() for text in shard}) == 296


def _sizes(alpha: float, number: int = 8) -> list[int]:
    """Sizes of the size-skewed shards."""
    shards = shared_out("size", number, dirichlet_alpha=alpha)
    texts = [text for shard in shards.values() for text in shard]
    assert sorted(texts) == sorted(dataset()["text"])
    return [len(shard) for shard in shards.values()]


def test_a_small_alpha_skews_sizes() -> None:
    """Every record has an owner and everybody a record; a small alpha makes few large clients."""
    skewed, even = _sizes(0.2), _sizes(1000.0)
    assert min(skewed) >= 1
    assert max(skewed) > 100
    assert max(even) < 50
    assert _sizes(1e-6)[:-1].count(1) >= 6


def test_another_column_may_be_skewed() -> None:
    """The dirichlet and shard partitions go by data.partition_column, whatever the label is."""
    rows = [{"text": f"{n}", "label": ["x"], "ward": n % 2, "client": "c"} for n in range(80)]
    data = Dataset.from_list(rows)
    for kind in ("shard", "dirichlet"):
        config = DataConfig(
            source="x",
            partition=kind,  # type: ignore[arg-type]
            partition_column="ward",
            shards_per_client=1,
            dirichlet_alpha=0.05,
        )
        shards = partition(data, config, 2, 0)
        wards = [set(shard["ward"]) for _, shard in shards]
        assert sorted(wards, key=str) == [{0}, {1}] or kind == "dirichlet"
        assert sum(len(shard) for _, shard in shards) == 80


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"partition": "shard", "shards_per_client": 200}, "cannot be cut into 400 shards"),
        ({"partition": "shard", "partition_column": "ward"}, "partition_column='ward' is not a column"),
        ({"partition": "dirichlet", "partition_column": "client"}, "is empty in 42 record"),
        ({"partition": "dirichlet", "label_column": "words"}, "holds lists"),
        ({"partition": "natural", "natural_column": "words"}, "holds lists"),
        ({"partition": "natural", "natural_column": "code"}, "holds bytes; save one text"),
    ],
)
def test_a_partition_that_has_nothing_to_go_by_is_refused(values: dict[str, Any], part: str) -> None:
    """Too many shards, a missing column, an empty one, or one of lists: refused with the key."""
    data = dataset(300).add_column("words", [["a"]] * 300).add_column("code", [b"a"] * 300)
    with pytest.raises(DataError, match=r"data\.") as caught:
        partition(data, DataConfig(source="x", **values), 2, 0)
    assert part in str(caught.value)


@pytest.mark.parametrize(("size", "clients"), [(10, 3), (100, 7), (64, 64)])
def test_iid_shards_are_those_of_flwr_datasets(size: int, clients: int) -> None:
    """Another source for the same rows in the same order."""
    from flwr_datasets.partitioner import IidPartitioner

    source = Dataset.from_dict({"text": [str(number) for number in range(size)], "label": ["a"] * size})
    partitioner = IidPartitioner(num_partitions=clients)
    partitioner.dataset = source.shuffle(seed=5, keep_in_memory=True)
    found = partition(source, DataConfig(source="x"), clients, 5)
    for client, (name, shard) in enumerate(found):
        assert name == f"client-{client}"
        assert list(shard["text"]) == list(partitioner.load_partition(client)["text"])


@pytest.mark.parametrize(
    ("size", "clients", "alpha", "labels"),
    [(300, 4, 0.5, 3), (300, 7, 0.3, 3), (97, 7, 100.0, 10), (20, 1, 0.5, 2), (8, 4, 0.5, 3)],
)
@pytest.mark.parametrize("seed", [0, 5])
def test_dirichlet_clients_are_those_of_flwr_datasets(
    size: int, clients: int, alpha: float, labels: int, seed: int
) -> None:
    """Another source for the same draws: the same rows in the same order, also after draws that failed."""
    from flwr_datasets.partitioner import DirichletPartitioner

    theirs = DirichletPartitioner(clients, "label", alpha, min_partition_size=1, seed=seed)
    assert _ours("dirichlet", size, clients, labels, seed, dirichlet_alpha=alpha) == _theirs(
        theirs, size, clients, labels
    )


@pytest.mark.parametrize(
    ("size", "clients", "shards", "labels"),
    [(300, 6, 2, 3), (303, 4, 2, 7), (97, 5, 3, 10), (11, 3, 2, 2), (12, 12, 1, 3)],
)
@pytest.mark.parametrize("seed", [0, 5])
def test_shards_are_those_of_flwr_datasets(
    size: int, clients: int, shards: int, labels: int, seed: int
) -> None:
    """Another source for the same rows in the same order, also where whole shards are left out."""
    from flwr_datasets.partitioner import ShardPartitioner

    theirs = ShardPartitioner(clients, "label", num_shards_per_partition=shards, seed=seed)
    assert _ours("shard", size, clients, labels, seed, shards_per_client=shards) == _theirs(
        theirs, size, clients, labels
    )


def _labelled(size: int, labels: int) -> Dataset:
    """Rows with a unique text and labels of unequal frequency."""
    drawn = np.random.default_rng(1).integers(0, labels, size) * np.random.default_rng(2).integers(
        0, 2, size
    )
    return Dataset.from_dict({"text": [f"{row}" for row in range(size)], "label": drawn.tolist()})


def _ours(kind: str, size: int, clients: int, labels: int, seed: int, **values: Any) -> list[list[str]]:
    """Texts of each client."""
    return list(shared_out(kind, clients, seed, _labelled(size, labels), **values).values())


def _theirs(partitioner: Any, size: int, clients: int, labels: int) -> list[list[str]]:
    """Texts of each client of a partitioner of flwr-datasets."""
    partitioner.dataset = _labelled(size, labels)
    return [list(partitioner.load_partition(client)["text"]) for client in range(clients)]


def test_changed_clients_stand_in_their_place() -> None:
    """Few pieces hold all clients in order, with other records where some were changed."""
    source = Dataset.from_dict({"text": [str(number) for number in range(12)], "label": ["a"] * 12})
    found = partition(source, DataConfig(source="x"), 6, 0)
    other = {client: Dataset.from_dict({"text": [f"new {client}"] * 2}) for client in (0, 3, 5)}
    changed = found.with_changed(other)
    texts = [text for piece in changed.pieces() for text in piece["text"]]
    assert texts == [text for _, shard in changed for text in shard["text"]]
    assert texts[6:8] == ["new 3", "new 3"]
    assert len(list(found.pieces())) == 1
    assert len(list(changed.pieces())) == 5
    assert changed.sizes == [2] * 6
    assert [name for name, _ in changed[1:3]] == ["client-1", "client-2"]
