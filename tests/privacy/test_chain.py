"""Tests of the ledger as a file: whatever is changed, cut off or mixed is found; a crash is not."""

from __future__ import annotations

import json
import tempfile
from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.ledgers import (
    FILLED,
    FILLED_LINES,
    KEY,
    OTHER,
    OTHER_KEY,
    copy_of,
    filled,
    head_for,
    head_of,
    lines_of,
    reserve,
)

from fedslm.errors import LedgerError, PolicyRefused
from fedslm.privacy.chain import check_head, line_hash, read_chain, read_head
from fedslm.privacy.keys import is_signed, signature_of
from fedslm.privacy.ledger import Ledger

PUBLIC = KEY.public_key()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the ledger is."""
    return tmp_path / "ledger.jsonl"


@lru_cache
def template() -> tuple[bytes, bytes]:
    """Content and head of a filled ledger, made once."""
    with tempfile.TemporaryDirectory() as directory:
        path = filled(Path(directory) / "ledger.jsonl").path
        return path.read_bytes(), head_of(path).read_bytes()


def test_every_line_is_signed_and_names_the_line_before(path: Path) -> None:
    """Line by line: SHA-256 of the line before, a position, and an Ed25519 signature over the rest."""
    filled(path)
    previous = "0" * 64
    for index, line in enumerate(lines_of(path)):
        values = json.loads(line)
        signature = values.pop("signature")
        assert (values["index"], values["previous"]) == (index, previous)
        canonical = json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
        PUBLIC.verify(bytes.fromhex(signature), canonical)  # raises if it is not
        previous = line_hash(line[:-1])
    assert json.loads(head_of(path).read_text()) == {"index": 6, "sha256": previous}


def test_an_auditor_needs_the_public_key_alone(path: Path) -> None:
    """The chain reads without the private key, and without the head."""
    chain = filled(path).read()
    head_of(path).unlink()
    again = read_chain(path, PUBLIC)
    assert again == chain
    assert (again.events, again.torn) == (FILLED, False)
    assert (len(again.entries), again.head) == (FILLED_LINES, line_hash(lines_of(path)[-1][:-1]))


def test_a_torn_last_line_is_left_out_at_every_byte(tmp_path: Path) -> None:
    """Cut at any byte that a crash could leave, the whole lines count and the ledger goes on."""
    source = tmp_path / "whole.jsonl"
    ledger, synced = Ledger(source, KEY), [(0, b'{"index": -1, "sha256": "none"}')]
    steps = [lambda: reserve(ledger), lambda: ledger.commit(1, "a"), lambda: reserve(ledger, OTHER)]
    for step in steps:
        step()
        synced.append((source.stat().st_size, head_of(source).read_bytes()))
    content, entries = source.read_bytes(), ledger.read().entries
    ends = [position + 1 for position, byte in enumerate(content) if byte == ord("\n")]
    cut = tmp_path / "cut.jsonl"
    for length in range(len(content) + 1):
        whole = sum(end <= length for end in ends)
        head = [head for size, head in synced if size <= length][-1]
        torn = copy_of(cut, content[:length], head)
        chain = torn.read()
        assert chain.entries == entries[:whole]
        assert chain.torn == (length not in (0, *ends))
        if length % 397 == 0 or length in ends or length + 1 in ends:
            assert reserve(torn, OTHER) == max(whole, 1)
            after = Ledger(cut, KEY).read()
            assert after.entries[:whole] == entries[:whole]
            assert after.events == (*chain.events, OTHER)
            assert not after.torn


@pytest.mark.parametrize("tail", [b"\0" * 500, b"\xff\xfe", b"{}", b'{"index": 7', b"[" * 100_000])
def test_rubbish_after_the_last_line_is_left_out(path: Path, tail: bytes) -> None:
    """What a crash of the machine leaves behind does not hide the entries before it."""
    ledger = filled(path)
    entries = ledger.read().entries
    with path.open("ab") as file:
        file.write(tail)
    assert ledger.read().entries == entries
    assert ledger.read().torn
    reserve(ledger)
    assert Ledger(path, KEY).read().entries[:-1] == entries
    assert not ledger.read().torn


@given(position=st.integers(0, len(template()[0]) - 1), bit=st.integers(0, 7))
@example(position=len(template()[0]) - 1, bit=0)
@example(position=len(template()[0]) - 2, bit=0)
@settings(max_examples=200, deadline=None)
def test_no_bit_can_change(position: int, bit: int) -> None:
    """A flipped bit anywhere, the last line and its end included, is found, and is not added to."""
    content, head = template()
    with tempfile.TemporaryDirectory() as directory:
        changed = bytearray(content)
        changed[position] ^= 1 << bit
        ledger = copy_of(Path(directory) / "ledger.jsonl", bytes(changed), head)
        with pytest.raises(LedgerError):
            ledger.read()
        with pytest.raises(LedgerError):
            reserve(ledger)
        assert ledger.path.read_bytes() == bytes(changed)


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_no_bytes_can_be_replaced_inserted_or_removed(data: st.DataObject) -> None:
    """Whatever replaces a stretch of the file, the result is refused unless it is the same file."""
    content, head = template()
    start = data.draw(st.integers(0, len(content) - 1))
    stop = data.draw(st.integers(start, min(len(content), start + 40)))
    other = data.draw(st.one_of(st.binary(max_size=40), st.sampled_from([b"\n", b" ", b"\r\n", b"0"])))
    changed = content[:start] + other + content[stop:]
    appended = changed.startswith(content) and b"\n" not in changed[len(content) :]
    with tempfile.TemporaryDirectory() as directory:
        ledger = copy_of(Path(directory) / "ledger.jsonl", changed, head)
        if appended:
            assert ledger.events() == FILLED
        else:
            with pytest.raises(LedgerError):
                ledger.read()


@pytest.mark.parametrize("bit", range(8))
def test_no_bit_of_the_head_can_change_unseen(path: Path, bit: int) -> None:
    """A head that was changed is refused, or says what it said before."""
    filled(path)
    content, head = path.read_bytes(), head_of(path).read_bytes()
    for position in range(len(head)):
        changed = bytearray(head)
        changed[position] ^= 1 << bit
        ledger = copy_of(path, content, bytes(changed))
        try:
            ledger.read()
        except LedgerError:
            continue
        assert json.loads(changed) == json.loads(head)


@pytest.mark.parametrize("line", range(FILLED_LINES))
def test_an_edited_line_is_refused(path: Path, line: int) -> None:
    """Whoever makes an entry cheaper, or moves it to another time, is found out; the last line too."""
    filled(path)
    lines = lines_of(path)
    values = json.loads(lines[line])
    if "charge" in values:
        values["charge"]["event"]["noise_multiplier"] = 1000.0
    values["time"] += 1
    lines[line] = json.dumps(values).encode() + b"\n"
    path.write_bytes(b"".join(lines))
    with pytest.raises(LedgerError, match=f"at line {line + 1}: .*signature"):
        Ledger(path, KEY).read()


@pytest.mark.parametrize("line", range(FILLED_LINES - 1))
def test_a_line_signed_anew_breaks_the_next(path: Path, line: int) -> None:
    """Even with the node's own key a charge in the middle cannot be made cheaper."""
    filled(path)
    lines = lines_of(path)
    values = json.loads(lines[line])
    del values["signature"]
    values["time"] += 1
    lines[line] = json.dumps({**values, "signature": signature_of(KEY, values)}).encode() + b"\n"
    path.write_bytes(b"".join(lines))
    with pytest.raises(LedgerError, match=f"changed at line {line + 2}"):
        Ledger(path, KEY).read()


@pytest.mark.parametrize("line", range(FILLED_LINES - 1))
@pytest.mark.parametrize("change", ["dropped", "swapped", "duplicated"])
def test_lines_stay_where_they_were_written(path: Path, line: int, change: str) -> None:
    """A line taken out of the middle, exchanged with the next or written twice is found."""
    filled(path)
    lines = lines_of(path)
    match change:
        case "dropped":
            del lines[line]
        case "swapped":
            lines[line], lines[line + 1] = lines[line + 1], lines[line]
        case _:
            lines.insert(line, lines[line])
    path.write_bytes(b"".join(lines))
    where = line + 2 if change == "duplicated" else line + 1
    with pytest.raises(LedgerError, match=f"changed at line {where}"):
        Ledger(path, KEY).read()


@pytest.mark.parametrize("kept", range(FILLED_LINES))
def test_lines_cut_off_the_end_are_found_by_the_head(path: Path, kept: int) -> None:
    """The last line, the last lines or all of them: the head remembers them, and nothing is added."""
    filled(path)
    path.write_bytes(b"".join(lines_of(path)[:kept]))
    with pytest.raises(LedgerError, match="rolled back"):
        Ledger(path, KEY).read()
    with pytest.raises(LedgerError, match="rolled back"):
        reserve(Ledger(path, KEY))


def test_a_deleted_ledger_is_found_by_the_head(path: Path) -> None:
    """Taking the file away does not give the budget back."""
    filled(path)
    path.unlink()
    with pytest.raises(LedgerError, match="rolled back"):
        reserve(Ledger(path, KEY))
    assert not path.exists()


def test_a_ledger_without_its_head_is_refused(path: Path) -> None:
    """Taking the head away does not make room for a shorter ledger."""
    filled(path)
    head_of(path).unlink()
    with pytest.raises(LedgerError, match="missing"):
        reserve(Ledger(path, KEY))
    assert not head_of(path).exists()


@pytest.mark.parametrize(
    "head",
    [
        *(b"", b"{", b"5", b"null", b"[]", b"{}", b"\xff\xfe", b'{"index": 6}', b'{"sha256": "x"}'),
        *(b'{"index": null, "sha256": "x"}', b'{"index": "six", "sha256": "x"}'),
        *(b'{"index": 6, "sha256": "x"}', b'{"index": 99, "sha256": "x"}'),
        b'{"index": 1e400, "sha256": "x"}',
        b'{"index": -5, "sha256": "x"}',
        b"[" * 100_000,
    ],
    ids=lambda head: head.decode(errors="replace")[:30],
)
def test_a_head_that_is_none_is_refused(path: Path, head: bytes) -> None:
    """A head that cannot be read, or names another line, is an error: it may hide a rollback."""
    filled(path)
    head_of(path).write_bytes(head)
    with pytest.raises(LedgerError):
        Ledger(path, KEY).read()


@pytest.mark.parametrize("position", range(FILLED_LINES))
def test_a_crash_between_line_and_head_is_no_error(path: Path, position: int) -> None:
    """A head that is behind is what a crash leaves: the lines after it count, and it catches up."""
    entries = filled(path).read().entries
    head_of(path).write_bytes(head_for(path, position))
    ledger = Ledger(path, KEY)
    assert ledger.read().entries == entries
    assert ledger.events() == FILLED
    reserve(ledger)
    assert read_head(head_of(path)) == (FILLED_LINES, line_hash(lines_of(path)[-1][:-1]))


def test_a_saved_head_is_found_in_a_longer_ledger(path: Path) -> None:
    """A head that an auditor once saw is still there after the ledger grew, and in no other one."""
    first = filled(path).read()
    reserve(Ledger(path, KEY))
    grown = read_chain(path, PUBLIC)
    for index, entry in enumerate(grown.entries[1:]):
        check_head(path, grown, index, entry.previous)
    check_head(path, grown, FILLED_LINES, grown.head)
    with pytest.raises(LedgerError, match="rolled back"):
        check_head(path, first, FILLED_LINES, grown.head)
    with pytest.raises(LedgerError, match="rolled back"):
        check_head(path, grown, -1, grown.head)
    other = filled(path.with_name("other.jsonl")).read()
    with pytest.raises(LedgerError, match="rewritten"):
        check_head(path, other, FILLED_LINES - 1, first.head)


def test_another_key_reads_and_writes_nothing(path: Path) -> None:
    """A ledger belongs to the key that opened it."""
    filled(path)
    before = path.read_bytes()
    with pytest.raises(LedgerError, match="signature"):
        read_chain(path, OTHER_KEY.public_key())
    with pytest.raises(LedgerError, match="signature"):
        reserve(Ledger(path, OTHER_KEY))
    assert path.read_bytes() == before


def test_lines_of_another_key_are_refused(path: Path) -> None:
    """A line that is well linked but signed by somebody else is found, and so is a foreign opening."""
    filled(path)
    values = json.loads(lines_of(path)[-1])
    del values["signature"]
    content = path.read_bytes()
    more = {**values, "index": FILLED_LINES, "previous": line_hash(lines_of(path)[-1][:-1])}
    for key, added in ((OTHER_KEY, 0), (KEY, 1)):
        line = json.dumps({**more, "signature": signature_of(key, more)}).encode() + b"\n"
        path.write_bytes(content + line)
        if added:
            assert len(Ledger(path, KEY).events()) == len(FILLED) + 1
        else:
            with pytest.raises(LedgerError, match="signature"):
                Ledger(path, KEY).read()
    opening = json.loads(content.splitlines()[0])
    del opening["signature"]
    assert is_signed(PUBLIC, opening, signature_of(KEY, opening))
    signed = {**opening, "signature": signature_of(OTHER_KEY, opening)}
    copy_of(path, json.dumps(signed).encode() + b"\n", None)
    with pytest.raises(LedgerError, match="another key"):
        read_chain(path, OTHER_KEY.public_key())


def _lines(one: Path, other: Path, how: str) -> list[bytes]:
    """Lines of two ledgers, mixed."""
    first, second = lines_of(one), lines_of(other)
    match how:
        case "one after the other":
            return first + second
        case "without the second opening":
            return first + second[1:]
        case "another opening":
            return second[:1] + first[1:]
        case "in turns":
            return [line for pair in zip(first, second, strict=True) for line in pair]
        case _:
            return first[:4] + second[4:]


@pytest.mark.parametrize(
    "how",
    ["one after the other", "without the second opening", "another opening", "in turns", "spliced"],
)
@pytest.mark.parametrize("which", [0, 1])
def test_two_ledgers_never_merge_silently(path: Path, how: str, which: int) -> None:
    """However lines of two ledgers of one key are put together, with either head, it is refused."""
    other = path.with_name("other.jsonl")
    filled(path)
    filled(other)
    heads = [head_of(path).read_bytes(), head_of(other).read_bytes()]
    content = b"".join(_lines(path, other, how))
    with pytest.raises(LedgerError, match="changed at line"):
        copy_of(path, content, heads[which]).read()


def test_a_ledger_in_the_place_of_another_is_found(path: Path) -> None:
    """A fresh ledger of the same key does not pass for the one that the head is of."""
    other = path.with_name("other.jsonl")
    filled(path)
    filled(other)
    with pytest.raises(LedgerError, match="rewritten"):
        copy_of(path, other.read_bytes(), head_of(path).read_bytes()).read()


@pytest.mark.parametrize(("opened", "asked"), [("record", "user"), ("user", "record")])
def test_another_unit_is_refused(path: Path, opened: str, asked: str) -> None:
    """Two units in one ledger would each see half of what was spent."""
    reserve(Ledger(path, KEY, unit=opened))
    before = path.read_bytes()
    with pytest.raises(PolicyRefused, match=f"one {opened}; .* one {asked} would not be counted"):
        reserve(Ledger(path, KEY, unit=asked))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "foreign",
    [
        *(b"", b"5", b'"text"', b"null", b"[]", b"{}", b"{", b"\xff", b'{"kind": "gift"}'),
        *(b'{"signature": 5}', b'{"signature": "ab", "index": NaN}'),
        b"[" * 100_000,
    ],
    ids=lambda line: line.decode(errors="replace")[:20] or "empty",
)
@pytest.mark.parametrize("line", [0, 2, FILLED_LINES])
def test_a_foreign_line_is_refused(path: Path, foreign: bytes, line: int) -> None:
    """A line that is no entry is a ledger error, whatever it is and wherever it stands."""
    filled(path)
    lines = lines_of(path)
    lines.insert(line, foreign + b"\n")
    path.write_bytes(b"".join(lines))
    with pytest.raises(LedgerError):
        Ledger(path, KEY).read()
