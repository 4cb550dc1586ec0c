"""Results of tests that this code passed on this machine, kept so that each test runs once.

A *place* is a directory for such results. A simulation's is in this user's cache, and in its run where
the cache cannot be used; a deployed node's is in the node's own directory, and no other.

Formal guarantees:
    * A result counts only for the same code (:func:`fedslm.fingerprint.code_fingerprint`), the same
      machine, the same kind of test and the same key. Whatever else the test depends on belongs in
      the key.
    * A result counts only if this user owns its file and its place, and nobody else can write either.
      A link counts as neither.
    * Whatever is missing, cut, changed, too large or of another form counts for nothing: the test runs
      again. A failed test is not kept.
    * The results are not signed: whoever can act as this user can also change the code. On Windows
      owners are not compared; the user's profile keeps others out.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from fedslm import layout
from fedslm.errors import RunError
from fedslm.fingerprint import code_fingerprint, machine_fingerprint
from fedslm.storage import locked, replacing, user_cache

logger = logging.getLogger(__name__)
_LOCK_SECONDS = 300.0
_MOST_BYTES = 1 << 16  # of one result
_MOST_KEPT = 500  # of one kind in one place; the oldest go first

T = TypeVar("T")

Places = tuple[Path, ...]
"""Directories, the preferred one first: a result in any of them counts."""


def places_of_simulation(nodes: Path) -> Places:
    """This user's cache, then a run's ``nodes`` directory, in case the cache is not usable.

    For simulated nodes, and for the server of any run.
    """
    own = nodes / layout.ATTESTATIONS
    try:
        return (user_cache() / layout.ATTESTATIONS, own)
    except RunError:
        return (own,)


def warn_if_cache_is_unusable() -> None:
    """Warns that a simulation must test and measure again, since this user's cache keeps nothing."""
    try:
        place = user_cache() / layout.ATTESTATIONS
        _prepare(place)
        if os.access(place, os.W_OK | os.X_OK):
            return
        problem = f"{place} cannot be written"
    except RunError as error:
        problem = str(error)
    logger.warning(
        "%s: this run tests this machine itself, and so does every later one; set FEDSLM_CACHE to a "
        "directory that can be written",
        problem,
    )


def cache_problem() -> str:
    """Why this user's cache cannot be used; empty if it can. Creates nothing."""
    try:
        place = user_cache() / layout.ATTESTATIONS
        nearest = next(each for each in (place, *place.absolute().parents) if os.path.lexists(each))
        is_private = nearest != place or _is_private(place)
    except (OSError, RunError) as error:
        return str(error)
    if not is_private:
        return f"{place} can be written by others, or is not a directory"
    can_write = nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
    return "" if can_write else f"{place} cannot be written"


def places_of_node(directory: Path) -> Places:
    """A deployed node's only place: it believes no file that another program may have written."""
    return (directory / layout.ATTESTATIONS,)


def attested(
    places: Places, kind: str, key: Mapping[str, Any], test: Callable[[], Mapping[str, Any]]
) -> dict[str, Any]:
    """Returns what a test found, and runs the test only if no place has its result.

    Other processes that need a test of this kind wait meanwhile, and then find the result.

    Args:
        places: Where results are kept.
        kind: Name of the test: lower-case letters and hyphens.
        key: What the result depends on besides code and machine, as values of JSON.
        test: Runs the test; its result is a mapping of values of JSON. What it raises passes through.

    Raises:
        RunError: No place can be written, or another process tested for five minutes.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     places = places_of_node(Path(directory))
    ...     first = attested(places, "sum", {"terms": [1, 2]}, lambda: {"sum": 1 + 2})
    ...     attested(places, "sum", {"terms": [1, 2]}, lambda: 1 / 0)
    {'sum': 3}
    """
    found = known(places, kind, key)
    if found is not None:
        return found
    with ExitStack() as held:
        _in_first(places, lambda place: held.enter_context(_alone(place, kind)))
        found = known(places, kind, key)  # another process may have been first
        if found is None:
            found = json.loads(_canonical(dict(test())))
            keep(places, kind, key, found)
        return found


def known(places: Places, kind: str, key: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the result of a test with exactly this key; None if there is none that counts."""
    test = _test(kind, key)
    for place in places:
        kept = _read(place / _name(test))
        if kept is not None and _canonical(kept["test"]) == _canonical(test):
            return dict(kept["values"])
    return None


def is_any_known(places: Places, kind: str) -> bool:
    """Whether this code has passed a test of a kind on this machine, with any key."""
    here = _test(kind, {})
    for path in (path for place in places for path in place.glob(f"{kind}-*.json")):
        kept = _read(path)
        if kept is not None and {**kept["test"], "key": {}} == here:
            return True
    return False


def keep(places: Places, kind: str, key: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Keeps the result of a test in the first place that can be written.

    Args:
        places: Where results are kept.
        kind: Name of the test: lower-case letters and hyphens.
        key: What the result depends on besides code and machine, as values of JSON.
        values: The result, as values of JSON.

    Raises:
        RunError: No place can be written, or the result is larger than 64 kB.
    """
    test = _test(kind, key)
    body = {"test": test, "values": dict(values)}
    text = _canonical({**body, "sha256": _sha256(body)}) + "\n"
    if len(text.encode()) > _MOST_BYTES:
        raise RunError(f"{kind}: a result of {len(text)} characters is not kept; at most {_MOST_BYTES}")
    _in_first(places, lambda place: _write(place, test, text))


def _in_first(places: Places, act: Callable[[Path], T]) -> T:
    """Acts in the first place where that is possible; raises the last one's RunError if in none."""
    for place in places[:-1]:
        try:
            return act(place)
        except RunError as error:
            logger.info("%s is not used: %s", place, error)
    return act(places[-1])


@contextmanager
def _alone(place: Path, kind: str) -> Iterator[None]:
    """Keeps out other processes that test the same."""
    _prepare(place)
    problem = f"another process has tested {kind!r} for {_LOCK_SECONDS:.0f} s: stop it, or try later"
    with locked(place / f"{kind}.lock", _LOCK_SECONDS, problem):
        yield


def _write(place: Path, test: dict[str, Any], text: str) -> None:
    """Writes one result, and removes the oldest beyond the most that are kept."""
    _prepare(place)
    with replacing(place / _name(test)) as temporary:
        temporary.touch(mode=0o600)
        temporary.write_text(text, encoding="utf-8")
    with suppress(OSError):  # another process was first
        kept = sorted(place.glob(f"{test['kind']}-*.json"), key=lambda path: path.stat().st_mtime)
        for path in kept[:-_MOST_KEPT]:
            path.unlink()


def _test(kind: str, key: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that a result is bound to."""
    code, machine = code_fingerprint(), machine_fingerprint()
    return {"kind": kind, "key": dict(key), "code": code, "machine": machine}


def _name(test: dict[str, Any]) -> str:
    """File name of a test's result."""
    return f"{test['kind']}-{_sha256(test)[:32]}.json"


def _sha256(value: dict[str, Any]) -> str:
    """Hash of a value of JSON, whatever the order of its keys."""
    return hashlib.sha256(_canonical(value).encode()).hexdigest()


def _canonical(value: dict[str, Any]) -> str:
    """A value's only text; there is none for NaN or infinity, which JSON lacks."""
    return json.dumps(value, sort_keys=True, allow_nan=False)


def _prepare(place: Path) -> None:
    """Makes a place that only this user can read.

    Raises:
        RunError: It cannot be made, or others can write it.
    """
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        is_private = _is_private(place)
    except OSError as error:
        raise RunError(f"{place} cannot be written: {error}") from error
    if not is_private:
        raise RunError(
            f"{place} must be a directory that only this user can write, and no link: run "
            f"`chmod 700` on it, or remove it"
        )


def _is_private(place: Path) -> bool:
    """True if a place is a directory that this user owns and nobody else can write."""
    status = place.lstat()
    return stat.S_ISDIR(status.st_mode) and _is_own(status)


def _is_own(status: os.stat_result) -> bool:
    """True if this user owns a file or directory, and nobody else can write it."""
    if not hasattr(os, "geteuid"):  # Windows
        return True
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _read(path: Path) -> dict[str, Any] | None:
    """Content of a result's file: the test and its values; None if it does not count."""
    try:
        if not _is_private(path.parent):
            return None
        body = json.loads(_own_text(path))
        found = body.pop("sha256")
        is_whole = isinstance(body["test"], dict) and isinstance(body["values"], dict)
        return body if is_whole and found == _sha256(body) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _own_text(path: Path) -> str:
    """Text of a small regular file that only this user can write.

    Raises:
        OSError: It is a link, or cannot be read.
        ValueError: It is not such a file, or not UTF-8.
    """
    with open(path, "rb", opener=_no_link) as file:
        status = os.fstat(file.fileno())
        content = file.read(_MOST_BYTES + 1)
    if not (stat.S_ISREG(status.st_mode) and _is_own(status) and len(content) <= _MOST_BYTES):
        raise ValueError(f"{path} is not a small file that only this user can write")
    return content.decode("utf-8")


def _no_link(path: str, flags: int) -> int:
    """Opens a file without following a link, and without waiting for a pipe's other end."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
