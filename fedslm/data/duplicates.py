"""Records of the private split that are in the public one too: metrics there would flatter."""

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
    """Number of private records whose input is one of the public split's.

    Args:
        private: Any size; read in pieces.
        public: Held in memory as eight bytes for each record.
        columns: The input's columns; case, spaces and Unicode forms make no difference.
    """
    known = set(_hashes(public, columns))
    return sum(each in known for each in _hashes(private, columns))


def normalised(value: Any) -> str:
    r"""A value as text in which only words count.

    >>> normalised("  Chest PAIN,\tleft ") == normalised("chest pain, left")
    True
    """
    if isinstance(value, list):
        value = " ".join(map(str, value))
    return " ".join(unicodedata.normalize("NFKC", name_of(value)).casefold().split())


def _hashes(dataset: Dataset, columns: list[str]) -> Iterator[int]:
    """Eight bytes for each record."""
    for _, values in batches(dataset, columns):
        for row in zip(*(values[column] for column in columns), strict=True):
            text = "\x1f".join(map(normalised, row)).encode("utf-8", "surrogatepass")
            yield int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
