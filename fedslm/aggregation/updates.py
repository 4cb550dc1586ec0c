"""A round's updates, read as often as a method needs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fedslm.records import ClientUpdate, FloatArray


class Updates(Protocol):
    """Every client's own difference, at its own rank."""

    @property
    def clients(self) -> list[int]:
        """Who sent them."""

    @property
    def weights(self) -> list[float]:
        """What they weigh, > 0."""

    @property
    def keys(self) -> list[str]:
        """What they hold, sorted."""

    def delta(self, index: int, key: str) -> FloatArray:
        """One tensor of one update."""


@dataclass(frozen=True)
class Listed:
    """Updates in memory.

    Attributes:
        updates: At least one.
    """

    updates: Sequence[ClientUpdate]

    @property
    def clients(self) -> list[int]:
        """Who sent them."""
        return [update.client for update in self.updates]

    @property
    def weights(self) -> list[float]:
        """What they weigh."""
        return [update.weight for update in self.updates]

    @property
    def keys(self) -> list[str]:
        """What they hold."""
        return list(self.updates[0].delta)

    def delta(self, index: int, key: str) -> FloatArray:
        """One tensor of one update."""
        return self.updates[index].delta[key]
