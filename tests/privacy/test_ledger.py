"""Tests of the ledger: what may be charged, and that it may over-count, never under-count."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from support.ledgers import (
    AMPLE,
    DELTA,
    EVENT,
    FILLED,
    KEY,
    OTHER,
    budget_for,
    charge,
    filled,
    head_of,
    reserve,
)

from fedslm.errors import BudgetExceeded, LedgerError, PolicyRefused, PrivacyError
from fedslm.privacy import accounting
from fedslm.privacy.ledger import Ledger
from fedslm.privacy.limits import Limits
from fedslm.privacy.lines import ADAPTER, METRIC
from fedslm.records import Event


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the ledger is."""
    return tmp_path / "ledger" / "client-00000.jsonl"


def test_a_new_ledger_is_empty(path: Path) -> None:
    """Nothing was spent before the first reservation."""
    ledger = Ledger(path, KEY)
    assert (ledger.read().entries, ledger.events()) == ((), ())
    assert ledger.spent(DELTA).epsilon == 0.0
    assert ledger.released("request") == {}


def test_the_first_line_says_whose_ledger_it_is(path: Path) -> None:
    """Unit, data set, adjacency and key stand at the start, with an identifier of the ledger's own."""
    first, second = (
        Ledger(path.with_name(name), KEY, unit="user", dataset="ward 5") for name in ("a", "b")
    )
    for ledger in (first, second):
        reserve(ledger)
    one, other = first.read().opening, second.read().opening
    assert one is not None
    assert other is not None
    assert (one.unit, one.dataset, one.adjacency) == ("user", "ward 5", "add-or-remove-one")
    assert one.public_key == KEY.public_key().public_bytes_raw().hex()
    assert one.ledger_id != other.ledger_id


@pytest.mark.parametrize("begun", [False, True])
def test_a_reservation_is_on_disk_before_it_returns(
    path: Path, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    """The charge is synced whole, then the directory that names the file, then the head that has it."""
    ledger, real = Ledger(path, KEY), os.fsync
    if begun:
        reserve(ledger)
    synced: list[tuple[str, bytes]] = []

    def recording(descriptor: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        synced.append((name, path.read_bytes() if path.exists() else b""))
        real(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", recording)
        reserve(ledger)
    names = [name for name, _ in synced]
    at = names.index(path.name)
    assert [name.rpartition(".")[2] for name in names[at:]] == ["jsonl", "ledger", "partial", "ledger"]
    assert all(content == path.read_bytes() for _, content in synced[at:])
    assert all(content != path.read_bytes() for _, content in synced[:at])
    assert path.read_bytes().endswith(b"\n")
    assert str(ledger.read().entries[-1].index) in head_of(path).read_text()


def _reserve_and_die(path: Path) -> None:
    """Reserves, and is killed before it can commit."""
    reserve(Ledger(path, KEY))
    os.kill(os.getpid(), signal.SIGKILL)


def _reserve_many(path: Path, budget: tuple[float, float], gate: object, won: object) -> None:
    """Reserves until the budget is exhausted."""
    gate.wait()  # type: ignore[attr-defined]
    ledger = Ledger(path, KEY)
    for number in range(6):
        with suppress(BudgetExceeded):
            index = reserve(ledger, limits=budget, request_sha256=f"{os.getpid()}-{number}")
            ledger.commit(index, f"release-{os.getpid()}-{number}")
            won.put((os.getpid(), number))  # type: ignore[attr-defined]


def test_processes_share_one_budget(path: Path) -> None:
    """Killed processes stay charged; two at once never exceed the budget, nor lose an entry."""
    context = multiprocessing.get_context("spawn")
    budget, gate, won = budget_for(*[EVENT] * 8), context.Barrier(2), context.Queue()
    killed = context.Process(target=_reserve_and_die, args=(path,))
    both = [context.Process(target=_reserve_many, args=(path, budget, gate, won)) for _ in range(2)]
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert Ledger(path, KEY).events() == (EVENT,)
    for process in both:
        process.start()
    winners = [won.get(timeout=120) for _ in range(7)]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert won.empty()
    assert len(set(winners)) == 7
    ledger = Ledger(path, KEY)
    assert [entry.index for entry in ledger.read().entries] == list(range(16))
    assert ledger.events() == (EVENT,) * 8
    assert ledger.spent(DELTA).epsilon <= budget[0]


def _reserve_on(path: Path, count: int) -> None:
    """Reserves and commits again and again."""
    ledger = Ledger(path, KEY)
    for number in range(count):
        ledger.commit(reserve(ledger, Event(0.05, 30.0, 1)), f"release-{number}")


@pytest.mark.parametrize(
    "before",
    [(), FILLED],
    ids=["the first line", "a later line"],
)
def test_reading_while_another_writes_is_no_rollback(
    path: Path, monkeypatch: pytest.MonkeyPatch, before: tuple[Event, ...]
) -> None:
    """A reader between another's line and its head sees a shorter ledger, not a cut one."""
    from fedslm.privacy import ledger as module

    reader, writer, began = Ledger(path, KEY), Ledger(path, KEY), list[threading.Thread]()
    if before:
        filled(path)

    def meanwhile(read: Callable[..., object], *arguments: object) -> object:
        found = read(*arguments)
        if not began:  # whichever is read first, the other appends before the second is
            began.append(threading.Thread(target=reserve, args=(writer,)))
            began[0].start()
            began[0].join(timeout=2)  # it waits if the reader holds the lock
        return found

    for name in ("read_head", "read_chain"):
        monkeypatch.setattr(module, name, partial(meanwhile, getattr(module, name)))
    assert reader.read().events in (before, (*before, EVENT))
    began[0].join()
    assert reader.events() == (*before, EVENT)


def test_reserved_counts_whether_committed_or_not(path: Path) -> None:
    """Both kinds of reservation count, and commits cost nothing."""
    ledger = filled(path)
    assert ledger.events() == FILLED
    spent = ledger.spent(DELTA)
    assert spent.epsilon == accounting.epsilon(FILLED, DELTA)
    assert (spent.delta, spent.steps) == (DELTA, 30)


def test_events_of_one_run_are_told_apart(path: Path) -> None:
    """What one run charged is asked for by its name; without a name everything is."""
    ledger = Ledger(path, KEY)
    reserve(ledger, EVENT, run="one")
    reserve(ledger, OTHER, run="two")
    assert (ledger.events("one"), ledger.events("two"), ledger.events("three")) == (
        (EVENT,),
        (OTHER,),
        (),
    )
    assert ledger.events() == (EVENT, OTHER)


def test_the_budget_is_a_filter(path: Path) -> None:
    """What fits exactly is charged; one more is refused, charges nothing and says why."""
    ledger, budget = Ledger(path, KEY), budget_for(EVENT, EVENT)
    for _ in range(2):
        reserve(ledger, limits=budget)
    before = path.read_bytes()
    with pytest.raises(BudgetExceeded, match=r"epsilon of the run to \d\.\d+ .* budget of"):
        reserve(ledger, limits=budget)
    assert path.read_bytes() == before


def test_a_round_is_charged_whole_or_not_at_all(path: Path) -> None:
    """If the metric no longer fits, the adapter of the same round is not charged either."""
    ledger, both = Ledger(path, KEY), [charge(EVENT), charge(OTHER, purpose=METRIC)]
    with pytest.raises(BudgetExceeded):
        ledger.reserve(both, Limits(run=budget_for(EVENT)))
    assert ledger.events() == ()
    assert ledger.reserve(both, Limits(run=budget_for(EVENT, OTHER))) == [1, 2]
    assert ledger.events() == (EVENT, OTHER)


def test_a_cheaper_event_may_still_fit(path: Path) -> None:
    """A refusal does not close the ledger: what fits later is charged."""
    ledger, budget = Ledger(path, KEY), budget_for(EVENT, OTHER)
    reserve(ledger, limits=budget)
    with pytest.raises(BudgetExceeded):
        reserve(ledger, limits=budget)
    reserve(ledger, OTHER, limits=budget)
    assert ledger.events() == (EVENT, OTHER)


def test_each_run_has_its_budget_and_the_lifetime_is_over_all(path: Path) -> None:
    """Another run starts at zero of its own budget, and never of the node's."""
    limits = Limits(run=budget_for(EVENT), lifetime=budget_for(EVENT, EVENT))
    for run in ("one", "two"):
        reserve(Ledger(path, KEY), limits=limits, run=run)
        with pytest.raises(BudgetExceeded, match="of the run to"):
            reserve(Ledger(path, KEY), limits=limits, run=run)
    with pytest.raises(BudgetExceeded, match="of the node's lifetime to"):
        reserve(Ledger(path, KEY), limits=limits, run="three")
    assert Ledger(path, KEY).events() == (EVENT, EVENT)


def test_a_changed_lifetime_budget_counts_what_was_spent_before(path: Path) -> None:
    """A lifetime budget that is set late, or lowered, counts every charge from the first on."""
    reserve(Ledger(path, KEY), limits=AMPLE)
    with pytest.raises(BudgetExceeded, match="lifetime"):
        reserve(Ledger(path, KEY), limits=Limits(AMPLE.run, lifetime=budget_for(EVENT)))


def test_several_plans_are_held_by_the_adaptive_filter(path: Path) -> None:
    """Two plans that fit by privacy loss distributions are refused where the filter does not pass."""
    budget = budget_for(EVENT, OTHER)
    assert accounting.adaptive_epsilon([EVENT, OTHER], DELTA, budget[0]) > budget[0]
    limits = Limits(AMPLE.run, lifetime=budget)
    ledger = Ledger(path, KEY)
    reserve(ledger, EVENT, limits, run="one", plan_sha256="first")
    with pytest.raises(BudgetExceeded, match=r"lifetime \(several plans\)"):
        reserve(ledger, OTHER, limits, run="two", plan_sha256="second")
    assert ledger.events() == (EVENT,)
    reserve(ledger, OTHER, limits, run="two", plan_sha256="first")
    assert ledger.events() == (EVENT, OTHER)


def test_several_plans_within_the_filter_are_charged(path: Path) -> None:
    """What the adaptive filter lets pass is charged, up to exactly its figure."""
    budget = 8.0
    spent = accounting.adaptive_epsilon([EVENT, OTHER], DELTA, budget)
    assert spent <= budget
    ledger, limits = Ledger(path, KEY), Limits(AMPLE.run, lifetime=(budget, DELTA))
    reserve(ledger, EVENT, limits, run="one", plan_sha256="first")
    reserve(ledger, OTHER, limits, run="two", plan_sha256="second")
    assert ledger.events() == (EVENT, OTHER)


def test_a_plan_does_not_change_within_a_run(path: Path) -> None:
    """A second plan under the same run is refused and charges nothing; another run may have it."""
    ledger = Ledger(path, KEY)
    reserve(ledger, plan_sha256="first")
    before = path.read_bytes()
    with pytest.raises(PolicyRefused, match="another plan"):
        reserve(ledger, plan_sha256="second")
    assert path.read_bytes() == before
    reserve(ledger, plan_sha256="second", run="other")


def test_the_data_do_not_change_within_a_run(path: Path) -> None:
    """Other data under the same run charge nothing, and are not a refusal, whose text a server reads."""
    ledger = Ledger(path, KEY)
    reserve(ledger, dataset_commitment="first")
    before = path.read_bytes()
    with pytest.raises(LedgerError, match="not those that it began with"):
        reserve(ledger, dataset_commitment="second")
    assert path.read_bytes() == before
    reserve(ledger, run="another", dataset_commitment="second")


def test_rounds_of_a_day_are_counted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round is one charge of an adapter; the next is refused until the first is a day old."""
    ledger, now, limits = Ledger(path, KEY), time.time(), Limits(AMPLE.run, rounds_per_day=2)

    def another(hours: float, round: int) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(time, "time", lambda: now + 3600 * hours)
            of_round = [charge(round=round, purpose=purpose) for purpose in (ADAPTER, METRIC)]
            ledger.reserve(of_round, limits)

    another(0, 1)
    another(5, 2)
    with pytest.raises(BudgetExceeded, match="2 rounds within 24 hours"):
        another(23, 3)
    another(24.1, 3)
    with pytest.raises(BudgetExceeded, match="2 rounds within 24 hours"):
        another(28, 4)
    another(29.1, 4)
    assert len(ledger.events()) == 8


def test_rounds_of_a_lifetime_are_counted(path: Path) -> None:
    """Committed or not, over runs and restarts: the third of two rounds is refused, and nothing charged."""
    limits = Limits(AMPLE.run, rounds=2)
    for run in ("first", "second"):
        ledger = Ledger(path, KEY)
        reserved = ledger.reserve([charge(run=run, purpose=each) for each in (ADAPTER, METRIC)], limits)
        if run == "first":
            ledger.commit(reserved[0], "release")
    before = path.read_bytes()
    with pytest.raises(BudgetExceeded, match="2 of at most 2 rounds"):
        reserve(Ledger(path, KEY), limits=limits, run="third")
    assert path.read_bytes() == before
    reserve(ledger, limits=Limits(AMPLE.run, rounds=3), run="third")


@pytest.mark.parametrize("committed", [True, False])
def test_rounds_lie_apart(path: Path, monkeypatch: pytest.MonkeyPatch, committed: bool) -> None:
    """The next round waits, in whatever run; a clock that was set back does not bring it nearer."""
    now, limits = int(time.time()), Limits(AMPLE.run, seconds_between=600.0)

    def another(seconds: float, run: str) -> int:
        with monkeypatch.context() as patched:
            patched.setattr(time, "time", lambda: now + seconds)
            return reserve(Ledger(path, KEY), limits=limits, run=run)

    first = another(0, "first")
    if committed:
        Ledger(path, KEY).commit(first, "release")
    for seconds in (1, 599, -86_400):
        with pytest.raises(BudgetExceeded, match=rf"was {seconds} s ago; 600 s must pass between"):
            another(seconds, "second")
    another(600, "second")
    with pytest.raises(BudgetExceeded, match="600 s must pass between"):
        another(1199, "third")
    assert len(Ledger(path, KEY).events()) == 2


@pytest.mark.parametrize("which", ["run", "lifetime"])
@pytest.mark.parametrize("epsilon", [math.nan, 0.0, -1.0])
def test_a_budget_that_is_none_allows_nothing(path: Path, epsilon: float, which: str) -> None:
    """NaN compares false with everything: such a budget refuses, it does not let pass."""
    limits = {"run": AMPLE.run, which: (epsilon, DELTA)}
    ledger = Ledger(path, KEY)
    with pytest.raises(BudgetExceeded):
        reserve(ledger, limits=Limits(**limits))
    assert ledger.events() == ()


@pytest.mark.parametrize("delta", [0.0, 1.0, math.nan])
def test_a_budget_without_a_delta_allows_nothing(path: Path, delta: float) -> None:
    """A delta out of its range is refused before anything is charged."""
    ledger = Ledger(path, KEY)
    with pytest.raises(PrivacyError, match="delta"):
        reserve(ledger, limits=Limits((100.0, delta)))
    assert ledger.events() == ()


def test_reopening_sees_everything(path: Path) -> None:
    """Another object on the same file has the same entries, and goes on with them."""
    entries = filled(path).read().entries
    again = Ledger(path, KEY)
    assert again.read().entries == entries
    assert reserve(again) == len(entries)
    assert Ledger(path, KEY).read().entries[:-1] == entries


def test_a_charge_holds_all_that_it_is_bound_to(path: Path) -> None:
    """What was charged is read back as it was: event, purpose, run, round and every hash."""
    mine = charge(OTHER, run="mine", round=3, purpose=METRIC, request_sha256="r", clip_norm=1.5)
    ledger = Ledger(path, KEY)
    before = int(time.time())
    other = charge(run="mine", round=3)
    assert ledger.reserve([mine, other], AMPLE) == [1, 2]
    assert Ledger(path, KEY).read().charges == (mine, other)
    assert all(before <= entry.time <= time.time() for entry in ledger.read().entries)


@pytest.mark.parametrize("changes", [{"run": "two"}, {"round": 2}, {"plan_sha256": "another"}])
def test_only_charges_of_one_round_are_reserved_together(
    path: Path, changes: dict[str, object]
) -> None:
    """Limits look at run and plan once, so a second one cannot slip in; nor can nothing be reserved."""
    ledger = Ledger(path, KEY)
    for charges in ([charge(), charge(**changes)], []):
        with pytest.raises(LedgerError, match="together"):
            ledger.reserve(charges, AMPLE)
    assert ledger.events() == ()


def test_a_commit_names_what_it_paid_for(path: Path) -> None:
    """A commit points to its reservation and to the bytes that were released."""
    ledger = Ledger(path, KEY)
    ledger.commit(reserve(ledger), "release")
    last = ledger.read().entries[-1]
    assert (last.index, last.reserve, last.release_sha256) == (2, 1, "release")
    assert (last.opening, last.charge) == (None, None)


@pytest.mark.parametrize("index", [-1, 0, 1, 2, 3, 4, 7, 99])
def test_only_an_open_reservation_can_be_committed(path: Path, index: int) -> None:
    """Neither the opening, nor a commit, nor what is committed or does not exist: only 5 and 6."""
    ledger = filled(path)
    before = path.read_bytes()
    with pytest.raises(LedgerError, match=f"no open reservation {index}"):
        ledger.commit(index, "release")
    assert path.read_bytes() == before
    for one in (6, 5):
        ledger.commit(one, "release")


def test_an_equal_request_finds_its_releases(path: Path) -> None:
    """A repeated request gets the hashes that were released for it, by purpose, in any process."""
    filled(path).commit(5, "adapter")
    ledger = Ledger(path, KEY)
    assert ledger.released("request-0") == {ADAPTER: "release-0"}
    assert ledger.released("request-1") == {ADAPTER: "release-1"}
    assert ledger.released("request") == {ADAPTER: "adapter"}
    ledger.commit(6, "metric")
    assert ledger.released("request") == {ADAPTER: "adapter", METRIC: "metric"}
    assert ledger.released("unknown") == {}


def test_a_reservation_without_a_release_has_nothing_to_repeat(path: Path) -> None:
    """After a crash between charge and release the request must be paid for again."""
    ledger = Ledger(path, KEY)
    reserve(ledger, request_sha256="crashed")
    assert ledger.released("crashed") == {}
    ledger.commit(reserve(ledger, request_sha256="crashed"), "second")
    assert ledger.released("crashed") == {ADAPTER: "second"}
    assert ledger.events() == (EVENT, EVENT)
