"""Tests of a simulation's data on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset

from fedslm.config import DataConfig, PrivacyConfig, TaskConfig
from fedslm.data import store
from fedslm.data.partition import partition
from fedslm.data.sources import load_train
from fedslm.errors import DataError

Rows = list[dict[str, Any]]
NO_PRIVACY = PrivacyConfig(unit="none")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read from or left in the user's cache of data sets."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def rows(size: int, labels: str = "ab") -> Rows:
    """Rows with a unique text, a label and one of three clients."""
    return [
        {"text": f"note {n}", "label": labels[n % len(labels)], "client": f"site-{n % 3}", "age": n}
        for n in range(size)
    ]


def columns(content: Rows, *names: str) -> Rows:
    """Some columns of rows."""
    return [{name: row[name] for name in names} for row in content]


def write(
    tmp_path: Path,
    train: Rows,
    test: Rows,
    *,
    num_clients: int = 3,
    labels: tuple[str, ...] = (),
    privacy: PrivacyConfig = NO_PRIVACY,
    **data: Any,
) -> store.Shards:
    """Writes a source, and then the shards of it."""
    source = tmp_path / "source"
    source.mkdir(parents=True, exist_ok=True)
    for split, content in (("train", train), ("test", test)):
        text = "".join(json.dumps(row) + "\n" for row in content)
        (source / f"{split}.jsonl").write_text(text)
    config = DataConfig(source=str(source), **data)
    task = TaskConfig(name="classification", labels=labels)
    return store.write(
        tmp_path / "data", config, task, privacy=privacy, num_clients=num_clients, seed=0
    )


def test_a_client_reads_its_own_rows(tmp_path: Path) -> None:
    """Each client's file part has exactly the rows of its shard, with the columns that a run reads."""
    written = write(tmp_path, rows(31), rows(4), partition="natural")
    assert written.names == ("site-0", "site-1", "site-2")
    assert written.sizes == (11, 10, 10)
    for client, name in enumerate(written.names):
        expected = [
            row for row in columns(rows(31), "text", "label", "client") if row["client"] == name
        ]
        assert list(store.read_client(tmp_path / "data", client)) == expected
    assert store.read_evaluation(tmp_path / "data") == columns(rows(4), "text", "label")


@pytest.mark.parametrize("kind", ["iid", "dirichlet"])
def test_rows_on_disk_are_the_partitions(tmp_path: Path, kind: str) -> None:
    """What a client reads is what the partition gave it, in order."""
    write(tmp_path, rows(40), rows(4), partition=kind)
    config = DataConfig(source=str(tmp_path / "source"), partition=kind)  # type: ignore[arg-type]
    train = load_train(config, TaskConfig(name="classification"), 0)
    for client, (_, shard) in enumerate(partition(train, config, 3, 0)):
        assert list(store.read_client(tmp_path / "data", client)) == shard.to_list()


def test_a_large_shard_is_one_part(tmp_path: Path) -> None:
    """Shards beyond the writer's usual block are not cut, nor mixed up with the next."""
    number = 3000
    written = write(tmp_path, rows(number), rows(4), num_clients=1)
    assert written.sizes == (number,)
    assert len(store.read_client(tmp_path / "data", 0)) == number


def test_there_is_no_other_client(tmp_path: Path) -> None:
    """An index beyond the population is an error, not an empty shard."""
    write(tmp_path, rows(9), rows(4))
    for client in (-1, 3):
        with pytest.raises(DataError, match=f"holds 3 clients; there is no client {client}"):
            store.read_client(tmp_path / "data", client)


def test_missing_data_is_an_error(tmp_path: Path) -> None:
    """A client whose data is not there says so."""
    with pytest.raises(DataError, match="cannot be read"):
        store.read_client(tmp_path, 0)


def test_writing_again_changes_nothing(tmp_path: Path) -> None:
    """A resumed run finds its data as it was, even if the source has changed."""
    first = write(tmp_path, rows(9), rows(4))
    before = {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    assert write(tmp_path, rows(12), rows(2)) == first
    assert {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()} == before


def test_a_crash_while_writing_is_made_good(tmp_path: Path) -> None:
    """Data without its index counts as not written, and an index that was cut off is no index."""
    first = write(tmp_path, rows(9), rows(4))
    index = tmp_path / "data" / "shards.json"
    content = index.read_bytes()
    index.unlink()
    assert write(tmp_path, rows(9), rows(4)) == first
    index.write_bytes(content[: len(content) // 2])
    assert write(tmp_path, rows(9), rows(4)) == first


def test_labels_come_from_the_public_split_only(tmp_path: Path) -> None:
    """Class names are the sorted public labels; what private data has beside them is refused."""
    assert write(tmp_path / "one", rows(9, "a"), rows(4, "ba")).labels == ("a", "b")
    with pytest.raises(
        DataError, match=r"training split has labels .*'c' \(3\) in rows 2, 5, 8; known: a, b"
    ):
        write(tmp_path / "two", rows(9, "abc"), rows(4, "ab"))


def test_labels_from_the_config_keep_their_order(tmp_path: Path) -> None:
    """Given class names are taken as they are, also those without a record."""
    written = write(tmp_path, rows(9), rows(4), labels=("c", "b", "a"))
    assert written.labels == ("c", "b", "a")


def test_a_public_label_that_the_config_does_not_know_is_refused(tmp_path: Path) -> None:
    """Given class names hold for the public split too."""
    with pytest.raises(DataError, match=r"evaluation split has labels .*'b'"):
        write(tmp_path, rows(9, "a"), rows(4, "ab"), labels=("a", "c"))


def test_labels_that_are_numbers_become_names(tmp_path: Path) -> None:
    """Numbers are names like any other."""
    numbered = [{**row, "label": row["age"] % 2} for row in rows(9)]
    assert write(tmp_path, numbered, numbered[:4]).labels == ("0", "1")


def test_one_class_is_none(tmp_path: Path) -> None:
    """A public split of one class cannot name the classes."""
    with pytest.raises(DataError, match=r"names only 1 label.*set task\.labels"):
        write(tmp_path, rows(9), rows(4, "a"))


@pytest.mark.parametrize("split", ["training", "evaluation"])
def test_a_missing_label_is_no_class(tmp_path: Path, split: str) -> None:
    """A record without a label is refused: "None" is not a class."""
    content = rows(9)
    content[4]["label"] = None
    train, test = (content, rows(4)) if split == "training" else (rows(9), content)
    with pytest.raises(DataError, match=f"the {split} split"):
        write(tmp_path, train, test)


@pytest.mark.parametrize("blank", ["", "  \n\t", None])
@pytest.mark.parametrize("split", ["training", "evaluation"])
def test_a_blank_text_is_refused_with_its_row(tmp_path: Path, split: str, blank: str | None) -> None:
    """A record without text is named by its row."""
    content = rows(9)
    content[4]["text"] = blank
    train, test = (content, rows(4)) if split == "training" else (rows(9), content)
    with pytest.raises(DataError, match=rf"in the {split} split, 1 record has .*'text' \(rows 4\)"):
        write(tmp_path, train, test)


def test_many_blank_texts_are_counted(tmp_path: Path) -> None:
    """The first five rows are shown, and all are counted."""
    content = [{**row, "text": " "} for row in rows(9)]
    with pytest.raises(DataError, match=r"9 records .*\(rows 0, 1, 2, 3, 4, …\)"):
        write(tmp_path, content, rows(4))


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_empty_split_is_refused(tmp_path: Path, split: str) -> None:
    """A split without records is an error of ours that names it."""
    train, test = (rows(0), rows(4)) if split == "train" else (rows(9), rows(0))
    with pytest.raises(DataError):
        write(tmp_path, train, test)


def test_an_empty_split_of_a_known_shape_is_refused(tmp_path: Path) -> None:
    """The same where the columns are known and the rows are none."""
    (tmp_path / "source").mkdir()
    for split, content in (("train", rows(9)), ("test", rows(4))):
        table = datasets.Dataset.from_list(content)
        table = table.select([]) if split == "train" else table
        table.to_parquet(str(tmp_path / "source" / f"{split}.parquet"))
    config = DataConfig(source=str(tmp_path / "source"))
    task = TaskConfig(name="classification")
    with pytest.raises(DataError):
        store.write(tmp_path / "data", config, task, privacy=NO_PRIVACY, num_clients=3, seed=0)


def test_an_empty_shard_is_refused(tmp_path: Path) -> None:
    """More clients than records leaves somebody without: refused before anything is written."""
    with pytest.raises(DataError, match=r"federation\.num_clients=10"):
        write(tmp_path, rows(9), rows(4), num_clients=10)
    assert not (tmp_path / "data").exists()


def test_a_language_model_has_no_labels(tmp_path: Path) -> None:
    """Without classes neither labels nor a label column are needed."""
    source = tmp_path / "source"
    source.mkdir()
    for split in ("train", "test"):
        (source / f"{split}.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    config = DataConfig(source=str(source), label_column=None)
    written = store.write(
        tmp_path / "data",
        config,
        TaskConfig(name="causal-lm"),
        privacy=NO_PRIVACY,
        num_clients=2,
        seed=0,
    )
    assert (written.labels, written.sizes) == ((), (1, 1))


def test_the_demo_has_five_hospitals(tmp_path: Path) -> None:
    """The embedded data is shared out by hospital, six specialties each."""
    config = DataConfig(source="demo", partition="natural")
    task = TaskConfig(name="classification")
    written = store.write(tmp_path / "data", config, task, privacy=NO_PRIVACY, num_clients=5, seed=0)
    assert written.sizes == (600,) * 5
    assert len(written.labels) == 6
    assert {row["client"] for row in store.read_client(tmp_path / "data", 2)} == {written.names[2]}


def patient(column: str = "patient", *, overlapping: bool = False) -> PrivacyConfig:
    """A patient is the unit."""
    return PrivacyConfig(
        unit="user", unit_column=column, max_records_per_unit=2, overlapping=overlapping
    )


def patients(size: int, owners: list[Any]) -> Rows:
    """Rows whose patients repeat in a cycle."""
    return [{**row, "patient": owners[n % len(owners)]} for n, row in enumerate(rows(size))]


def test_patients_within_one_client_each_are_taken(tmp_path: Path) -> None:
    """Units that lie in one client each are accepted, and their column reaches the client."""
    content = patients(18, ["p0", "p1", "p2", "p3", "p4", "p5"])  # a client has every third row
    write(tmp_path, content, rows(4), partition="natural", privacy=patient())
    owners = [{row["patient"] for row in store.read_client(tmp_path / "data", c)} for c in range(3)]
    assert owners == [{"p0", "p3"}, {"p1", "p4"}, {"p2", "p5"}]


def test_patients_that_are_numbers_are_taken(tmp_path: Path) -> None:
    """A number names a patient, zero too."""
    written = write(
        tmp_path, patients(18, list(range(6))), rows(4), partition="natural", privacy=patient()
    )
    assert written.sizes == (6, 6, 6)


def test_a_unit_column_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """A missing column is named, with those that are there, before anything is written."""
    message = r"privacy\.unit_column='pseudonym' is not a column of the data; it has .*patient"
    with pytest.raises(DataError, match=message):
        write(tmp_path, patients(18, ["a"]), rows(4), privacy=patient("pseudonym"))
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("blank", [None, "", "  \t"])
@pytest.mark.parametrize("overlapping", [False, True])
def test_a_record_of_nobody_is_refused(tmp_path: Path, blank: str | None, overlapping: bool) -> None:
    """Records that do not say whose they are are counted and refused, overlapping or not."""
    content = patients(18, ["p0", "p1", "p2", "p3", "p4", "p5"])
    content[3]["patient"] = content[7]["patient"] = blank
    privacy = patient(overlapping=overlapping)
    with pytest.raises(DataError, match=r"^2 records have no value in privacy\.unit_column"):
        write(tmp_path, content, rows(4), partition="natural", privacy=privacy)
    assert not (tmp_path / "data").exists()


def test_patients_that_are_floats_are_refused(tmp_path: Path) -> None:
    """A column of floats, as pandas makes of integers with gaps, is refused before anything is written."""
    content = patients(18, [0.0, 1.0, 2.0, float("nan"), 4.0, 5.0])
    with pytest.raises(DataError, match=r"unit_column='patient' holds float64.*integers or text"):
        write(tmp_path, content, rows(4), partition="natural", privacy=patient())
    assert not (tmp_path / "data").exists()


def test_a_patient_of_two_clients_is_refused_unless_announced(tmp_path: Path) -> None:
    """Units in several clients are counted and refused; with overlapping=true they are taken."""
    content = patients(18, ["p0", "p1", "p2", "p3", "p4", "p5"])
    content[1]["patient"] = " p0"  # the same name, in another client
    with pytest.raises(DataError, match=r"^1 of 6 units are in several clients.*overlapping=true"):
        write(tmp_path, content, rows(4), partition="natural", privacy=patient())
    assert not (tmp_path / "data").exists()
    written = write(tmp_path, content, rows(4), partition="natural", privacy=patient(overlapping=True))
    assert written.sizes == (6, 6, 6)


def test_without_patients_nobody_asks_for_their_column(tmp_path: Path) -> None:
    """With records as units the data needs no column of owners."""
    written = write(tmp_path, rows(9), rows(4), privacy=PrivacyConfig(unit="record"))
    assert sum(written.sizes) == 9


@pytest.mark.parametrize("damage", [b"", b"nonsense", 0.5])
def test_a_damaged_split_is_an_error_of_ours(tmp_path: Path, damage: bytes | float) -> None:
    """A public split that was cut off or overwritten is refused by name, without a traceback."""
    write(tmp_path, rows(9), rows(4))
    path = tmp_path / "data" / "evaluation.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * damage)] if isinstance(damage, float) else damage)
    with pytest.raises(DataError, match=r"evaluation\.parquet cannot be read, it may be damaged"):
        store.read_evaluation(tmp_path / "data")


@pytest.mark.parametrize("clients", [1, 3, 7])
def test_clients_lie_across_batches(tmp_path: Path, clients: int) -> None:
    """Random access, slices and iteration give the same rows, wherever a client begins in the file."""
    write(tmp_path, rows(2500), rows(4), num_clients=clients, partition="iid")
    seen: list[str] = []
    for client in range(clients):
        found = store.read_client(tmp_path / "data", client)
        whole = list(found)
        assert len(whole) == len(found) == written_sizes(tmp_path)[client]
        for index in (0, 1, len(found) // 2, -1):
            assert found[index] == whole[index]
        assert found[3:6] == whole[3:6]
        with pytest.raises(IndexError, match=f"is beyond {len(found)} rows"):
            _ = found[len(found)]
        seen += [row["text"] for row in whole]
    assert sorted(seen) == sorted(row["text"] for row in rows(2500))


def written_sizes(directory: Path) -> list[int]:
    """The sizes that the index states."""
    sizes: list[int] = json.loads((directory / "data" / "shards.json").read_text())["sizes"]
    return sizes


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-9]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"not numbers"),
        lambda path: np.save(path, np.array([0, 5, 3, 9])),
        lambda path: np.save(path, np.array([0, -1, 3, 9])),
        lambda path: np.save(path, np.array([0.0, 3.0, 6.0, 9.0])),
        lambda path: np.save(path, np.array([[0, 3], [6, 9]])),
        lambda path: np.save(path, np.array([0, 30, 60, 90])),
        lambda path: np.save(path, np.array([{}, 3, 6, 9], dtype=object), allow_pickle=True),
    ],
)
def test_a_damaged_index_is_an_error(tmp_path: Path, damage: Any) -> None:
    """No client reads another one's records; what a pickle would run does not run."""
    write(tmp_path, rows(9), rows(4), partition="iid")
    damage(tmp_path / "data" / "offsets.npy")
    with pytest.raises(DataError, match=r"may be damaged|has 9 rows"):
        [store.read_client(tmp_path / "data", client) for client in range(3)]


def test_data_of_an_earlier_version_can_be_read(tmp_path: Path) -> None:
    """It has one row group of a Parquet file for each client."""
    write(tmp_path, rows(9), rows(4), partition="iid")
    directory = tmp_path / "data"
    before = [list(store.read_client(directory, client)) for client in range(3)]
    store.write_parquet(directory / "train.parquet", [Dataset.from_list(own) for own in before])
    (directory / "train.arrow").unlink()
    assert [list(store.read_client(directory, client)) for client in range(3)] == before


def test_a_short_batch_ends_a_reader(tmp_path: Path) -> None:
    """Rows are found by their number, so a batch with fewer rows than the others is damage, not an end."""
    write(tmp_path, rows(2500), rows(4), num_clients=1, partition="iid")
    path = tmp_path / "data" / "train.arrow"
    batches = pa.ipc.open_file(pa.memory_map(str(path)))
    cut = [batches.get_batch(0), batches.get_batch(1).slice(0, 700), batches.get_batch(2)]
    with pa.ipc.new_file(str(tmp_path / "cut.arrow"), batches.schema) as writer:
        for batch in cut:
            writer.write_batch(batch)
    (tmp_path / "cut.arrow").replace(path)
    with pytest.raises(DataError, match="batch 1 is short"):
        list(store.read_client(tmp_path / "data", 0))
