"""A client's own state between rounds, on its own disk.

It holds FedSA's B and head, SCAFFOLD's control variate, and the compression error. There is one file
for each round that used it, and two are kept: a repeated round starts from the same state as before.

Without privacy these tensors are functions of the records, without noise. So each run has a separate
directory (:meth:`fedslm.client.node.Node.run_directory`), and no other run or plan reads it.
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
    """The kept tensors.

    Attributes:
        local: Trained tensors that the method does not share.
        control: The client's control variate.
        error: The part of earlier updates that compression left out.
    """

    local: AdapterState = field(default=_NOTHING)
    control: AdapterState = field(default=_NOTHING)
    error: AdapterState = field(default=_NOTHING)


@dataclass(frozen=True)
class ClientMemory:
    """A client's memory of one run.

    Attributes:
        directory: The run's own directory at this client.
    """

    directory: Path

    def before(self, round: int) -> Kept:
        """The tensors that the last round before this one kept."""
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
        """Keeps the tensors of a round; writes nothing if there are none.

        The files of later rounds are removed: the server went back, and continues from here.
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
        """Rounds for which tensors are kept."""
        found = self.directory.glob("memory-*.safetensors")
        return [int(path.stem.removeprefix("memory-")) for path in found]

    def _path(self, round: int) -> Path:
        """The file of a round."""
        return self.directory / f"memory-{round:05d}.safetensors"
