"""Tests of what one run and one day may spend, of the column, and of what follows without privacy."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from support.ledgers import AMPLE, DELTA, EVENT, KEY, OTHER, budget_for, charge, reserve

from fedslm.errors import BudgetExceeded, LedgerError, PolicyRefused
from fedslm.privacy import accounting
from fedslm.privacy.ledger import Ledger
from fedslm.privacy.limits import Limits
from fedslm.privacy.lines import ADAPTER, METRIC, Unprotected
from fedslm.records import Event

RELEASED = Unprotected("open", 1, ADAPTER, "release")
ONE_RUN = Limits(AMPLE.run, lifetime=AMPLE.run, per_run=budget_for(EVENT, EVENT))
ONE_DAY = Limits(AMPLE.run, lifetime=AMPLE.run, per_day=budget_for(EVENT, EVENT))


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """An empty ledger."""
    return Ledger(tmp_path / "ledger.jsonl", KEY)


def at(monkeypatch: pytest.MonkeyPatch, hours: float) -> None:
    """Sets the clock, in hours from a fixed day."""
    monkeypatch.setattr(time, "time", lambda: 1_800_000_000 + 3600 * hours)


@pytest.mark.parametrize("limits", [ONE_RUN, ONE_DAY], ids=["run", "day"])
def test_one_request_cannot_spend_the_lifetime(ledger: Ledger, limits: Limits) -> None:
    """A single round that costs more than a run or a day may is refused, and nothing is on disk."""
    with pytest.raises(BudgetExceeded, match=r"any one run of this node|24 hours of this node"):
        reserve(ledger, Event(0.05, 1.0, 100), limits)
    assert not ledger.path.exists()


def test_a_run_spends_its_share_over_all_days(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Days and restarts give a run nothing back; another run has a share of its own."""
    for day in (0, 3):
        at(monkeypatch, 24 * day)
        reserve(Ledger(ledger.path, KEY), limits=ONE_RUN)
    before = ledger.path.read_bytes()
    at(monkeypatch, 24 * 30)
    with pytest.raises(BudgetExceeded, match="any one run of this node"):
        reserve(Ledger(ledger.path, KEY), limits=ONE_RUN)
    assert ledger.path.read_bytes() == before
    reserve(ledger, limits=ONE_RUN, run="another")


def test_a_day_is_shared_by_all_runs_and_slides(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run has no other day; a charge frees its share 24 hours after it was made, not at midnight."""
    for hours, run in ((0, "one"), (20, "two")):
        at(monkeypatch, hours)
        reserve(ledger, limits=ONE_DAY, run=run)
    for hours in (20, 23.9):
        at(monkeypatch, hours)
        with pytest.raises(BudgetExceeded, match="24 hours of this node"):
            reserve(ledger, limits=ONE_DAY, run="three")
    at(monkeypatch, 24)
    reserve(ledger, limits=ONE_DAY, run="three")
    at(monkeypatch, 43)
    with pytest.raises(BudgetExceeded, match="24 hours of this node"):
        reserve(ledger, limits=ONE_DAY, run="four")


def test_a_clock_that_was_set_back_frees_no_day(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies ahead of the clock counts as of today."""
    for run in ("one", "two"):
        at(monkeypatch, 0)
        reserve(ledger, limits=ONE_DAY, run=run)
    at(monkeypatch, -100)
    with pytest.raises(BudgetExceeded, match="24 hours of this node"):
        reserve(ledger, limits=ONE_DAY, run="three")


def test_several_plans_within_a_day_are_held_by_the_filter(ledger: Ledger) -> None:
    """Two runs of a day may be chosen one after the other: then the day is filtered, like the lifetime."""
    budget = budget_for(EVENT, OTHER)
    assert accounting.adaptive_epsilon([EVENT, OTHER], DELTA, budget[0]) > budget[0]
    limits = Limits(AMPLE.run, per_day=budget)
    reserve(ledger, EVENT, limits, run="one", plan_sha256="first")
    with pytest.raises(BudgetExceeded, match=r"24 hours of this node \(several plans\)"):
        reserve(ledger, OTHER, limits, run="two", plan_sha256="second")
    reserve(ledger, OTHER, limits, run="two", plan_sha256="first")


def test_metric_and_adapter_count_together(ledger: Ledger) -> None:
    """All charges of a round are held to the run's and the day's limit at once, or none is taken."""
    both = [charge(EVENT), charge(OTHER, purpose=METRIC)]
    for limits in (
        Limits(AMPLE.run, per_run=budget_for(EVENT)),
        Limits(AMPLE.run, per_day=budget_for(EVENT)),
    ):
        with pytest.raises(BudgetExceeded):
            ledger.reserve(both, limits)
    assert ledger.events() == ()


def test_the_column_of_the_unit_is_kept(tmp_path: Path) -> None:
    """It stands in the opening and in each charge; charges by another one, or by none, are refused."""
    ledger = Ledger(tmp_path / "ledger.jsonl", KEY, unit="user")
    who = {"unit": "user", "unit_column": "who", "max_records_per_unit": 4, "normaliser": 32}
    reserve(ledger, **who)
    chain = ledger.read()
    assert chain.opening is not None
    assert (chain.opening.unit_column, chain.unit_column) == ("who", "who")
    assert {key: getattr(chain.charges[0], key) for key in who} == who
    before = ledger.path.read_bytes()
    for column in ("visit", None, "Who"):
        with pytest.raises(PolicyRefused, match="counts by the column 'who'"):
            reserve(ledger, **{**who, "unit_column": column, "run": "another"})
    with pytest.raises(LedgerError, match="a charge for one record in a ledger of one user"):
        reserve(ledger, unit="record", unit_column="who")
    assert ledger.path.read_bytes() == before
    reserve(ledger, **{**who, "max_records_per_unit": 8, "run": "another"})


def test_charges_of_two_columns_are_never_reserved_together(tmp_path: Path) -> None:
    """A metric by another column does not open a ledger beside its adapter."""
    ledger = Ledger(tmp_path / "ledger.jsonl", KEY, unit="user")
    with pytest.raises(PolicyRefused, match="column"):
        ledger.reserve([charge(unit_column="who"), charge(unit_column="visit", purpose=METRIC)], AMPLE)
    assert ledger.events() == ()


def test_after_a_release_without_privacy_epsilon_is_infinite(ledger: Ledger) -> None:
    """For good, at every delta, over restarts; the run's own charges are what they were."""
    reserve(ledger)
    ledger.release_unprotected(RELEASED, AMPLE)
    again = Ledger(ledger.path, KEY)
    assert again.read().unprotected == (RELEASED,)
    assert [again.spent(delta).epsilon for delta in (1e-9, 0.4)] == [float("inf")] * 2
    assert again.events() == (EVENT,)
    assert ledger.statement("run", 1, "release").epsilon == float("inf")


def test_no_budget_pays_after_a_release_without_privacy(ledger: Ledger) -> None:
    """A lifetime budget refuses with the reason; without one, or where such releases are allowed, runs go on."""
    ledger.release_unprotected(RELEASED, AMPLE)
    limits = Limits(AMPLE.run, lifetime=(1e9, DELTA))
    with pytest.raises(BudgetExceeded, match=r"1 release without privacy left this node: .* infinite"):
        reserve(ledger, limits=limits)
    reserve(ledger, limits=AMPLE)
    reserve(ledger, limits=Limits(AMPLE.run, lifetime=(1e9, DELTA), allows_unprotected=True))
    few = Limits(AMPLE.run, lifetime=budget_for(EVENT, EVENT), allows_unprotected=True)
    with pytest.raises(BudgetExceeded, match="lifetime to"):
        reserve(ledger, limits=few)


def test_a_release_without_privacy_opens_a_ledger_of_no_unit(tmp_path: Path) -> None:
    """The first charge says whose participation is counted, and another unit is refused from then on."""
    path = tmp_path / "ledger.jsonl"
    Ledger(path, KEY).release_unprotected(RELEASED, AMPLE)
    assert Ledger(path, KEY).read().unit is None
    reserve(Ledger(path, KEY, unit="user"), unit="user", unit_column="who")
    assert Ledger(path, KEY, unit="user").read().unit == "user"
    with pytest.raises(PolicyRefused, match="one user"):
        reserve(Ledger(path, KEY, unit="record"), unit="record")


def test_the_same_release_again_is_one_line(ledger: Ledger) -> None:
    """Sending the same bytes of the same round again adds nothing; other bytes, or another round, do."""
    for _ in range(3):
        ledger.release_unprotected(RELEASED, AMPLE)
    assert len(ledger.read().entries) == 2
    for other in (
        Unprotected("open", 2, ADAPTER, "release"),
        Unprotected("open", 1, ADAPTER, "other"),
        Unprotected("open", 1, METRIC, "release"),
    ):
        ledger.release_unprotected(other, AMPLE)
    assert len(ledger.read().entries) == 5


def test_rounds_without_privacy_are_rounds(ledger: Ledger) -> None:
    """Limits on rounds hold for them, and they count for those that are private."""
    second = Unprotected("open", 2, ADAPTER, "other")
    ledger.release_unprotected(RELEASED, AMPLE)
    for limits in (
        Limits(AMPLE.run, rounds=1),
        Limits(AMPLE.run, rounds_per_day=1),
        Limits(AMPLE.run, seconds_between=60.0),
    ):
        with pytest.raises(BudgetExceeded):
            ledger.release_unprotected(second, limits)
        with pytest.raises(BudgetExceeded):
            reserve(ledger, limits=limits)
        ledger.release_unprotected(RELEASED, limits)
    ledger.release_unprotected(Unprotected("open", 2, METRIC, "m"), Limits(AMPLE.run, rounds=1))
    assert len(ledger.read().unprotected) == 2


def test_an_older_library_of_lines_stays_the_same(ledger: Ledger) -> None:
    """Lines of kinds that are not used say nothing of them: what older audits read does not change."""
    ledger.commit(reserve(ledger), "release")
    assert b"unprotected" not in ledger.path.read_bytes()
    assert b"correction" not in ledger.path.read_bytes()
