"""Crash-safe files: written under a temporary name, synced, then renamed into place."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from fedslm.errors import ConfigError, Problem, RunError, Unusable
from fedslm.records import AdapterState


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path; if the block succeeds, that file replaces ``path`` atomically.

    Raises:
        RunError: The file cannot be written (for example, the disk is full); ``path`` is unchanged.
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


def make_run_directory(path: Path, *, may_hold: Collection[str] = ()) -> Path:
    """Makes a new run directory, or takes an empty one.

    Args:
        path: The directory.
        may_hold: Files and directories below it that may exist already.

    Returns:
        The absolute path.

    Raises:
        ConfigError: The path cannot be written as text.
        RunError: The directory holds something else, or cannot be made.
    """
    path = path.expanduser().absolute()
    if not is_text(str(path)):
        message = f"{str(path)!a} is not UTF-8; rename its directory, or name another"
        raise ConfigError([Problem("run.directory", message)])
    allowed = {path / name for name in may_hold}
    above = {parent for each in allowed for parent in each.parents}
    try:
        path.mkdir(parents=True, exist_ok=True)
        occupied = any(
            each not in above and allowed.isdisjoint((each, *each.parents)) for each in path.rglob("*")
        )
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        raise RunError(f"the run directory {path} cannot be made: {error}") from error
    if occupied:
        raise Unusable(
            f"the run directory {path} exists; continue it with --resume {path} (in Python: "
            f"fedslm.resume), or set another run.name or run.directory"
        )
    return path


def expand(path: str) -> str:
    """Expands ``~`` to the home directory and ``$NAME`` to the value of the environment variable.

    An unset variable is left as it is; if any value is not valid text, nothing is expanded. Callers
    refuse results that still contain a "$".

    >>> expand("$FEDSLM_NOT_SET/notes")
    '$FEDSLM_NOT_SET/notes'
    """
    expanded = os.path.expandvars(os.path.expanduser(path))
    return expanded if is_text(expanded) else path


def user_cache() -> Path:
    """Directory of what this user's runs share: ``$FEDSLM_CACHE``, else ``fedslm`` in the user's cache.

    Raises:
        RunError: This user has no home directory, and neither ``FEDSLM_CACHE`` nor ``XDG_CACHE_HOME``
            is set.
    """
    try:
        if own := os.environ.get("FEDSLM_CACHE"):
            return Path(own).expanduser()
        shared = os.environ.get("XDG_CACHE_HOME")
        return (Path(shared) if shared else Path.home() / ".cache") / "fedslm"
    except RuntimeError as error:
        raise RunError(f"{error}: set FEDSLM_CACHE to a directory") from error


def is_text(text: str) -> bool:
    """Whether a text can be written as UTF-8; undecodable bytes from the operating system cannot.

    >>> is_text("é"), is_text(os.fsdecode(bytes([0xE9])))
    (True, False)
    """
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _sync(path: Path) -> None:
    """Waits until a file or directory is on disk."""
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
    """Returns a value as JSON; NaN and infinity become null, because JSON has neither.

    Args:
        value: Anything that :func:`json.dumps` accepts.
        options: Passed to :func:`json.dumps`.

    >>> json_text({"loss": math.nan, "epsilon": math.inf, "rounds": [1, 0.5]})
    '{"loss": null, "epsilon": null, "rounds": [1, 0.5]}'
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    """Returns the value with None in place of every non-finite number."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value


@contextmanager
def locked(lock: Path, seconds: float, problem: str) -> Iterator[None]:
    """Holds a lock file that keeps other processes out.

    Args:
        lock: The lock file; it is not removed.
        seconds: How long to wait for another process.
        problem: Error message if the other process still holds the lock.

    Raises:
        RunError: Another process holds the lock, or the file cannot be written.
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
    """Reads a text file that an untrusted party may have written.

    Args:
        path: The file.
        most_bytes: Maximum size; no more is read.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is larger, or is not UTF-8.
    """
    with path.open("rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"it has more than {most_bytes} bytes")
    return content.decode("utf-8")


def read_lines(path: Path, most_bytes: int) -> Iterator[bytes]:
    """Yields a file's lines with their line ends, one at a time; a line without an end is truncated.

    Args:
        path: The file.
        most_bytes: Maximum length of a line; no more of it is kept.

    Raises:
        OSError: The file cannot be read.
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
    """Whether another line end follows; reads past it, or to the end of the file."""
    while piece := file.read(1 << 16):
        if b"\n" in piece:
            return True
    return False


def with_usual_modes(directory: Path) -> None:
    """Gives the weight files in a directory the mode of any new file.

    safetensors creates files that only their owner can read, unlike other new files. If the umask keeps
    new files private, they stay private.
    """
    probe = directory / f".{os.getpid()}.probe"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for weights in directory.glob("*.safetensors"):
        weights.chmod(stat.S_IMODE(mode))


def save_adapter(path: Path, state: AdapterState) -> None:
    """Replaces a safetensors file with an adapter's tensors atomically."""
    save_tensors(path, state.tensors)


def save_tensors(path: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Replaces a safetensors file atomically."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    with replacing(path) as temporary:
        try:
            save_file(dict(tensors), temporary)
        except SafetensorError as error:
            raise OSError(str(error)) from error


def load_adapter(path: Path) -> AdapterState:
    """Reads a safetensors file.

    Raises:
        RunError: The file is missing or damaged.
    """
    return AdapterState(load_tensors(path))


def load_tensors(path: Path) -> dict[str, NDArray[Any]]:
    """Reads a safetensors file, keeping the stored types of its tensors.

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
    """Reads only the named tensors of a safetensors file.

    Raises:
        RunError: The file is missing or damaged, or lacks a tensor.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return [file.get_tensor(name) for name in names]
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error
