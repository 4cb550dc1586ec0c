"""Determines the owner of a record from the value in the unit's column."""

from __future__ import annotations

import unicodedata
from decimal import Decimal
from typing import TYPE_CHECKING

from fedslm.data.missing import EXACT, name_of
from fedslm.data.tables import batches
from fedslm.data.values import is_value
from fedslm.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset


def owner_of(value: object) -> str:
    """Returns a record's owner as text; empty if the value names nobody: such a record takes no part.

    Formal guarantees:
        * The result depends only on the value, and the function never fails.
        * NULL, NaN, NaT, infinity and blank text name nobody. A text such as "nan" is a name.
        * A number has one name in every column type: a record that turns a column of integers into
          floats, or into decimals with more digits, does not rename any other owner.
        * A float from 2^53 on, which may be the rounded number of several people, names nobody. Nor do
          bytes, lists and objects: another record may change how they are written.
        * Canonically equivalent Unicode texts (combining accent or precomposed letter) are one name.

    >>> [owner_of(value) for value in (" p7 ", 12, 12.0, Decimal("12.00"), 0, 12.5)]
    ['p7', '12', '12', '12', '0', '12.5']
    >>> [owner_of(value) for value in (None, float("nan"), float("inf"), 2.0**53, "  ", b"a", ["a"])]
    ['', '', '', '', '', '', '']
    """
    if not is_value(value):
        return ""
    if isinstance(value, float) and not abs(value) < EXACT:
        return ""
    if isinstance(value, Decimal) and not value.is_finite():
        return ""
    return unicodedata.normalize("NFC", name_of(value))


def refuse_unfit(dataset: Dataset, column: str, key: str) -> None:
    """Refuses a column that cannot define the unit.

    Rounding to floats may give two people the same number; bytes, lists and objects are not names.

    Args:
        dataset: Any data set with the column.
        column: Column that names the owner.
        key: Config key that sets the column, for errors.

    Raises:
        DataError: The column contains floats, bytes, lists or objects.
    """
    from datasets import ClassLabel, Value

    feature = dataset.features[column]
    dtype = str(getattr(feature, "dtype", ""))
    if not isinstance(feature, Value | ClassLabel) or "binary" in dtype:
        raise DataError(
            f"{key}={column!r} holds {dtype if 'binary' in dtype else 'lists or objects'}, which "
            f"cannot name a unit; save one text or whole number for each record"
        )
    if dtype.startswith("float"):
        raise DataError(
            f"{key}={column!r} holds {dtype}, which may round two people to one number; save it as "
            f'integers or text (in pandas: astype("Int64"), which keeps missing values missing)'
        )


def owners_in(dataset: Dataset, column: str, key: str = "privacy.unit_column") -> list[str]:
    """Returns the owner of each record; empty where a record has none.

    Args:
        dataset: Any data set.
        column: Column that names the owner.
        key: Config key that sets the column, for errors.

    Raises:
        DataError: The column does not exist, or cannot define the unit.
    """
    if column not in dataset.column_names:
        there = ", ".join(dataset.column_names)
        raise DataError(f"{key}={column!r} is not a column; there are {there}")
    refuse_unfit(dataset, column, key)
    values = (value for _, batch in batches(dataset, [column]) for value in batch[column])
    return [owner_of(value) for value in values]
