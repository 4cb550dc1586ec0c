"""What a client keeps for itself from round to round, on its own disk.

FedSA's B and head, SCAFFOLD's control variate, and what compression lost. One file for each round that
used it, two kept: a round that is asked again starts from where it started before.

Without privacy these tensors are functions of the records, un-noised. So each run has a directory of
its own (:meth:`fedslm.client.node.Node.run_directory`), and none is read by another run or plan.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fedslm.records import AdapterState
from fedslm.storage import load_adapter, save_adapter

_KEPT = 2
_ROOMS = ("local", "control", "error")
_NOTHING = AdapterState({})


@dataclass(frozen=True)
class Kept:
    """What is kept.

    Attributes:
        local: Trained tensors that the method does not share.
        control: The client's control variate.
        error: What compression left out of earlier updates.
    """

    local: AdapterState = field(default=_NOTHING)
    control: AdapterState = field(default=_NOTHING)
    error: AdapterState = field(default=_NOTHING)


@dataclass(frozen=True)
class ClientMemory:
    """A client's memory of one run.

    Attributes:
        directory: The run's own, at this client.
    """

    directory: Path

    def before(self, round: int) -> Kept:
        """What was kept by the last round before this one."""
        earlier = [number for number in self._rounds() if number < round]
        if not earlier:
            return Kept()
        tensors = load_adapter(self._path(max(earlier))).tensors
        rooms = {
            room: AdapterState(
                {
                    key.removeprefix(f"{room}/"): value
                    for key, value in tensors.items()
                    if key.startswith(f"{room}/")
                }
            )
            for room in _ROOMS
        }
        return Kept(**rooms)

    def keep(self, round: int, kept: Kept) -> None:
        """Keeps what a round leaves behind; nothing is written if that is nothing.

        What is kept of later rounds is removed: the server went back, and takes another way from here.
        """
        tensors = {
            f"{room}/{key}": value
            for room in _ROOMS
            for key, value in getattr(kept, room).tensors.items()
        }
        if not tensors:
            return
        save_adapter(self._path(round), AdapterState(tensors))
        rounds = sorted(self._rounds())
        last = rounds.index(round) + 1
        for number in rounds[: max(0, last - _KEPT)] + rounds[last:]:
            self._path(number).unlink(missing_ok=True)

    def _rounds(self) -> list[int]:
        """Rounds that left something."""
        found = self.directory.glob("memory-*.safetensors")
        return [int(path.stem.removeprefix("memory-")) for path in found]

    def _path(self, round: int) -> Path:
        """A round's file."""
        return self.directory / f"memory-{round:05d}.safetensors"
