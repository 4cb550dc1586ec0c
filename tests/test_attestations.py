"""Results of tests, kept: what counts, what does not, and who waits for whom."""

from __future__ import annotations

import json
import multiprocessing
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedslm import attestations
from fedslm.attestations import (
    attested,
    is_any_known,
    keep,
    known,
    places_of_node,
    places_of_simulation,
    warn_if_cache_is_unusable,
)
from fedslm.errors import RunError

KEY = {"kernels": "AVX2, 1 thread", "rates": [0.1, 1]}
VALUES = {"checks": {"a promise": "1.0"}}


class Tested:
    """A test that counts how often it ran."""

    __test__ = False

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self) -> dict[str, Any]:
        """Runs once more."""
        self.runs += 1
        return VALUES


@pytest.fixture
def places(tmp_path: Path) -> attestations.Places:
    """A node's place, with one result."""
    found = places_of_node(tmp_path)
    keep(found, "self-test", KEY, VALUES)
    return found


def file_in(place: Path) -> Path:
    """The only result in a place."""
    (path,) = place.glob("*.json")
    return path


def test_a_test_runs_once(tmp_path: Path) -> None:
    """The first call runs it; the next gets an equal result, from the file."""
    test, places = Tested(), places_of_node(tmp_path)
    assert known(places, "self-test", KEY) is None
    assert [attested(places, "self-test", KEY, test) for _ in range(3)] == [VALUES] * 3
    assert known(places, "self-test", KEY) == VALUES
    assert test.runs == 1


def test_both_calls_get_the_same_types(tmp_path: Path) -> None:
    """What JSON turns into something else, it turns for the first call too."""
    first, second = (
        attested(places_of_node(tmp_path), "sum", {}, lambda: {"terms": (1, 2.5)}) for _ in range(2)
    )
    assert first == second == {"terms": [1, 2.5]}


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("accounts", KEY),
        ("self-test", {**KEY, "kernels": "AVX2, 2 threads"}),
        ("self-test", {**KEY, "device": "cpu"}),
        ("self-test", {}),
    ],
)
def test_another_test_is_not_known(places: attestations.Places, kind: str, key: dict[str, Any]) -> None:
    """Another kind, and a key with more, less or other values, is another test."""
    assert known(places, "self-test", KEY) == VALUES
    assert known(places, kind, key) is None


@pytest.mark.parametrize("what", ["code_fingerprint", "machine_fingerprint"])
def test_other_code_or_machine_is_tested_anew(
    places: attestations.Places, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """A result holds for the code and the machine that passed, even under another's file name."""
    path, test = file_in(places[0]), Tested()
    monkeypatch.setattr(attestations, what, lambda: "0" * 64)
    assert not is_any_known(places, "self-test")
    path.rename(path.with_name(attestations._name(attestations._test("self-test", KEY))))
    assert known(places, "self-test", KEY) is None
    assert not is_any_known(places, "self-test")
    attested(places, "self-test", KEY, test)
    assert test.runs == 1
    assert is_any_known(places, "self-test")


def test_any_key_of_this_code_is_known(places: attestations.Places) -> None:
    """Whether a kind of test was passed is told without its key."""
    assert is_any_known(places, "self-test")
    assert not is_any_known(places, "accounts")
    assert not is_any_known(places_of_node(places[0].parent / "other"), "self-test")


def changed(old: str, new: str) -> Callable[[str], str]:
    """Changes a text that is there."""

    def change(text: str) -> str:
        assert old in text
        return text.replace(old, new)

    return change


@pytest.mark.parametrize(
    "change",
    [
        changed('"1.0"', '"2.0"'),
        changed("AVX2", "AVX512"),
        changed('"values"', '"figures"'),
        lambda text: text[: len(text) // 2],
        lambda text: text + "x",
        lambda text: text + " " * (1 << 16),
        lambda text: json.dumps([json.loads(text)]),
        lambda text: json.dumps({**json.loads(text), "values": ["1.0"]}),
        lambda text: json.dumps({**json.loads(text), "more": 1}),
        lambda text: "[" * 60_000,
        lambda text: '{"sha256": NaN}',
        lambda text: "null",
        lambda text: "",
    ],
)
def test_a_changed_result_counts_for_nothing(
    places: attestations.Places, change: Callable[[str], str]
) -> None:
    """The test runs again, and its result takes the place of what was there."""
    path, test = file_in(places[0]), Tested()
    sound = path.read_text()
    path.write_text(change(sound))
    assert known(places, "self-test", KEY) is None
    assert not is_any_known(places, "self-test")
    attested(places, "self-test", KEY, test)
    assert test.runs == 1
    assert path.read_text() == sound


def test_a_result_that_is_not_text_counts_for_nothing(places: attestations.Places) -> None:
    """Bytes that are not UTF-8, a directory and a pipe are no results, and nothing waits for one."""
    path = file_in(places[0])
    path.write_bytes(b"\xff\xfe")
    assert known(places, "self-test", KEY) is None
    path.unlink()
    os.mkfifo(path)
    assert known(places, "self-test", KEY) is None
    path.unlink()
    path.mkdir()
    assert known(places, "self-test", KEY) is None


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_result_that_others_can_write_counts_for_nothing(
    places: attestations.Places, mode: int
) -> None:
    """The file must be this user's alone to write."""
    file_in(places[0]).chmod(mode)
    assert known(places, "self-test", KEY) is None
    file_in(places[0]).chmod(0o644)  # others may read it
    assert known(places, "self-test", KEY) == VALUES


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_a_place_that_others_can_write_is_not_used(places: attestations.Places, mode: int) -> None:
    """Nothing in it counts, and nothing is kept there."""
    places[0].chmod(mode)
    assert known(places, "self-test", KEY) is None
    with pytest.raises(RunError, match="only this user can write, and no link: run `chmod 700`"):
        attested(places, "self-test", {}, Tested())
    places[0].chmod(0o700)
    assert known(places, "self-test", KEY) == VALUES


def test_another_users_result_counts_for_nothing(
    places: attestations.Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To any other user, and to root, this user's place is a foreign one."""
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    assert known(places, "self-test", KEY) is None
    with pytest.raises(RunError, match="only this user can write"):
        keep(places, "self-test", KEY, VALUES)


def test_a_link_counts_for_nothing(places: attestations.Places, tmp_path: Path) -> None:
    """Neither a linked result nor a linked place is believed, wherever it leads."""
    path, other = file_in(places[0]), tmp_path / "other"
    path.rename(other)
    path.symlink_to(other)
    assert known(places, "self-test", KEY) is None
    path.unlink()
    other.rename(path)
    (tmp_path / "linked").mkdir()
    linked = places_of_node(tmp_path / "linked")
    linked[0].symlink_to(places[0])
    assert known(linked, "self-test", KEY) is None
    with pytest.raises(RunError, match="no link"):
        keep(linked, "self-test", KEY, VALUES)


def test_only_this_user_reads_what_is_kept(tmp_path: Path) -> None:
    """Whatever the umask says."""
    before = os.umask(0)
    try:
        (place,) = places_of_node(tmp_path)
        keep((place,), "self-test", KEY, VALUES)
    finally:
        os.umask(before)
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (place, file_in(place))]
    assert modes == [0o700, 0o600]


def test_a_failed_test_is_not_kept(tmp_path: Path) -> None:
    """Its error passes through, and the next call tests again."""
    places, test = places_of_node(tmp_path), Tested()
    with pytest.raises(ZeroDivisionError):
        attested(places, "self-test", KEY, lambda: {"x": 1 / 0})
    assert attested(places, "self-test", KEY, test) == VALUES
    assert test.runs == 1


def test_a_simulation_falls_back_to_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the user's cache cannot be used, results are kept in the run, and count there."""
    monkeypatch.setenv("FEDSLM_CACHE", str(tmp_path / "cache"))
    shared, own = places = places_of_simulation(tmp_path / "nodes")
    (tmp_path / "cache").write_text("a file, where a directory is needed")
    test = Tested()
    assert [attested(places, "self-test", KEY, test) for _ in range(2)] == [VALUES] * 2
    assert (test.runs, len(list(own.glob("*.json")))) == (1, 1)
    (tmp_path / "cache").unlink()
    attested(places, "accounts", KEY, test)
    assert [path.name[:8] for path in shared.glob("*.json")] == ["accounts"]


def test_a_cache_that_keeps_nothing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With the remedy; a cache that can be used is no news."""
    monkeypatch.setenv("FEDSLM_CACHE", str(tmp_path / "cache"))
    warn_if_cache_is_unusable()
    assert caplog.text == ""
    monkeypatch.setenv("FEDSLM_CACHE", "/proc/x")
    warn_if_cache_is_unusable()
    assert "/proc/x" in caplog.text
    assert "set FEDSLM_CACHE to a directory that can be written" in caplog.text


def test_a_simulation_without_a_home_uses_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without any cache directory the run's own is the only place."""

    def no_home() -> Path:
        raise RuntimeError("no home directory")

    monkeypatch.delenv("FEDSLM_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert places_of_simulation(tmp_path) == places_of_node(tmp_path)


def test_a_node_has_one_place(tmp_path: Path) -> None:
    """A deployed node believes its own directory, and keeps nothing in the user's cache."""
    keep(places_of_simulation(tmp_path / "run"), "self-test", KEY, VALUES)
    places = places_of_node(tmp_path / "node")
    assert known(places, "self-test", KEY) is None
    (tmp_path / "node").write_text("a file, where a directory is needed")
    with pytest.raises(RunError, match="cannot be written"):
        keep(places, "self-test", KEY, VALUES)


def test_a_large_result_is_refused(tmp_path: Path) -> None:
    """It could not be read again."""
    with pytest.raises(RunError, match="at most 65536"):
        keep(places_of_node(tmp_path), "self-test", KEY, {"text": "x" * (1 << 16)})
    with pytest.raises(ValueError, match="JSON compliant"):
        keep(places_of_node(tmp_path), "self-test", KEY, {"number": float("nan")})


def test_the_oldest_results_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A place stays small, each kind for itself."""
    monkeypatch.setattr(attestations, "_MOST_KEPT", 3)
    places = places_of_node(tmp_path)
    keep(places, "accounts", KEY, VALUES)
    for number in range(5):
        before = set(places[0].iterdir())
        keep(places, "self-test", {"number": number}, VALUES)
        (path,) = set(places[0].iterdir()) - before
        os.utime(path, (number, number))
    found = [number for number in range(5) if known(places, "self-test", {"number": number})]
    assert found == [2, 3, 4]
    assert known(places, "accounts", KEY) == VALUES


def test_a_second_process_waits_for_the_first(tmp_path: Path) -> None:
    """While a test runs, another process that needs it waits, and then runs none."""
    places, begun, goes_on = places_of_node(tmp_path), threading.Event(), threading.Event()

    def slow() -> dict[str, Any]:
        begun.set()
        assert goes_on.wait(60)
        return VALUES

    first = threading.Thread(target=attested, args=(places, "self-test", KEY, slow))
    first.start()
    assert begun.wait(60)
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    second = context.Process(target=_ask, args=(places, answers))
    second.start()
    assert answers.get(timeout=60) == "asks"
    goes_on.set()
    assert answers.get(timeout=60) == VALUES
    first.join()
    second.join()


def _ask(places: attestations.Places, answers: Any) -> None:
    """Asks for the result in another process, where the test itself fails."""
    answers.put("asks")
    answers.put(attested(places, "self-test", KEY, lambda: {"x": 1 / 0}))
