"""The updates of a round, which a method may read several times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fedslm.records import ClientUpdate, FloatArray


class Updates(Protocol):
    """All clients' own differences, each at its client's rank."""

    @property
    def clients(self) -> list[int]:
        """The clients that sent the updates."""

    @property
    def weights(self) -> list[float]:
        """The updates' weights, > 0."""

    @property
    def keys(self) -> list[str]:
        """The updates' keys, sorted."""

    def delta(self, index: int, key: str) -> FloatArray:
        """Returns one tensor of one update."""


@dataclass(frozen=True)
class Listed:
    """Updates in memory.

    Attributes:
        updates: At least one.
    """

    updates: Sequence[ClientUpdate]

    @property
    def clients(self) -> list[int]:
        """The clients that sent the updates."""
        return [update.client for update in self.updates]

    @property
    def weights(self) -> list[float]:
        """The updates' weights."""
        return [update.weight for update in self.updates]

    @property
    def keys(self) -> list[str]:
        """The updates' keys."""
        return list(self.updates[0].delta)

    def delta(self, index: int, key: str) -> FloatArray:
        """Returns one tensor of one update."""
        return self.updates[index].delta[key]
