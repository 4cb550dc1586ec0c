"""Tests of whose a record is."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from fedslm.data.owners import owner_of, owners_in
from fedslm.data.rows import rows_of
from fedslm.errors import DataError

NOBODY = [None, float("nan"), float("inf"), float("-inf"), pd.NaT, Decimal("NaN"), "", " \t\n", 2.0**53]
NO_VALUES = [b"", b"a", [], ["a"], [1.0], {"id": 1}]


@pytest.mark.parametrize("value", NOBODY + NO_VALUES, ids=repr)
def test_what_names_nobody(value: Any) -> None:
    """Nothing, NaN, NaT, infinity, blanks, floats that are no one number, and what is no one value, name nobody."""
    assert owner_of(value) == ""


def test_equivalent_texts_are_one_person() -> None:
    """An accent that is written by itself makes nobody another; case and inner spaces do."""
    names = ("Ren\u00e9", "Rene\u0301", "RENE\u0301", "Re ne\u0301")
    assert len({owner_of(name) for name in names}) == 3
    assert owner_of(names[0]) == owner_of(names[1])


@settings(max_examples=50, deadline=None)
@given(st.integers(-(2**53) + 1, 2**53 - 1), st.integers(0, 6))
def test_a_number_has_one_name(number: int, digits: int) -> None:
    """A record that turns the column into floats, or into decimals, renames nobody."""
    decimal = Decimal(f"{number}.{'0' * digits}")
    assert {owner_of(each) for each in (number, float(number), decimal)} == {str(number)}


@settings(max_examples=50, deadline=None)
@given(st.decimals(allow_nan=True, allow_infinity=True) | st.floats() | st.text() | st.binary())
def test_no_value_fails(value: Any) -> None:
    """Whatever a record holds gives a text."""
    assert isinstance(owner_of(value), str)


def test_many_digits_stay_apart() -> None:
    """Two long decimals that differ in their last digit are two people."""
    texts = [f"1234567890123456789012345678901234.{digit}" for digit in (5, 6)]
    assert [owner_of(Decimal(text)) for text in texts] == texts


def test_nat_in_a_table_names_nobody() -> None:
    """A time that is not one, as pandas stores it, names nobody; other times do."""
    times = pa.array([-(2**63), 0], pa.int64()).cast(pa.timestamp("ns"), safe=False)
    owners = [owner_of(row["seen"]) for row in rows_of(pa.table({"seen": times}))]
    assert owners[0] == ""
    assert owners[1].startswith("1970-01-01")


@pytest.mark.parametrize("values", [[1.0, 2.0], [1.0, None], [float("nan")]])
def test_floats_are_refused_as_units(values: list[Any]) -> None:
    """A column of floats is refused, with what to do about it."""
    message = r"privacy\.unit_column='patient' holds float64.*save it as integers or text"
    with pytest.raises(DataError, match=message):
        owners_in(Dataset.from_dict({"patient": values}), "patient")


@pytest.mark.parametrize("value", NO_VALUES, ids=repr)
def test_what_is_no_one_value_is_refused_as_the_unit(value: Any) -> None:
    """Lists and objects change with what other records hold, and may hold floats; bytes have no one writing."""
    with pytest.raises(DataError, match=r"unit_column='patient' holds .*save one text or whole number"):
        owners_in(Dataset.from_dict({"patient": [value, value]}), "patient")


@pytest.mark.parametrize(
    ("values", "owners"),
    [
        ([1, None, 0], ["1", "", "0"]),
        (["nan", " a ", ""], ["nan", "a", ""]),
        ([True, False], ["True", "False"]),
    ],
)
def test_integers_and_texts_are_taken(values: list[Any], owners: list[str]) -> None:
    """Whole numbers and texts name people; a text "nan" is a name."""
    assert owners_in(Dataset.from_dict({"patient": values}), "patient") == owners
