"""Files that survive a crash: written beside, synced, then renamed into place."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from fedslm.errors import RunError
from fedslm.records import AdapterState


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path; when the block ends well, it replaces ``path`` atomically.

    Raises:
        RunError: The file cannot be written (disk full, for instance); ``path`` is as it was.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def expand(path: str) -> str:
    """Puts the home directory for ``~`` and the environment's values for ``$NAME``.

    A variable that is not set stays as it is, and so does all if a value is not text: whoever asks
    refuses what still holds a "$".

    >>> expand("$FEDSLM_NOT_SET/notes")
    '$FEDSLM_NOT_SET/notes'
    """
    expanded = os.path.expandvars(os.path.expanduser(path))
    return expanded if is_text(expanded) else path


def is_text(text: str) -> bool:
    """Whether a text can be written as UTF-8; what came from the system as other bytes cannot.

    >>> is_text("é"), is_text(os.fsdecode(bytes([0xE9])))
    (True, False)
    """
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _sync(path: Path) -> None:
    """Waits until a file or a directory is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replaces a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def json_text(value: Any, **options: Any) -> str:
    """A value as JSON, which has neither NaN nor infinity: a figure that is not finite becomes null.

    Args:
        value: What :func:`json.dumps` takes.
        options: As there.

    >>> json_text({"loss": math.nan, "epsilon": math.inf, "rounds": [1, 0.5]})
    '{"loss": null, "epsilon": null, "rounds": [1, 0.5]}'
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    """The same value with None for each figure that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value


@contextmanager
def locked(lock: Path, seconds: float, problem: str) -> Iterator[None]:
    """Keeps other processes out.

    Args:
        lock: The lock's file; it stays.
        seconds: How long another process is waited for.
        problem: What to say if it still has the lock.

    Raises:
        RunError: Another process has the lock, or the file cannot be written.
    """
    held = FileLock(lock, timeout=seconds)
    try:
        held.acquire()
    except Timeout:
        raise RunError(problem) from None
    except OSError as error:
        raise RunError(f"{lock} cannot be locked: {error}") from error
    try:
        yield
    finally:
        held.release()


def read_text(path: Path, most_bytes: int) -> str:
    """Reads a text file that somebody else may have written.

    Args:
        path: The file.
        most_bytes: Its largest size; no more is read.

    Raises:
        OSError: It cannot be read.
        ValueError: It is larger, or no UTF-8.
    """
    with path.open("rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"it has more than {most_bytes} bytes")
    return content.decode("utf-8")


def read_lines(path: Path, most_bytes: int) -> Iterator[bytes]:
    """Yields a file's lines with their ends, one at a time; what has no end is cut to the longest.

    Args:
        path: The file.
        most_bytes: Longest line; no more of it is kept.

    Raises:
        OSError: It cannot be read.
        ValueError: A line that has an end is longer.
    """
    with path.open("rb") as file:
        number = 0
        while line := file.readline(most_bytes + 1):
            number += 1
            if len(line) > most_bytes and (line.endswith(b"\n") or _has_end(file)):
                raise ValueError(f"line {number} has more than {most_bytes} bytes")
            yield line[:most_bytes]


def _has_end(file: BinaryIO) -> bool:
    """Whether another line end follows; leaves the file behind it, or at its end."""
    while piece := file.read(1 << 16):
        if b"\n" in piece:
            return True
    return False


def with_usual_modes(directory: Path) -> None:
    """Gives a directory's weights the mode that any new file has here.

    safetensors writes files that only their owner can read, whatever the others are. Where the umask
    keeps new files private, they stay so.
    """
    probe = directory / f".{os.getpid()}.probe"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for weights in directory.glob("*.safetensors"):
        weights.chmod(stat.S_IMODE(mode))


def save_adapter(path: Path, state: AdapterState) -> None:
    """Replaces a safetensors file atomically."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    with replacing(path) as temporary:
        try:
            save_file(dict(state.tensors), temporary)
        except SafetensorError as error:
            raise OSError(str(error)) from error


def load_adapter(path: Path) -> AdapterState:
    """Reads a safetensors file.

    Raises:
        RunError: The file is missing or damaged.
    """
    return AdapterState(load_tensors(path))


def load_tensors(path: Path) -> dict[str, NDArray[Any]]:
    """Reads a safetensors file, its tensors as they are stored.

    Raises:
        RunError: The file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error


def read_tensors(path: Path, names: Sequence[str]) -> list[NDArray[np.float32]]:
    """Reads some tensors of a safetensors file, and nothing else of it.

    Raises:
        RunError: The file is missing or damaged, or lacks one.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return [file.get_tensor(name) for name in names]
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error
