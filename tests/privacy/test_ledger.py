"""Tests of the ledger: it may over-count, never under-count."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import resource
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedslm.errors import BudgetExceeded, LedgerError
from fedslm.privacy import accounting
from fedslm.privacy.ledger import Ledger
from fedslm.records import Event

EVENT = Event(0.05, 3.0, 10)
OTHER = Event(0.02, 2.0, 5)
DELTA = 1e-5
AMPLE = (100.0, DELTA)


def budget_for(*events: Event) -> tuple[float, float]:
    """The budget that exactly these events use up."""
    return accounting.epsilon(events, DELTA), DELTA


def reserve(
    ledger: Ledger, event: Event = EVENT, request: str = "request", budget: tuple[float, float] = AMPLE
) -> int:
    """Reserves an event for round 1 of a run."""
    return ledger.reserve(event, run="run", round=1, request_sha256=request, budget=budget)


def filled(path: Path) -> Ledger:
    """A ledger of two reservations, each committed, and an open one."""
    ledger = Ledger(path)
    for number in range(2):
        ledger.commit(reserve(ledger, request=f"request-{number}"), f"release-{number}")
    reserve(ledger, OTHER)
    return ledger


@contextmanager
def disk_full(limit: int) -> Iterator[None]:
    """No file of this process can grow beyond ``limit`` bytes (Python ignores SIGXFSZ)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the ledger is."""
    return tmp_path / "ledger" / "client-00000.jsonl"


def test_a_new_ledger_is_empty(path: Path) -> None:
    """Nothing was spent before the first reservation."""
    ledger = Ledger(path)
    assert (ledger.entries(), ledger.events()) == ([], ())
    assert ledger.spent(DELTA).epsilon == 0.0


def test_a_reservation_is_on_disk_before_it_returns(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The charge is synced whole, and so is the directory that names the file."""
    synced: list[tuple[bool, bytes]] = []

    def recording(descriptor: int, real: object = os.fsync) -> None:
        is_ledger = os.path.sameopenfile(descriptor, probe)
        synced.append((is_ledger, path.read_bytes()))
        real(descriptor)  # type: ignore[operator]

    ledger = Ledger(path)
    path.touch()
    probe = os.open(path, os.O_RDONLY)
    try:
        monkeypatch.setattr(os, "fsync", recording)
        reserve(ledger)
    finally:
        os.close(probe)
    assert [is_ledger for is_ledger, _ in synced] == [True, False]
    assert all(content == path.read_bytes() for _, content in synced)
    assert path.read_bytes().endswith(b"\n")


def _reserve_and_die(path: Path) -> None:
    """Reserves, and is killed before it can commit."""
    reserve(Ledger(path))
    os.kill(os.getpid(), signal.SIGKILL)


def _reserve_many(path: Path, budget: tuple[float, float], gate: object, won: object) -> None:
    """Reserves until the budget is exhausted."""
    gate.wait()  # type: ignore[attr-defined]
    ledger = Ledger(path)
    for number in range(6):
        with suppress(BudgetExceeded):
            index = reserve(ledger, request=f"{os.getpid()}-{number}", budget=budget)
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
    assert Ledger(path).events() == (EVENT,)
    for process in both:
        process.start()
    winners = [won.get(timeout=60) for _ in range(7)]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert won.empty()
    assert len(set(winners)) == 7
    entries = Ledger(path).entries()
    assert [entry.index for entry in entries] == list(range(15))
    assert Ledger(path).events() == (EVENT,) * 8
    assert Ledger(path).spent(DELTA).epsilon <= budget[0]


def test_reserved_counts_whether_committed_or_not(path: Path) -> None:
    """Both kinds of reservation count, and commits cost nothing."""
    ledger = filled(path)
    assert ledger.events() == (EVENT, EVENT, OTHER)
    spent = ledger.spent(DELTA)
    assert spent.epsilon == accounting.epsilon([EVENT, EVENT, OTHER], DELTA)
    assert (spent.delta, spent.steps) == (DELTA, 25)


def test_the_budget_is_a_filter(path: Path) -> None:
    """What fits exactly is charged; one more is refused, charges nothing and says why."""
    ledger, budget = Ledger(path), budget_for(EVENT, EVENT)
    for _ in range(2):
        reserve(ledger, budget=budget)
    before = path.read_bytes()
    with pytest.raises(BudgetExceeded, match=r"budget exhausted: .* epsilon to \d\.\d+ .* budget of"):
        reserve(ledger, budget=budget)
    assert path.read_bytes() == before


def test_a_cheaper_event_may_still_fit(path: Path) -> None:
    """A refusal does not close the ledger: what fits later is charged."""
    ledger, budget = Ledger(path), budget_for(EVENT, OTHER)
    reserve(ledger, budget=budget)
    with pytest.raises(BudgetExceeded):
        reserve(ledger, budget=budget)
    reserve(ledger, OTHER, budget=budget)
    assert ledger.events() == (EVENT, OTHER)


def test_the_budget_is_over_all_runs(path: Path) -> None:
    """Another run on the same data does not start at zero."""
    budget = budget_for(EVENT)
    Ledger(path).reserve(EVENT, run="one", round=1, request_sha256="a", budget=budget)
    with pytest.raises(BudgetExceeded):
        Ledger(path).reserve(EVENT, run="two", round=1, request_sha256="b", budget=budget)


@pytest.mark.parametrize("epsilon", [math.nan, 0.0, -1.0])
def test_a_budget_that_is_none_allows_nothing(path: Path, epsilon: float) -> None:
    """NaN compares false with everything: such a budget refuses, it does not let pass."""
    ledger = Ledger(path)
    with pytest.raises((BudgetExceeded, LedgerError)):
        reserve(ledger, budget=(epsilon, DELTA))
    assert ledger.events() == ()


def test_reopening_sees_everything(path: Path) -> None:
    """Another object on the same file has the same entries, and goes on with them."""
    entries = filled(path).entries()
    again = Ledger(path)
    assert again.entries() == entries
    assert reserve(again) == 5
    assert len(Ledger(path).entries()) == 6


def test_a_commit_names_what_it_paid_for(path: Path) -> None:
    """A commit points to its reservation and carries its run and round."""
    ledger = Ledger(path)
    index = ledger.reserve(EVENT, run="mine", round=3, request_sha256="r", budget=AMPLE)
    ledger.commit(index, "release")
    last = ledger.entries()[-1]
    assert (last.kind, last.reserve, last.release_sha256) == ("commit", 0, "release")
    assert (last.run, last.round, last.event) == ("mine", 3, None)


@pytest.mark.parametrize("index", [-1, 0, 1, 3, 5, 99])
def test_only_an_open_reservation_can_be_committed(path: Path, index: int) -> None:
    """Neither a commit, nor what is committed already, nor what does not exist: only entry 4."""
    ledger = filled(path)
    before = path.read_bytes()
    with pytest.raises(LedgerError, match=f"no open reservation {index}"):
        ledger.commit(index, "release")
    assert path.read_bytes() == before
    ledger.commit(4, "release")


def test_an_equal_request_finds_its_release(path: Path) -> None:
    """A repeated request gets the hash that was released for it, from this or a later process."""
    filled(path)
    ledger = Ledger(path)
    assert ledger.released("request-0") == "release-0"
    assert ledger.released("request-1") == "release-1"
    assert ledger.released("unknown") is None


def test_a_reservation_without_a_release_has_nothing_to_repeat(path: Path) -> None:
    """After a crash between charge and release the request must be paid for again."""
    ledger = Ledger(path)
    reserve(ledger, request="crashed")
    assert ledger.released("crashed") is None
    ledger.commit(reserve(ledger, request="crashed"), "second")
    assert ledger.released("crashed") == "second"
    assert ledger.events() == (EVENT, EVENT)


def test_a_torn_last_line_is_left_out_at_every_byte(tmp_path: Path) -> None:
    """Cut anywhere, the ledger has all lines that were whole, and goes on after them."""
    source = tmp_path / "whole.jsonl"
    entries = filled(source).entries()
    content = source.read_bytes()
    ends = [position + 1 for position, byte in enumerate(content) if byte == ord("\n")]
    cut = tmp_path / "cut.jsonl"
    for length in range(len(content) + 1):
        whole = sum(end <= length for end in ends)
        cut.write_bytes(content[:length])
        assert Ledger(cut).entries() == entries[:whole]
        if length % 97 == 0 or length in ends or length + 1 in ends:
            assert reserve(Ledger(cut), OTHER) == whole
            after = Ledger(cut).entries()
            assert after[:whole] == entries[:whole]
            assert [entry.event for entry in after[whole:]] == [OTHER]


@pytest.mark.parametrize("tail", [b"\0" * 500, b"\xff\xfe", b"{}", b'{"kind": "commit"'])
def test_rubbish_after_the_last_line_is_left_out(path: Path, tail: bytes) -> None:
    """What a crash of the machine leaves behind does not hide the entries before it."""
    ledger = filled(path)
    entries = ledger.entries()
    with path.open("ab") as file:
        file.write(tail)
    assert ledger.entries() == entries
    reserve(ledger)
    assert Ledger(path).entries()[: len(entries)] == entries


def _lines(path: Path) -> list[bytes]:
    """The file's lines, with their ends."""
    return path.read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize("line", range(5))
def test_an_edited_line_is_refused(path: Path, line: int) -> None:
    """Whoever makes an entry cheaper, or moves it to another round, is found out; the last line too."""
    filled(path)
    lines = _lines(path)
    values = json.loads(lines[line])
    if "event" in values:
        values["event"]["noise_multiplier"] = 1000.0
    values["round"] = 2
    lines[line] = json.dumps(values).encode() + b"\n"
    path.write_bytes(b"".join(lines))
    with pytest.raises(LedgerError):
        Ledger(path).entries()


@pytest.mark.parametrize("line", range(4))
def test_a_dropped_line_is_refused(path: Path, line: int) -> None:
    """A charge cannot be taken out of the middle."""
    filled(path)
    lines = _lines(path)
    del lines[line]
    path.write_bytes(b"".join(lines))
    with pytest.raises(LedgerError, match=f"changed at line {line + 1}"):
        Ledger(path).entries()


@pytest.mark.parametrize("line", range(4))
def test_reordered_lines_are_refused(path: Path, line: int) -> None:
    """Entries stay where they were written."""
    filled(path)
    lines = _lines(path)
    lines[line], lines[line + 1] = lines[line + 1], lines[line]
    path.write_bytes(b"".join(lines))
    with pytest.raises(LedgerError, match=f"changed at line {line + 1}"):
        Ledger(path).entries()


@pytest.mark.parametrize(
    "foreign", [b"", b"5", b'"text"', b"null", b"[]", b"{}", b"{", b"\xff", b'{"kind": "gift"}']
)
@pytest.mark.parametrize("line", [0, 2, 5])
def test_a_foreign_line_is_refused(path: Path, foreign: bytes, line: int) -> None:
    """A line that is no entry is a ledger error, whatever it is and wherever it stands."""
    filled(path)
    lines = _lines(path)
    lines.insert(line, foreign + b"\n")
    path.write_bytes(b"".join(lines))
    with pytest.raises(LedgerError):
        Ledger(path).entries()


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_no_byte_before_the_last_line_can_change(data: st.DataObject) -> None:
    """The chain covers every byte of every line that has a successor."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "ledger.jsonl"
        path.write_bytes(_template())
        position = data.draw(st.integers(0, len(b"".join(_lines(path)[:-1])) - 1))
        content = bytearray(path.read_bytes())
        content[position] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        with pytest.raises(LedgerError):
            Ledger(path).entries()


_TEMPLATES: list[bytes] = []


def _template() -> bytes:
    """The content of a filled ledger, made once."""
    if not _TEMPLATES:
        with tempfile.TemporaryDirectory() as directory:
            _TEMPLATES.append(filled(Path(directory) / "ledger.jsonl").path.read_bytes())
    return _TEMPLATES[0]


def test_a_changed_ledger_takes_no_charge(path: Path) -> None:
    """Neither a reservation nor a commit is added to a ledger that was tampered with."""
    filled(path)
    lines = _lines(path)
    path.write_bytes(b"".join(lines[1:]))
    before = path.read_bytes()
    for attempt in (lambda: reserve(Ledger(path)), lambda: Ledger(path).commit(4, "release")):
        with pytest.raises(LedgerError):
            attempt()
    assert path.read_bytes() == before


@pytest.mark.parametrize("spare", [0, 1, 100])
def test_a_full_disk_charges_nothing_and_releases_nothing(path: Path, spare: int) -> None:
    """A charge that cannot be written is an error; what was there stays and goes on later."""
    ledger = filled(path)
    entries, size = ledger.entries(), path.stat().st_size
    with disk_full(size + spare):
        with pytest.raises(LedgerError, match="cannot be written"):
            reserve(ledger)
        with pytest.raises(LedgerError, match="cannot be written"):
            ledger.commit(4, "release")
    assert Ledger(path).entries() == entries
    Ledger(path).commit(4, "release")
    assert reserve(Ledger(path)) == 6


def test_a_failed_sync_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the disk does not confirm a charge nothing may be released, and the charge may stand."""

    def failing(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    ledger = filled(path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", failing)
        with pytest.raises(LedgerError, match="cannot be written"):
            reserve(ledger)
    assert set(Ledger(path).events()) >= {EVENT, OTHER}
    assert len(Ledger(path).events()) >= 3


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    """A ledger without a place is an error of ours."""
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match="cannot be created"):
        Ledger(tmp_path / "file" / "client.jsonl")


def test_a_ledger_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    """A directory in the place of the file is not an empty ledger."""
    (tmp_path / "client.jsonl").mkdir()
    with pytest.raises(LedgerError, match="cannot be read"):
        Ledger(tmp_path / "client.jsonl").events()


_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("reserve"), st.sampled_from([EVENT, OTHER])),
        st.tuples(st.just("commit"), st.integers(0, 3)),
        st.tuples(st.just("torn"), st.floats(0, 1, exclude_max=True)),
        st.tuples(st.just("lost"), st.integers(0, 40)),
        st.tuples(st.just("reopen"), st.none()),
    ),
    max_size=12,
)


@given(steps=_STEPS)
@settings(max_examples=60, deadline=None)
def test_no_history_of_crashes_under_counts(steps: list[tuple[str, object]]) -> None:
    """Whatever is reserved, committed, torn off and reopened, in any order: every charge counts."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "ledger.jsonl"
        ledger, charged, open_ones = Ledger(path), [], []
        for kind, detail in steps:
            match kind, detail:
                case "reserve", Event() as event:
                    open_ones.append(reserve(ledger, event))
                    charged.append(event)
                case "commit", int(choice) if open_ones:
                    ledger.commit(open_ones.pop(choice % len(open_ones)), "release")
                case "torn", float(share):  # killed while it appended a reservation
                    before = path.read_bytes() if path.exists() else b""
                    reserve(ledger)
                    line = path.read_bytes()[len(before) :] if before else path.read_bytes()
                    path.write_bytes(before + line[: int(share * len(line))])
                case "lost", int(size):  # space was taken, and the data never came
                    with path.open("ab") as file:
                        file.write(b"\0" * size)
                case _:
                    ledger = Ledger(path)
            assert list(Ledger(path).events()) == charged
            assert ledger.spent(DELTA).steps == sum(event.steps for event in charged)
