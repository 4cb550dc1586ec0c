"""Tests of splitting one file in two so that no one is in both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from fedslm.data.holdout import is_held_out
from fedslm.data.split import PURPOSE, Sides, split_in_two
from fedslm.errors import DataError

ROWS = [{"text": f"note {n}", "patient": f"p{n % 37}", "tags": ["x"] * (n % 3)} for n in range(2100)]


def split(directory: Path, rows: list[dict[str, Any]] = ROWS, **options: Any) -> Sides:
    """Splits rows by patient."""
    values = {"unit": "patient", "fraction": 0.25, "seed": 0, **options}
    return split_in_two(Dataset.from_list(rows), directory, **values)


def read(directory: Path, side: str) -> list[dict[str, Any]]:
    """Rows of one side."""
    rows: list[dict[str, Any]] = pq.read_table(directory / f"{side}.parquet").to_pylist()
    return rows


def test_nobody_is_in_both_files(tmp_path: Path) -> None:
    """Every record is in one file, as it was and in order; no patient is in both; the share is as asked."""
    sides = split(tmp_path)
    train, test = read(tmp_path, "train"), read(tmp_path, "test")
    assert (len(train), len(test)) == (sides.train_records, sides.test_records)
    assert sorted([*train, *test], key=lambda row: int(row["text"][5:])) == ROWS
    owners = [{row["patient"] for row in rows} for rows in (train, test)]
    assert not owners[0] & owners[1]
    assert (len(owners[0]), len(owners[1])) == (sides.train_units, sides.test_units)
    assert sides.test_units == sum(is_held_out(f"p{n}", 0.25, 0, PURPOSE) for n in range(37)) > 0
    for rows in (train, test):
        assert rows == sorted(rows, key=lambda row: int(row["text"][5:]))


def test_the_choice_follows_the_seed(tmp_path: Path) -> None:
    """The same seed gives the same files, another one others, whatever the order of the rows."""
    for name, rows, seed in (("a", ROWS, 0), ("b", ROWS[::-1], 0), ("c", ROWS, 1)):
        split(tmp_path / name, rows, seed=seed)
    tests = [{row["patient"] for row in read(tmp_path / name, "test")} for name in "abc"]
    assert tests[0] == tests[1] != tests[2]


def test_without_a_unit_equal_records_stay_together(tmp_path: Path) -> None:
    """Each record is a unit, but a copy goes where the original is."""
    rows = [{"text": f"note {n % 50}", "label": "x"} for n in range(100)]
    sides = split(tmp_path, rows, unit=None)
    assert (sides.train_records, sides.test_records) == (84, 16)
    texts = [{row["text"] for row in read(tmp_path, side)} for side in ("train", "test")]
    assert not texts[0] & texts[1]


@given(units=st.integers(2, 30), fraction=st.floats(0.001, 0.999), seed=st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_both_files_have_somebody(
    tmp_path_factory: pytest.TempPathFactory, units: int, fraction: float, seed: int
) -> None:
    """Either both sides have units, or the split is refused and nothing is written."""
    directory = tmp_path_factory.mktemp("split")
    rows = [{"text": f"note {n}", "patient": f"p{n}"} for n in range(units)]
    tested = sum(is_held_out(f"p{n}", fraction, seed, PURPOSE) for n in range(units))
    if 0 < tested < units:
        sides = split(directory, rows, fraction=fraction, seed=seed)
        assert (sides.train_units, sides.test_units) == (units - tested, tested)
        return
    with pytest.raises(DataError, match="choose another fraction or another seed"):
        split(directory, rows, fraction=fraction, seed=seed)
    assert not list(directory.iterdir())


def test_one_person_more_moves_nobody_else(tmp_path: Path) -> None:
    """Neighbouring files give neighbouring sides, so epsilon of a run on one side means what it says."""
    rows = [{"text": f"note {n}", "patient": f"p{n % 40}"} for n in range(80)]
    split(tmp_path / "without", rows)
    for new in ("a", "m", "z"):
        split(tmp_path / new, [*rows, {"text": "more", "patient": new}])
        for side in ("train", "test"):
            before, after = read(tmp_path / "without", side), read(tmp_path / new, side)
            assert [row for row in after if row["patient"] != new] == before


@pytest.mark.parametrize(
    ("rows", "unit", "part"),
    [
        ([{"text": "a", "patient": "p"}] * 3, "patient", "only 1 unit"),
        ([{"text": "a", "patient": "p"}, {"text": "a", "patient": " "}], "patient", "rows 1"),
        (
            [{"text": "a", "patient": 1.0}, {"text": "a", "patient": None}],
            "patient",
            "--unit='patient' holds float64",
        ),
        ([{"text": "a"}, {"text": "b"}], "patient", "--unit='patient' is not a column; there are text"),
    ],
)
def test_what_cannot_be_split_is_said(
    tmp_path: Path, rows: list[dict[str, Any]], unit: str, part: str
) -> None:
    """One unit, a record of nobody, a missing column: refused, and nothing is written."""
    with pytest.raises(DataError) as caught:
        split(tmp_path / "out", rows, unit=unit)
    assert part in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("side", ["train", "test"])
def test_no_file_is_overwritten(tmp_path: Path, side: str) -> None:
    """A file that is there stays as it is, and the other is not made."""
    (tmp_path / f"{side}.parquet").write_text("mine")
    with pytest.raises(DataError, match="exists"):
        split(tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_a_run_can_still_hold_units_out(tmp_path: Path) -> None:
    """With the same seed, the training side has units that a run's validation_fraction holds out."""
    rows = [{"text": f"note {n}", "patient": f"p{n}"} for n in range(200)]
    split(tmp_path, rows)
    names = [row["patient"] for row in read(tmp_path, "train")]
    held_out = sum(is_held_out(name, 0.25, 0) for name in names)
    assert 0.1 < held_out / len(names) < 0.4
