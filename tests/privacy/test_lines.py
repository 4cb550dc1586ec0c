"""Tests of lines that are well signed and linked, and still say what no ledger says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.ledgers import FILLED, FILLED_LINES, KEY, filled, lines_of, reserve

from fedslm.errors import LedgerError, PolicyRefused
from fedslm.privacy.chain import HEAD_SUFFIX, LONGEST_LINE, line_hash, read_chain, read_head
from fedslm.privacy.keys import signature_of
from fedslm.privacy.ledger import Ledger
from fedslm.privacy.statement import read_statement


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
    with pytest.raises(LedgerError, match=rf"(not open|cannot be read) at line {FILLED_LINES + 1}"):
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


@pytest.mark.parametrize(
    ("part", "other"),
    [
        (b'{"index"', b' {"index"'),
        (b'"}', b'"}\r'),
        (b'": ', b'":'),
        (b'"steps": 10', b'"steps": 1, "steps": 10'),
        (b'"charge": {', b'"charge": {"round": 9}, "charge": {'),
        (b'"noise_multiplier": 3.0', b'"noise_multiplier": 3.00'),
        (b'"clip_norm": 0.5', b'"clip_norm": 5e-1'),
        (b"adapter", rb"\u0061dapter"),
        (b'{"index"', b'\xef\xbb\xbf{"index"'),
        (b'"signature": "', b'"signature": " '),
    ],
    ids=repr,
)
def test_there_is_one_way_to_write_a_line(path: Path, part: bytes, other: bytes) -> None:
    """The same values in other bytes, their signature still right: readers of JSON could differ on them."""
    append(path, values_of(path, 1))
    *lines, last = lines_of(path)
    assert part in last
    path.write_bytes(b"".join(lines) + last[:-1].replace(part, other, 1) + b"\n")
    with pytest.raises(LedgerError, match=rf"at line {FILLED_LINES + 1}"):
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


def changed(values: dict[str, Any], place: str, value: object) -> dict[str, Any]:
    """Values with another one at a dotted place."""
    *inner, last = place.split(".")
    target = values
    for key in inner:
        target = target[key]
    target[last] = value
    return values


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *(("charge.purpose", "\u0430dapter"), ("charge.purpose", "Adapter"), ("charge.purpose", None)),
        *(("charge.round", True), ("charge.round", 0), ("charge.round", 1.0), ("charge.round", 10**13)),
        *(("charge.clip_norm", True), ("charge.clip_norm", 0.0), ("charge.clip_norm", "1")),
        *(("charge.delta", True), ("charge.delta", 0.0), ("charge.delta", 1.0), ("charge.delta", "x")),
        *(
            ("charge.run", 5),
            ("charge.run", "r" * 513),
            ("charge.run", "\ud800"),
            ("charge.plan_sha256", ["x"]),
        ),
        *(("charge.unit", "visit"), ("charge.unit", "none"), ("charge.unit_column", 3)),
        *(("charge.max_records_per_unit", True), ("charge.max_records_per_unit", 0)),
        *(("charge.normaliser", True), ("charge.normaliser", 0), ("charge.dataset_commitment", None)),
        *(("time", True), ("time", -1), ("time", 1.5), ("time", "0"), ("time", 10**11)),
        ("release_sha256", "r"),
    ],
    ids=repr,
)
def test_a_charge_says_what_is_counted_or_is_refused(path: Path, place: str, value: object) -> None:
    """A word of no list, a boolean for a number, a number without bound: the line is not read."""
    append(path, changed(values_of(path, 1), place, value))
    with pytest.raises(LedgerError, match=f"cannot be read at line {FILLED_LINES + 1}"):
        read_chain(path, KEY.public_key())


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"reserve": True, "release_sha256": "r"}, "reserve"),
        ({"reserve": 5.0, "release_sha256": "r"}, "reserve"),
        ({"reserve": 5}, "release_sha256"),
        ({"reserve": 5, "release_sha256": 7}, "release_sha256"),
        (
            {"unprotected": {"run": "r", "round": True, "purpose": "adapter", "release_sha256": "r"}},
            "round",
        ),
        (
            {"unprotected": {"run": "r", "round": 1, "purpose": "gift", "release_sha256": "r"}},
            "purpose",
        ),
        ({"unprotected": {"run": "r", "round": 1, "purpose": "adapter"}}, "release_sha256"),
        ({"correction": {"ahead": True, "reason": "x"}}, "ahead"),
        ({"correction": {"ahead": 5, "reason": " "}}, "reason"),
    ],
    ids=repr,
)
def test_other_lines_are_held_to_the_same(path: Path, values: dict[str, Any], part: str) -> None:
    """A commit, a release without privacy and a correction have types and bounds of their own."""
    append(path, {"time": 0, **values})
    with pytest.raises(LedgerError, match=f"at line {FILLED_LINES + 1}: .*{part}"):
        read_chain(path, KEY.public_key())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(
            ("unit", "visit"),
            ("unit", "p\u0430tient"),
            ("adjacency", "replace-one"),
            ("ledger_id", "x"),
        ),
        *(("dataset", 5), ("unit_column", 5)),
    ],
)
def test_an_opening_of_unknown_words_is_refused(path: Path, key: str, value: object) -> None:
    """Unit and relation are of a list: a ledger of another relation would count something else."""
    values = values_of(path, 0)
    values["opening"][key] = value
    line = json.dumps({**values, "signature": signature_of(KEY, values)}).encode() + b"\n"
    path.write_bytes(line)
    with pytest.raises(LedgerError, match=f"at line 1: {key}"):
        read_chain(path, KEY.public_key())


@pytest.mark.parametrize("line", [0, 1])
def test_a_boolean_is_no_place_in_a_ledger(path: Path, line: int) -> None:
    """``false`` and ``true`` compare like 0 and 1, and are no index of a line."""
    lines = lines_of(path)[: line + 1]
    values = values_of(path, line)
    values["index"] = bool(line)
    lines[line] = json.dumps({**values, "signature": signature_of(KEY, values)}).encode() + b"\n"
    path.write_bytes(b"".join(lines))
    with pytest.raises(LedgerError, match=f"at line {line + 1}: index"):
        read_chain(path, KEY.public_key())


@pytest.mark.parametrize("index", ["true", "false", "-1.0", "1.0", "1e3", "10000000000001"])
def test_a_head_names_a_line_by_a_whole_number(path: Path, index: str) -> None:
    """A boolean or a fraction in the head is refused, not taken for line 1 or 0."""
    head = path.with_name(path.name + HEAD_SUFFIX)
    head.write_text(f'{{"index": {index}, "sha256": "{line_hash(lines_of(path)[1][:-1])}"}}')
    with pytest.raises(LedgerError, match="names no line"):
        read_head(head)


OLD_FIELDS = ("unit", "unit_column", "max_records_per_unit", "normaliser")


def as_of_an_older_version(path: Path, unit: str | None = None) -> Path:
    """Rewrites a ledger without the fields that older versions did not write, signed and linked."""
    previous, lines = "0" * 64, []
    for number in range(len(lines_of(path))):
        values = {**values_of(path, number), "previous": previous}
        if "charge" in values:
            values["charge"] = {k: v for k, v in values["charge"].items() if k not in OLD_FIELDS}
        if "opening" in values:
            del values["opening"]["unit_column"]
            values["opening"]["unit"] = unit or values["opening"]["unit"]
        line = json.dumps({**values, "signature": signature_of(KEY, values)}).encode()
        previous = line_hash(line)
        lines.append(line)
    path.write_bytes(b"\n".join([*lines, b""]))
    head = {"index": len(lines) - 1, "sha256": previous}
    path.with_name(path.name + HEAD_SUFFIX).write_text(json.dumps(head))
    return path


def test_a_ledger_of_an_older_version_is_read(path: Path) -> None:
    """Lines without unit, column, cap and normaliser count as before."""
    chain = read_chain(as_of_an_older_version(path), KEY.public_key())
    assert chain.events == FILLED
    assert (chain.unit, chain.unit_column, chain.unprotected) == ("record", None, ())


def test_an_older_ledger_takes_the_first_column_and_keeps_to_it(path: Path) -> None:
    """Who was counted before the column was written is unknown; from the first that is named on, none else."""
    ledger = Ledger(as_of_an_older_version(path, unit="patient"), KEY, unit="user")
    reserve(ledger, unit="user", unit_column="who", run="new")
    before = path.read_bytes()
    with pytest.raises(PolicyRefused, match=r"counts by the column 'who'.*'visit'"):
        reserve(ledger, unit="user", unit_column="visit", run="newer")
    assert path.read_bytes() == before
    assert ledger.read().unit_column == "who"


def test_a_user_is_stored_as_patient(tmp_path: Path) -> None:
    """Ledgers, statements and plans store "patient" for a user, whatever the config calls it: their bytes are signed."""
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path, KEY, unit="user")
    reserve(ledger, unit="user", unit_column="who")
    stored = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert (stored[0]["opening"]["unit"], stored[1]["charge"]["unit"]) == ("patient", "patient")
    chain = read_chain(path, KEY.public_key())
    assert (chain.unit, chain.charges[0].unit) == ("user", "user")
    text = ledger.statement("run", 1, "release").to_json()
    assert json.loads(text)["unit"] == "patient"
    assert read_statement(text).unit == "user"


@pytest.mark.parametrize("number", [0, 1])
def test_another_word_for_the_unit_is_refused_on_disk(tmp_path: Path, number: int) -> None:
    """A line that says "user" is not one that fedslm writes, though the key signed it."""
    path = tmp_path / "ledger.jsonl"
    reserve(Ledger(path, KEY, unit="user"), unit="user", unit_column="who")
    lines = path.read_bytes().splitlines()
    values = json.loads(lines[number])
    del values["signature"]
    values["opening" if number == 0 else "charge"]["unit"] = "user"
    lines[number] = json.dumps({**values, "signature": signature_of(KEY, values)}).encode()
    path.write_bytes(b"\n".join([*lines, b""]))
    with pytest.raises(LedgerError, match='stored as "patient"'):
        read_chain(path, KEY.public_key())
