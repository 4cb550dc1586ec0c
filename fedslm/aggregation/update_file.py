"""A round's updates on disk, one float32 row per client, for rules that need all of them at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from fedslm.aggregation.product import Matrix
from fedslm.errors import FederationError, RunError
from fedslm.records import AdapterState, ClientUpdate, FloatArray

_CHUNK = 1 << 16
_ITEM = 4


class Spool:
    """Holds updates until the round is over; closing the spool removes the file.

    Memory does not grow with the number of updates. A client of a lower rank is padded with zeros in
    rows and columns; :meth:`delta` returns its own shapes.

    Args:
        directory: Where the file is stored; created if missing.
        shapes: The tensors of an update at the server's rank.

    Raises:
        RunError: The file cannot be written (for instance because the disk is full).
    """

    def __init__(self, directory: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._whole = dict(sorted(shapes.items()))
        sizes = [math.prod(shape) for shape in self._whole.values()]
        starts = np.cumsum([0, *sizes])
        self._places = {
            key: slice(int(starts[i]), int(starts[i + 1])) for i, key in enumerate(self._whole)
        }
        self._size = int(starts[-1])
        self._path = directory / "updates.f32"  # overwrites the file of an interrupted round
        self._shapes: list[dict[str, tuple[int, ...]]] = []
        self.clients: list[int] = []
        self.weights: list[float] = []
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._file: Any = self._path.open("w+b", buffering=0)
        except OSError as error:
            raise RunError(f"{self._path} cannot be written: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def count(self) -> int:
        """Number of updates so far."""
        return len(self.clients)

    @property
    def keys(self) -> list[str]:
        """Keys of the tensors in each update."""
        return list(self._whole)

    def close(self) -> None:
        """Removes the file."""
        self._file.close()
        self._path.unlink(missing_ok=True)
        with suppress(OSError):  # the directory may hold other files
            self._path.parent.rmdir()

    def add(self, update: ClientUpdate) -> None:
        """Writes one update.

        Raises:
            FederationError: A tensor is missing, is larger than the server's, or is not finite.
            RunError: The disk is full, or the file cannot be written.
        """
        if not update.delta.is_finite():
            raise FederationError(f"client {update.client}: the update is not finite")
        row = np.zeros(self._size, np.float32)
        for key, shape in self._whole.items():
            if key not in update.delta.tensors:
                raise FederationError(f"client {update.client}: {key} is missing")
            tensor = update.delta[key]
            if tensor.ndim != len(shape) or any(map(int.__gt__, tensor.shape, shape)):
                raise FederationError(
                    f"client {update.client}: {key} of shape {tensor.shape} does not fit {shape}"
                )
            place = row[self._places[key]].reshape(shape)
            place[tuple(slice(length) for length in tensor.shape)] = tensor
        try:
            self._file.seek(self.count * self._size * _ITEM)
            view = memoryview(row.tobytes())
            while len(view):
                view = view[self._file.write(view) :]
        except OSError as error:
            raise RunError(f"{self._path} cannot be written: {error}") from error
        self._shapes.append(update.delta.shapes)
        self.clients.append(update.client)
        self.weights.append(update.weight)

    def delta(self, index: int, key: str) -> FloatArray:
        """Returns one tensor of one update, as it was added."""
        place, shape = self._places[key], self._shapes[index][key]
        flat = self._read(index * self._size + place.start, place.stop - place.start)
        whole = flat.reshape(self._whole[key])
        return np.ascontiguousarray(whole[tuple(slice(length) for length in shape)])

    def update(self, index: int) -> ClientUpdate:
        """Returns one update, as it was added."""
        delta = AdapterState({key: self.delta(index, key) for key in self._whole})
        return ClientUpdate(self.clients[index], delta, self.weights[index])

    def columns(
        self, chunk: int = _CHUNK, scale: Matrix | float = 1.0
    ) -> Iterator[tuple[slice, Matrix]]:
        """Yields all updates' values, a block of coordinates at a time.

        Args:
            chunk: Number of coordinates in a block.
            scale: Factor of each update, (count, 1), or one factor for all.

        Yields:
            (slice of the coordinates, values (count, up to chunk)).
        """
        for start in range(0, self._size, chunk):
            width = min(chunk, self._size - start)
            rows = [self._read(i * self._size + start, width) for i in range(self.count)]
            yield slice(start, start + width), np.stack(rows).astype(np.float64) * scale

    def gram(self, scale: Matrix | float = 1.0) -> Matrix:
        """Returns the inner products of all pairs of updates, (count, count)."""
        total: Matrix = np.zeros((self.count, self.count))
        for _, values in self.columns(scale=scale):
            total += values @ values.T
        return total

    def square_distances(self, scale: Matrix | float = 1.0) -> Matrix:
        """Returns ‖uᵢ - uⱼ‖² of all pairs, from differences: exact even if updates nearly coincide."""
        total: Matrix = np.zeros((self.count, self.count))
        for _, values in self.columns(scale=scale):
            for index, row in enumerate(values):
                total[index] += np.square(values - row).sum(axis=1)
        return total

    def unflatten(self, flat: Matrix) -> AdapterState:
        """Reshapes a flat row into tensors."""
        return AdapterState(
            {
                key: flat[self._places[key]].reshape(shape).astype(np.float32)
                for key, shape in self._whole.items()
            }
        )

    def _read(self, first: int, length: int) -> FloatArray:
        """Reads ``length`` values from position ``first``."""
        self._file.seek(first * _ITEM)
        content = self._file.read(length * _ITEM)
        if len(content) != length * _ITEM:
            raise RunError(f"{self._path} is shorter than it was written")
        return np.frombuffer(content, np.float32)
