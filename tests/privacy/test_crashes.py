"""Tests of crashes and broken disks: the ledger may over-count, never under-count."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.ledgers import (
    AMPLE,
    DELTA,
    EVENT,
    FILLED,
    KEY,
    OTHER,
    charge,
    copy_of,
    filled,
    head_of,
    reserve,
)
from support.tiny import disk_full

from fedslm.errors import LedgerError
from fedslm.privacy.ledger import Ledger
from fedslm.privacy.lines import METRIC
from fedslm.records import Event


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the ledger is."""
    return tmp_path / "ledger" / "client-00000.jsonl"


@pytest.mark.parametrize("spare", [0, 1, 100])
def test_a_full_disk_charges_nothing_and_releases_nothing(path: Path, spare: int) -> None:
    """A charge that cannot be written is an error; what was there stays and goes on later."""
    ledger = filled(path)
    entries, size = ledger.read().entries, path.stat().st_size
    with disk_full(size + spare):
        with pytest.raises(LedgerError, match="cannot be written"):
            reserve(ledger)
        with pytest.raises(LedgerError, match="cannot be written"):
            ledger.commit(5, "release")
    assert Ledger(path, KEY).read().entries == entries
    Ledger(path, KEY).commit(5, "release")
    assert reserve(Ledger(path, KEY)) == len(entries) + 1


@pytest.mark.parametrize("failing", [1, 2, 3, 4])
def test_a_failed_sync_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    """If the disk does not confirm charge or head nothing may be released, and the charge may stand."""
    ledger, real, calls = filled(path), os.fsync, [0]

    def sync(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] == failing:
            raise OSError(5, "Input/output error")
        real(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", sync)
        with pytest.raises(LedgerError, match="cannot be written"):
            reserve(ledger)
    assert Ledger(path, KEY).events() in (FILLED, (*FILLED, EVENT))
    reserve(ledger, OTHER)
    assert Ledger(path, KEY).events()[-1] == OTHER


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    """A ledger without a place is an error of ours."""
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match="cannot be created"):
        Ledger(tmp_path / "file" / "client.jsonl", KEY)


def test_a_lock_that_cannot_be_taken_is_refused(tmp_path: Path) -> None:
    """A lock file that cannot be opened is a ledger error, and nothing is charged."""
    ledger = Ledger(tmp_path / "client.jsonl", KEY)
    (tmp_path / "client.jsonl.lock").mkdir()
    with pytest.raises(LedgerError):
        reserve(ledger)
    assert ledger.events() == ()


def test_a_ledger_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    """A directory in the place of the file is not an empty ledger."""
    (tmp_path / "client.jsonl").mkdir()
    with pytest.raises(LedgerError, match="cannot be read"):
        Ledger(tmp_path / "client.jsonl", KEY).events()


_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("reserve"), st.sampled_from([EVENT, OTHER])),
        st.tuples(st.just("commit"), st.integers(0, 3)),
        st.tuples(st.just("killed"), st.tuples(st.floats(0, 1), st.booleans(), st.binary(max_size=9))),
        st.tuples(st.just("lost"), st.integers(0, 40)),
        st.tuples(st.just("restart"), st.none()),
    ),
    max_size=10,
)


def _killed(path: Path, share: float, with_head: bool, rubbish: bytes) -> None:
    """Leaves what a process killed within ``reserve`` leaves: part of what it wrote, the head or not."""
    before = path.read_bytes() if path.exists() else b""
    head = head_of(path).read_bytes() if head_of(path).exists() else None
    ledger = Ledger(path, KEY)
    ledger.reserve([charge(EVENT, run="dead"), charge(OTHER, run="dead", purpose=METRIC)], AMPLE)
    content = path.read_bytes()
    length = len(before) + round(share * (len(content) - len(before)))
    if length == len(content) and with_head:
        return
    if head is None:
        head = b'{"index": -1, "sha256": "' + b"0" * 64 + b'"}'
    copy_of(path, content[:length] + rubbish.replace(b"\n", b"") * (length < len(content)), head)


@given(steps=_STEPS)
@settings(max_examples=60, deadline=None)
def test_no_history_of_crashes_under_counts(steps: list[tuple[str, object]]) -> None:
    """Whatever is reserved, committed, torn off and restarted, in any order: what returned counts."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "ledger.jsonl"
        ledger, open_ones = Ledger(path, KEY), []
        charged, deaths = Counter[Event](), 0
        for kind, detail in steps:
            match kind, detail:
                case "reserve", Event() as event:
                    open_ones.append(reserve(ledger, event))
                    charged[event] += 1
                case "commit", int(choice) if open_ones:
                    ledger.commit(open_ones.pop(choice % len(open_ones)), "release")
                case "killed", (float(share), bool(with_head), bytes(rubbish)):
                    _killed(path, share, with_head, rubbish)
                    deaths += 1
                case "lost", int(size) if path.exists():  # space was taken, and the data never came
                    with path.open("ab") as file:
                        file.write(b"\0" * size)
                case _:
                    ledger = Ledger(path, KEY)
            found = Counter(Ledger(path, KEY).events())
            assert found >= charged
            assert found <= charged + Counter({EVENT: deaths, OTHER: deaths})
            assert Counter(ledger.events("run")) == charged
            assert ledger.spent(DELTA).steps == sum(event.steps for event in ledger.events())
