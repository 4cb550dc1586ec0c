"""Tests of which columns are read: what nobody reads stops nobody."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedslm.config import DataConfig, PrivacyConfig, TaskConfig
from fedslm.data import store
from fedslm.data.columns import Wanted, features_in, needed_to_share
from fedslm.data.sources import load, load_evaluation, load_train
from fedslm.data.split import split_in_two
from fedslm.errors import DataError
from fedslm.inference.inputs import read_inputs

TASK = TaskConfig(name="classification")
COLUMNS = {"text": ["a", "b", "c", "d"], "label": ["x", "y", "x", "y"]}
ROWS = [dict(zip(COLUMNS, row, strict=True)) for row in zip(*COLUMNS.values(), strict=True)]


def odd(kind: str) -> pa.Array:
    """Values of a type that training data do not have."""
    match kind:
        case "map":
            return pa.array([[("k", "v")]] * 4, pa.map_(pa.string(), pa.string()))
        case "union":
            return pa.UnionArray.from_dense(
                pa.array([0] * 4, pa.int8()), pa.array(range(4), pa.int32()), [pa.array([1, 2, 3, 4])]
            )
        case "not UTF-8":
            return pa.array([b"na\xefve"] * 4, pa.binary()).view(pa.string())
        case _:
            return pa.array([[]] * 4, pa.list_(pa.struct([])))


def write_parquet(directory: Path, split: str) -> None:
    """A Parquet file with a map."""
    pq.write_table(pa.table({**COLUMNS, "meta": odd("map")}), directory / f"{split}.parquet")


def write_arrow(kind: str) -> Callable[[Path, str], None]:
    """An Arrow file with a column of some kind."""

    def write(directory: Path, split: str) -> None:
        table = pa.table({"meta": odd(kind), **COLUMNS})
        with pa.ipc.new_file(str(directory / f"{split}.arrow"), table.schema) as writer:
            writer.write_table(table)

    return write


def write_json(directory: Path, split: str) -> None:
    """JSON lines with a column of no one type."""
    metas: list[Any] = [{"k": 1}, "text", [1, "two"], "\ud800"]
    lines = (json.dumps({**row, "meta": meta}) for row, meta in zip(ROWS, metas, strict=True))
    (directory / f"{split}.jsonl").write_text("\n".join(lines))


WRITERS = {
    "parquet": write_parquet,
    "jsonl": write_json,
    **{kind: write_arrow(kind) for kind in ("map", "union", "not UTF-8", "struct")},
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_column_that_nobody_reads_stops_nobody(tmp_path: Path, kind: str) -> None:
    """A column of any type or content stands beside the ones that a run, or a question, needs."""
    for split in ("train", "test"):
        WRITERS[kind](tmp_path, split)
    config = DataConfig(source=str(tmp_path))
    assert load_train(config, TASK, 0).to_list() == ROWS
    assert load_evaluation(config, TASK, 0).to_list() == ROWS
    (path,) = tmp_path.glob("test.*")
    assert read_inputs(path, ["text"]) == [{"text": row["text"]} for row in ROWS]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_column_that_cannot_be_read_is_named(tmp_path: Path, kind: str) -> None:
    """Where all columns are asked for, or this one, it is an error of ours that names the column."""
    WRITERS[kind](tmp_path, "train")
    with pytest.raises(DataError, match=r"\bmeta\b|cannot be written"):
        split_in_two(load(str(tmp_path), "train"), tmp_path / "out", unit=None, fraction=0.5, seed=0)
    assert not (tmp_path / "out" / "train.parquet").exists()


def test_a_database_gives_the_needed_columns(tmp_path: Path) -> None:
    """A query may give columns whose values are of no one type, if nobody reads them."""
    connection = sqlite3.connect(tmp_path / "notes.db")
    connection.execute("CREATE TABLE notes (text TEXT, label TEXT, meta)")
    values = [
        (row["text"], row["label"], meta) for row, meta in zip(ROWS, [1, "x", b"y", 2.5], strict=True)
    ]
    connection.executemany("INSERT INTO notes VALUES (?, ?, ?)", values)
    connection.commit()
    connection.close()
    data = DataConfig(source=f"sqlite:///{tmp_path / 'notes.db'}", train_query="SELECT * FROM notes")
    assert load_train(data, TASK, 0).to_list() == ROWS
    with pytest.raises(DataError, match="column 'meta' cannot be read"):
        load(data.source, "train", data.train_query)


def test_no_row_is_lost_before_a_late_column(tmp_path: Path) -> None:
    """Rows that have none of the needed columns are rows: they are counted, and refused by number."""
    lines = [{"other": 1}] * 1000 + [{"text": "late", "label": "x"}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = load_train(DataConfig(source=str(tmp_path)), TASK, 0)
    assert len(found) == 1001
    assert found[0] == {"text": None, "label": None}
    for number, table in enumerate([{"other": [1, 2]}, COLUMNS]):
        pq.write_table(pa.table(table), tmp_path / f"some-0000{number}-of-00002.parquet")
    rows = load_train(DataConfig(source=str(tmp_path), train_split="some"), TASK, 0).to_list()
    assert rows == [{"text": None, "label": None}] * 2 + ROWS


@pytest.mark.parametrize(
    ("data", "privacy", "wanted"),
    [
        ({}, {"unit": "record"}, {}),
        ({"partition": "natural"}, {"unit": "none"}, {"data.natural_column": "client"}),
        ({"partition": "shard"}, {"unit": "none"}, {"data.label_column": "label"}),
        (
            {"partition": "dirichlet", "partition_column": "ward"},
            {"unit": "user", "unit_column": "who"},
            {"data.partition_column": "ward", "privacy.unit_column": "who"},
        ),
    ],
)
def test_whose_a_record_is_is_read(
    data: dict[str, Any], privacy: dict[str, Any], wanted: dict[str, str]
) -> None:
    """The columns that clients and units come from are needed, and only where they are asked for."""
    config = DataConfig(source="x", **data)
    assert needed_to_share(config, PrivacyConfig(**privacy)) == wanted


def test_a_run_keeps_the_needed_columns_only(tmp_path: Path) -> None:
    """What a run copies to disk holds nothing that it does not read."""
    privacy = PrivacyConfig(unit="user", unit_column="patient", max_records_per_unit=2)
    rows = [{**row, "client": "c", "patient": n, "age": 7} for n, row in enumerate(ROWS)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = DataConfig(source=str(tmp_path), partition="natural")
    data = tmp_path / "data"
    store.write(data, config, TASK, privacy=privacy, num_clients=1, seed=0)
    assert set(store.read_client(data, 0)[0]) == {"text", "label", "client", "patient"}
    assert set(store.read_evaluation(data)[0]) == {"text", "label"}


def described(**labels: list[str]) -> pa.Schema:
    """A schema as the datasets library writes it, with a column of a type of tomorrow's."""
    names = {name: {"names": each, "_type": "ClassLabel"} for name, each in labels.items()}
    features = {"text": {"dtype": "string", "_type": "Value"}, **names, "scan": {"_type": "Hologram"}}
    fields = {"text": pa.string(), **dict.fromkeys(labels, pa.int64()), "scan": pa.int64()}
    return pa.schema(fields, {"huggingface": json.dumps({"info": {"features": features}})})


@pytest.mark.parametrize("second", [["x", "y"], ["y", "x"], ["x", "y", "z"]])
def test_pieces_have_the_same_class_names(tmp_path: Path, second: list[str]) -> None:
    """A number stands for one class in all pieces of a split; what nobody reads may be described anyhow."""
    for number, names in enumerate((["x", "y"], second)):
        table = pa.table([["a", "b"], [0, 1], [0, 0]], schema=described(label=names))
        pq.write_table(table, tmp_path / f"train-{number:05d}-of-00002.parquet")
    data = DataConfig(source=str(tmp_path))
    if second == ["x", "y"]:
        assert list(load_train(data, TASK, 0)["label"]) == ["x", "y"] * 2
    else:
        with pytest.raises(DataError, match=r"from row 2 on have other class names in column 'label'"):
            load_train(data, TASK, 0)


@pytest.mark.parametrize("written", [b"[" * 100_000, b"{", b"[]", b'{"info": 1}', b"\xff"])
def test_what_is_written_of_columns_may_be_anything(written: bytes) -> None:
    """Metadata that cannot be read, however deep, say nothing of the columns."""
    schema = pa.schema([pa.field("text", pa.string())], metadata={b"huggingface": written})
    assert features_in(schema) == {}


def test_a_column_that_stands_twice_is_refused(tmp_path: Path) -> None:
    """Of two columns of one name neither is chosen; an unread one may stand twice."""
    twice = pa.table([["a"], ["b"], ["x"]], names=["text", "text", "label"])
    other = pa.table([["a"], ["x"], [1], [2]], names=["text", "label", "meta", "meta"])
    with pytest.raises(DataError, match="has two columns 'text'"):
        Wanted({"data.text_column": "text"}).fit(twice)
    assert Wanted({"data.text_column": "text"}).fit(other).to_pylist() == [{"text": "a"}]
    for name, table in (("twice", twice), ("other", other)):
        pq.write_table(table, tmp_path / f"{name}.parquet")
    with pytest.raises(DataError, match="has two columns 'text'"):
        load_train(DataConfig(source=str(tmp_path / "twice.parquet")), TASK, 0)
    assert len(load_train(DataConfig(source=str(tmp_path / "other.parquet")), TASK, 0)) == 1


def test_categories_are_texts(tmp_path: Path) -> None:
    """A column of categories, as pandas writes it, is a column of texts, in all pieces of a split."""
    for number, labels in enumerate([["x", "y"], ["z", "x"]]):
        table = pa.table({"text": ["a", "b"], "label": pa.array(labels).dictionary_encode()})
        pq.write_table(table, tmp_path / f"train-0000{number}-of-00002.parquet")
    found = load_train(DataConfig(source=str(tmp_path)), TASK, 0)
    assert [row["label"] for row in found.to_list()] == ["x", "y", "z", "x"]
    split_in_two(found, tmp_path / "out", unit=None, fraction=0.5, seed=0)
