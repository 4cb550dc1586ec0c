"""Private records that also occur in the public split: metrics on them would be too optimistic."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fedslm.data.missing import name_of
from fedslm.data.tables import batches

if TYPE_CHECKING:
    from datasets import Dataset


def count_duplicates(private: Dataset, public: Dataset, columns: list[str]) -> int:
    """Returns the number of private records whose input also occurs in the public split.

    Args:
        private: Data set of any size; read in chunks.
        public: Data set that takes eight bytes of memory per record.
        columns: Input columns; case, spaces and Unicode form are ignored.
    """
    known = set(_hashes(public, columns))
    return sum(each in known for each in _hashes(private, columns))


def normalised(value: Any) -> str:
    r"""Returns a value as text in which only the words matter.

    >>> normalised("  Chest PAIN,\tleft ") == normalised("chest pain, left")
    True
    """
    if isinstance(value, list):
        value = " ".join(map(str, value))
    return " ".join(unicodedata.normalize("NFKC", name_of(value)).casefold().split())


def _hashes(dataset: Dataset, columns: list[str]) -> Iterator[int]:
    """Yields an eight-byte hash of each record."""
    for _, values in batches(dataset, columns):
        for row in zip(*(values[column] for column in columns), strict=True):
            text = "\x1f".join(map(normalised, row)).encode("utf-8", "surrogatepass")
            yield int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
