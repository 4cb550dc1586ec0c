"""Tests of what a missing value is, wherever a label, a client or an owner is read."""

from __future__ import annotations

import json
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from fedslm.config import DataConfig, PrivacyConfig, TaskConfig
from fedslm.data.columns import names_in
from fedslm.data.federated import Shared, owners_in, share_out
from fedslm.data.labels import names_of
from fedslm.data.missing import is_missing, name_of
from fedslm.data.partition import partition
from fedslm.data.rows import rows_of
from fedslm.data.sources import load
from fedslm.data.store import read_client, write_own
from fedslm.data.tables import batches, rows_in
from fedslm.errors import DataError

NAN = float("nan")
MISSING = [None, "", " \t", NAN, np.float64("nan"), Decimal("NaN"), Decimal("sNaN"), pd.NA, pd.NaT]


@pytest.mark.parametrize("value", MISSING, ids=repr)
def test_nothing_has_no_name(value: object) -> None:
    """None, NaN, NaT, NA and blanks are missing, and never a class called "nan"."""
    assert is_missing(value)
    assert (name_of(value), names_in(value)) == ("", ())
    assert names_of(value, TaskConfig(name="classification")) == ()
    assert names_in(["heart", value]) == ("heart",)


@pytest.mark.parametrize("value", [0, False, 0.0, "nan", "NA", "None", Decimal(0)])
def test_what_is_there_is_not_missing(value: object) -> None:
    """Zero is a value, and so is a text that only looks like nothing."""
    assert not is_missing(value)
    assert name_of(value) == ("0" if isinstance(value, float) else str(value))


def test_a_row_holds_none_for_nan() -> None:
    """However rows are read from a table, NaN and a time that is none are None."""
    none = np.array(["NaT", "2024-05-01"], "datetime64[ns]").view("int64")
    day = pa.Array.from_buffers(pa.timestamp("ns"), 2, [None, pa.py_buffer(none.tobytes())])
    table = pa.table({"score": [NAN, 1.5], "day": day})
    dataset = Dataset(table)
    for rows in (rows_of(table), rows_of(table.to_batches()[0]), rows_in(dataset)):
        assert [(row["score"], row["day"] is None) for row in rows] == [(None, True), (1.5, False)]
    ((_, values),) = batches(dataset)
    assert values["score"] == [None, 1.5]
    assert values["day"][0] is None


def shared(directory: Path, ending: str, column: str, value: float | None, **data: Any) -> Shared:
    """Shares out numbers, the last of them missing, from a file."""
    rows = [
        {"text": f"note {n}", "label": float(n % 2), "client": float(n % 2), "patient": n // 2}
        for n in range(8)
    ]
    for split, count in (("test", 2), ("train", 8)):
        chosen = rows[:count] if split == "test" else [*rows, {**rows[0], column: value}]
        path = directory / f"{split}{ending}"
        if ending == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in chosen))
        else:
            columns = {key: pa.array([row[key] for row in chosen]) for key in rows[0]}
            pq.write_table(pa.table(columns), path)
    privacy = PrivacyConfig(unit="none")
    if column == "patient":
        privacy = PrivacyConfig(unit="user", unit_column="patient", overlapping=True)
    config = DataConfig(source=str(directory), **data)
    return share_out(config, TaskConfig(name="classification"), privacy, num_clients=2, seed=0)


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
@pytest.mark.parametrize("value", [NAN, None])
@pytest.mark.parametrize(
    ("column", "data", "part"),
    [
        ("label", {}, r"no label in column 'label' \(rows 8\)"),
        ("patient", {}, r"1 record has no value in privacy\.unit_column='patient'|holds float64"),
        (
            "client",
            {"partition": "dirichlet", "partition_column": "client"},
            r"data\.partition_column='client' is empty in 1 record \(rows 8\)",
        ),
    ],
)
def test_a_missing_number_is_refused_as_missing(
    tmp_path: Path, ending: str, value: float | None, column: str, data: dict[str, Any], part: str
) -> None:
    """NaN in a label, an owner or a partition's column is what null is there, in JSON and Parquet.

    In Parquet it makes a column of integers one of floats, which may not be the unit.
    """
    with pytest.raises(DataError, match=part):
        shared(tmp_path, ending, column, value, **data)


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_a_record_without_a_client_is_left_out(tmp_path: Path, ending: str) -> None:
    """A natural client is never NaN: such records are of nobody, as those with null."""
    found = shared(tmp_path, ending, "client", NAN, partition="natural")
    assert [(name, len(shard)) for name, shard in found.shards] == [("0", 4), ("1", 4)]


def test_nan_may_stand_among_texts(tmp_path: Path) -> None:
    """NaN in a column of texts is a missing text, not a number among them."""
    lines = [{"text": "a", "label": "x"}, {"text": "b", "label": NAN}, {"text": "c", "label": "y"}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [row["label"] for row in load(str(tmp_path), "train").to_list()] == ["x", None, "y"]


@pytest.mark.parametrize("blank", ["", "  "])
def test_a_blank_names_no_client(blank: str) -> None:
    """Blanks name nobody, and spaces around a name make no other client."""
    owners = ["a", "a ", blank, " b", "b", blank]
    dataset = Dataset.from_dict({"text": [str(n) for n in range(6)], "client": owners})
    data = DataConfig(source="x", partition="natural", label_column=None)
    found = {name: list(shard["text"]) for name, shard in partition(dataset, data, 2, 0)}
    assert found == {"a": ["0", "1"], "b": ["3", "4"]}
    assert owners_in(dataset, "client") == ["a", "a", "", "b", "b", ""]


@pytest.mark.parametrize(
    "values",
    [
        [date(2024, 5, 1), date(2024, 5, 2)],
        [Decimal("1.5"), Decimal("2.5")],
        [True, False],
    ],
)
def test_a_client_may_be_named_by_any_value(values: list[object]) -> None:
    """Whatever type names clients, null names nobody."""
    dataset = Dataset(pa.table({"text": ["a", "b", "c"], "client": pa.array([*values, None])}))
    data = DataConfig(source="x", partition="natural", label_column=None)
    found = {name: list(shard["text"]) for name, shard in partition(dataset, data, 2, 0)}
    assert found == {name_of(value): [text] for value, text in zip(values, "ab", strict=True)}


def test_a_node_reads_none_for_nan(tmp_path: Path) -> None:
    """At a real node, where nobody checks records, NaN reaches no task and no owner."""
    write_own(tmp_path, Dataset.from_dict({"text": ["a", "b"], "label": [NAN, 1.0]}), 0)
    assert [row["label"] for row in read_client(tmp_path, 0)] == [None, 1.0]
