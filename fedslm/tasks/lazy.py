"""Examples of data larger than memory: rows stay on disk and are tokenised on access."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import overload

from fedslm.tasks.base import Example, Prepared, Row


class LazyExamples(Sequence[Example]):
    """Examples that are created on access and not kept in memory.

    Args:
        rows: All rows of a client.
        kept: Row index of each example.
        owners: Owner of each example.
        prepare: Tokenises rows; the result for a row must not depend on the other rows.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        kept: Sequence[int],
        owners: Sequence[str],
        prepare: Callable[[Sequence[Row]], Prepared],
    ) -> None:
        self._rows, self._kept, self._prepare = rows, kept, prepare
        self.owners = owners

    def __len__(self) -> int:
        return len(self._kept)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        (example,) = self._prepare([self._rows[self._kept[index]]]).examples
        return replace(example, owner=self.owners[index])


def owners_of(examples: Sequence[Example]) -> Sequence[str]:
    """Returns the owner of each example, without tokenising lazy examples."""
    if isinstance(examples, LazyExamples):
        return examples.owners
    return [example.owner for example in examples]
