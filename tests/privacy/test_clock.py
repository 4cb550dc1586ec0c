"""Tests of a ledger's own time: a charge never looks older than it is, whatever the clock did."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.ledgers import AMPLE, DELTA, EVENT, KEY, budget_for, reserve

from fedslm.errors import BudgetExceeded, LedgerError
from fedslm.privacy import clock
from fedslm.privacy.ledger import Ledger
from fedslm.privacy.limits import Limits
from fedslm.privacy.lines import Correction, Entry

NOW = 1_800_000_000
DAY = clock.DAY_SECONDS
At = Callable[[float], None]


def entries(*times: int, corrected: int | None = None) -> list[Entry]:
    """Lines with these times; one of them may be a correction."""
    return [
        Entry(n, "", at, correction=Correction(1, "why") if n == corrected else None)
        for n, at in enumerate(times)
    ]


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> At:
    """Sets this machine's clock, in seconds from a fixed day."""
    return lambda seconds: monkeypatch.setattr(time, "time", lambda: NOW + seconds)


@pytest.mark.parametrize(
    ("lines", "counted"),
    [
        (entries(NOW, NOW + 5), [NOW, NOW + 5]),
        (entries(NOW, NOW - 50, NOW + 5), [NOW, NOW, NOW + 5]),
        (entries(NOW, 0, 0), [NOW, NOW, NOW]),
        (entries(0, 0, NOW), [NOW, NOW, NOW]),
        (entries(0, 0), [NOW + 9, NOW + 9]),
        (entries(NOW, NOW + DAY, NOW + 7, corrected=2), [NOW, NOW + 7, NOW + 7]),
        (entries(NOW, NOW + DAY, NOW + 7, NOW + 8, corrected=2), [NOW, NOW + 7, NOW + 7, NOW + 8]),
        ([], []),
    ],
    ids=repr,
)
def test_a_line_counts_as_written_when_it_was_or_later(
    lines: list[Entry], counted: list[float]
) -> None:
    """Times that go back, or are of 1970, are lifted; what was ahead counts as of the correction."""
    assert clock.counted_times(lines, NOW + 9) == counted


def test_a_ledgers_time_does_not_go_back(tmp_path: Path, at: At) -> None:
    """A clock that was set back writes the latest time again, and the right one once it has caught up."""
    ledger = Ledger(tmp_path / "ledger.jsonl", KEY)
    for seconds in (0, -5000, 10):
        at(seconds)
        reserve(ledger)
    assert [entry.time - NOW for entry in ledger.read().entries] == [0, 0, 0, 10]


@pytest.mark.parametrize("seconds", [-NOW, -NOW + 1000, clock.LATEST_TIME - NOW, 10**11])
def test_a_clock_that_cannot_be_right_charges_nothing(tmp_path: Path, at: At, seconds: int) -> None:
    """At 1970 or after 2099 nothing is written: such charges would escape every limit on a day."""
    ledger = Ledger(tmp_path / "ledger.jsonl", KEY)
    at(seconds)
    with pytest.raises(LedgerError, match=r"clock says .* set it by NTP"):
        reserve(ledger)
    assert not ledger.path.exists()


def jumped(path: Path, at: At, seconds: int) -> Ledger:
    """A ledger with a round of an hour ago, and one that was charged while the clock was ahead."""
    ledger = Ledger(path, KEY)
    at(-3600)
    reserve(ledger, run="one")
    at(seconds)
    reserve(ledger, run="two")
    at(0)
    return ledger


@pytest.mark.parametrize(
    "limits",
    [
        Limits(AMPLE.run, rounds_per_day=1),
        Limits(AMPLE.run, seconds_between=60.0),
        Limits(AMPLE.run, per_day=budget_for(EVENT)),
    ],
    ids=["rounds", "seconds", "epsilon"],
)
def test_a_jump_forwards_is_lifted_by_the_operators_word_alone(
    tmp_path: Path, at: At, limits: Limits
) -> None:
    """It blocks for as long as the jump; after the correction limits count the charge as just made."""
    ledger = jumped(tmp_path / "ledger.jsonl", at, 400 * DAY)
    charged = ledger.read().charges
    for seconds in (0, 300 * DAY):
        at(seconds)
        with pytest.raises(BudgetExceeded):
            reserve(ledger, limits=limits, run="three")
    at(10)
    assert ledger.correct_clock("NTP gave another year") == 400 * DAY - 10
    assert ledger.read().charges == charged
    at(15)
    with pytest.raises(BudgetExceeded):  # nothing passes that would not have without the jump
        reserve(ledger, limits=limits, run="three")
    at(DAY + 11)
    reserve(ledger, limits=limits, run="three")
    last = ledger.read().entries
    assert [entry.time - NOW for entry in last] == [-3600, -3600, 400 * DAY, 10, DAY + 11]
    assert last[3].correction == Correction(400 * DAY - 10, "NTP gave another year")


def test_a_correction_gives_nothing_back(tmp_path: Path, at: At) -> None:
    """Epsilon, and the number of rounds ever, are what they were."""
    ledger = jumped(tmp_path / "ledger.jsonl", at, DAY)
    spent = ledger.spent(DELTA)
    ledger.correct_clock("why")
    assert ledger.spent(DELTA) == spent
    with pytest.raises(BudgetExceeded, match="2 of at most 2 rounds"):
        reserve(ledger, limits=Limits(AMPLE.run, rounds=2))
    with pytest.raises(BudgetExceeded, match="lifetime"):
        reserve(ledger, limits=Limits(AMPLE.run, lifetime=budget_for(EVENT, EVENT)))


def test_a_correction_needs_a_jump_and_a_reason(tmp_path: Path, at: At) -> None:
    """Without a reason, or where nothing is ahead, or while the clock itself cannot be right, none is written."""
    ledger = jumped(tmp_path / "ledger.jsonl", at, DAY)
    before = ledger.path.read_bytes()
    with pytest.raises(LedgerError, match="needs a reason"):
        ledger.correct_clock(" ")
    at(DAY)
    with pytest.raises(LedgerError, match="nothing to correct"):
        ledger.correct_clock("why")
    at(-NOW)
    with pytest.raises(LedgerError, match="clock says 1970"):
        ledger.correct_clock("why")
    assert ledger.path.read_bytes() == before
    with pytest.raises(LedgerError, match=r"clock says|nothing to correct"):
        Ledger(tmp_path / "none.jsonl", KEY).correct_clock("why")


def test_a_refusal_says_that_the_clock_had_jumped(tmp_path: Path, at: At) -> None:
    """The server's report, and the node's log, name the seconds that the ledger is ahead."""
    ledger = jumped(tmp_path / "ledger.jsonl", at, DAY)
    for limits in (Limits(AMPLE.run, rounds_per_day=1), Limits(AMPLE.run, seconds_between=60.0)):
        with pytest.raises(BudgetExceeded, match=f"ledger is {DAY} s ahead of its clock"):
            reserve(ledger, limits=limits)
