"""Tests of lines that are well signed and linked, and still say what no ledger says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ledgers import FILLED, FILLED_LINES, KEY, filled, lines_of

from fedslm.errors import LedgerError
from fedslm.privacy.chain import HEAD_SUFFIX, LONGEST_LINE, line_hash, read_chain, read_head
from fedslm.privacy.keys import signature_of


def values_of(path: Path, line: int) -> dict[str, Any]:
    """What a line says, without its signature."""
    values: dict[str, Any] = json.loads(lines_of(path)[line])
    del values["signature"]
    return values


def append(path: Path, values: dict[str, Any]) -> None:
    """Adds a line with the right place, link and signature."""
    lines = lines_of(path)
    values = {**values, "index": len(lines), "previous": line_hash(lines[-1][:-1])}
    line = json.dumps({**values, "signature": signature_of(KEY, values)}).encode() + b"\n"
    path.write_bytes(b"".join(lines) + line)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A filled ledger: lines 1 and 3 are committed, 5 and 6 are open."""
    return filled(tmp_path / "ledger.jsonl").path


def test_a_line_that_is_well_made_is_read(path: Path) -> None:
    """The helper of these tests writes lines that pass: what they refuse is refused for what it says."""
    append(path, values_of(path, 1))
    append(path, {"time": 0, "reserve": FILLED_LINES, "release_sha256": "r"})
    assert read_chain(path, KEY.public_key()).events == (*FILLED, FILLED[0])


@pytest.mark.parametrize("reserve", [0, 1, 2, 7, 8, -1, 99])
def test_a_commit_of_what_is_not_open_is_refused(path: Path, reserve: int) -> None:
    """Neither the opening, nor a commit, nor itself, nor what was committed already."""
    append(path, {"time": 0, "reserve": reserve, "release_sha256": "r"})
    with pytest.raises(LedgerError, match=f"not open at line {FILLED_LINES + 1}"):
        read_chain(path, KEY.public_key())


@pytest.mark.parametrize(
    "change",
    [
        {"charge": None},
        {"reserve": 5},
        {"more": 1},
        {"charge": 5},
        {"charge": {}},
        {"charge": {"event": {"sample_rate": 0.1, "noise_multiplier": 1.0, "steps": 1}}},
    ],
    ids=repr,
)
def test_a_line_of_no_kind_or_of_several_is_refused(path: Path, change: dict[str, Any]) -> None:
    """A line is an opening, a charge or a commit: neither nothing nor two of them, nor with more."""
    append(path, {**values_of(path, 1), **change})
    with pytest.raises(LedgerError, match=f"at line {FILLED_LINES + 1}"):
        read_chain(path, KEY.public_key())


@pytest.mark.parametrize(
    "event",
    [
        {"noise_multiplier": 0.0},
        {"noise_multiplier": "3"},
        {"sample_rate": -0.1},
        {"sample_rate": 2.0},
        {"steps": -10},
        {"steps": 0},
        {"steps": True},
        {"steps": None},
        {"more": 1},
    ],
    ids=repr,
)
def test_a_charge_that_means_nothing_is_refused(path: Path, event: dict[str, Any]) -> None:
    """An event that no accountant may see is refused, not counted as nothing."""
    values = values_of(path, 1)
    values["charge"]["event"].update(event)
    append(path, values)
    with pytest.raises(LedgerError, match=f"cannot be read at line {FILLED_LINES + 1}"):
        read_chain(path, KEY.public_key())


def test_a_second_opening_is_refused(path: Path) -> None:
    """A ledger is opened once."""
    append(path, values_of(path, 0))
    with pytest.raises(LedgerError, match=f"changed at line {FILLED_LINES + 1}"):
        read_chain(path, KEY.public_key())


def test_a_ledger_without_an_opening_is_refused(path: Path) -> None:
    """A first line that is a charge says nothing of unit and key."""
    values = {**values_of(path, 1), "index": 0, "previous": "0" * 64}
    line = json.dumps({**values, "signature": signature_of(KEY, values)}).encode() + b"\n"
    path.write_bytes(line)
    with pytest.raises(LedgerError, match="changed at line 1"):
        read_chain(path, KEY.public_key())


def test_a_line_that_is_too_long_is_refused(path: Path) -> None:
    """A line of more than 64 KiB is refused; without an end it is a crash's, and left out."""
    whole = path.read_bytes()
    for padding in (LONGEST_LINE - 2, LONGEST_LINE, 5 * LONGEST_LINE):
        path.write_bytes(whole + b" " * padding + b"{}\n")
        with pytest.raises(LedgerError, match=f"line {FILLED_LINES + 1} has more than {LONGEST_LINE}"):
            read_chain(path, KEY.public_key())
        path.write_bytes(whole + b" " * padding + b"{}")
        found = read_chain(path, KEY.public_key())
        assert (len(found.entries), found.torn) == (FILLED_LINES, True)


def test_a_head_that_is_too_long_is_refused(path: Path) -> None:
    """A head is a few bytes: more are not read."""
    head = path.with_name(path.name + HEAD_SUFFIX)
    head.write_text(" " * 4096 + head.read_text())
    with pytest.raises(LedgerError, match="more than 4096 bytes"):
        read_head(head)
