"""Tests of what a client keeps from round to round."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedslm.federation.client_memory import ClientMemory, Kept
from fedslm.records import AdapterState


def kept(value: float) -> Kept:
    """Something in every room."""
    return Kept(*(AdapterState({"a/b": np.full(2, value + n, np.float32)}) for n in range(3)))


def same(one: Kept, other: Kept) -> bool:
    """Both hold the same bits."""
    rooms = ("local", "control", "error")
    return all(getattr(one, room).sha256() == getattr(other, room).sha256() for room in rooms)


def test_a_round_starts_from_the_last_one_before_it(tmp_path: Path) -> None:
    """Rounds that a client took no part in leave nothing; a round asked again starts where it started."""
    memory = ClientMemory(tmp_path, "run")
    memory.keep(2, kept(2))
    memory.keep(5, kept(5))
    for number, expected in [(1, Kept()), (2, Kept()), (3, kept(2)), (5, kept(2)), (6, kept(5))]:
        assert same(memory.before(number), expected)


def test_two_rounds_are_kept(tmp_path: Path) -> None:
    """Disk use does not grow with the rounds."""
    memory = ClientMemory(tmp_path, "run")
    for number in range(1, 6):
        memory.keep(number, kept(number))
    assert len(list(tmp_path.iterdir())) == 2
    assert same(memory.before(5), kept(4))
    assert same(memory.before(6), kept(5))


def test_nothing_leaves_no_file(tmp_path: Path) -> None:
    """A method that keeps nothing writes nothing."""
    ClientMemory(tmp_path, "run").keep(1, Kept())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../other", "/x", "a*", "ü\n", ""])
def test_a_runs_name_cannot_leave_the_directory(tmp_path: Path, name: str) -> None:
    """A run is named by the server: whatever it calls it, files stay here, and runs apart."""
    memory = ClientMemory(tmp_path / "node", name)
    memory.keep(1, kept(1))
    (path,) = (tmp_path / "node").iterdir()
    assert path.parent == tmp_path / "node"
    assert same(memory.before(2), kept(1))
    assert same(ClientMemory(tmp_path / "node", name + "x").before(2), Kept())
    assert [each.name for each in tmp_path.iterdir()] == ["node"]
