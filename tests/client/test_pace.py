"""When a reply leaves a node: at a public time, whatever it took to compute it."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message
from hypothesis import given, settings
from hypothesis import strategies as st
from support.served import chain_of, context_of, first_request, write_policy
from support.tiny import PRIVATE

from fedslm import layout
from fedslm.client import app
from fedslm.client.handlers import train
from fedslm.client.pace import Pace, period_of
from fedslm.client.personal import measure
from fedslm.config import Config
from fedslm.deployment.metrics import NodeCounts
from fedslm.deployment.node import Ready, _Running
from fedslm.engines.local import LocalGrid
from fedslm.errors import FederationError, NeedsTime, PolicyRefused
from fedslm.protocol.lifetime import deadline_with, lifetime_of
from fedslm.protocol.messages import MEASURE, TRAIN, Reply, Request
from fedslm.workers import InlinePool

PERIOD, DAY = 100.0, 86_400.0


class Clock:
    """A clock that stands still until somebody works or waits."""

    def __init__(self, now: float = 1e6) -> None:
        self.now, self.stops = now, False

    def __call__(self) -> float:
        """The time."""
        return self.now

    def stopped(self, seconds: float) -> bool:
        """Waits, or is stopped at once."""
        self.now += 0.0 if self.stops else seconds
        return self.stops


def leaves_after(
    pace: Pace, clock: Clock, work: float, *, seconds: float = DAY, period: float = PERIOD
) -> float:
    """Seconds after which a reply leaves whose work would take so long; work ends at its time limit."""
    began = clock.now
    pace.begin(period, seconds)
    clock.now += min(work, pace.left())
    assert pace.wait(clock.stopped)
    return clock.now - began


@pytest.mark.parametrize(
    ("work", "leaves"),
    [
        *((0.0, 100.0), (1.0, 100.0), (99.9, 100.0), (100.0, 100.0), (100.1, 200.0), (200.0, 200.0)),
        *((200.1, 400.0), (399.0, 400.0), (1600.5, 3200.0)),
    ],
)
def test_a_reply_leaves_at_a_public_time(work: float, leaves: float) -> None:
    """After one period, or after 2, 4, 8 … of them if the work took longer; never when it ends."""
    clock = Clock()
    assert leaves_after(Pace(clock), clock, work) == pytest.approx(leaves)


def test_a_late_reply_makes_all_later_ones_later() -> None:
    """The next reply tells nothing: it is held until the time at which the late one left."""
    clock = Clock()
    pace = Pace(clock)
    works = (1.0, 250.0, 1.0, 300.0, 401.0, 1.0)
    assert [leaves_after(pace, clock, each) for each in works] == pytest.approx(
        [100.0, 400.0, 400.0, 400.0, 800.0, 800.0]
    )
    assert leaves_after(Pace(clock), clock, 1.0) == pytest.approx(100.0)  # as after a restart


def test_another_period_is_no_way_around_a_late_reply() -> None:
    """An operator's new period counts, but no reply leaves sooner than a late one did."""
    clock = Clock()
    pace = Pace(clock)
    leaves_after(pace, clock, 150.0)
    assert leaves_after(pace, clock, 1.0, period=30.0) == pytest.approx(240.0)
    assert leaves_after(pace, clock, 1.0, period=500.0) == pytest.approx(500.0)


def test_a_longer_period_that_is_kept_is_not_remembered() -> None:
    """Only a late reply is: an operator may lower the period again."""
    clock = Clock()
    pace = Pace(clock)
    assert leaves_after(pace, clock, 1.0, period=500.0) == pytest.approx(500.0)
    assert leaves_after(pace, clock, 1.0, period=30.0) == pytest.approx(30.0)


rounds = st.lists(st.tuples(st.floats(0.0, 1e6), st.floats(0.0, DAY)), min_size=1, max_size=60)


@settings(deadline=None)
@given(rounds, st.sampled_from([1.0, 7.3, 300.0, 43_200.0]))
def test_what_all_replies_of_a_process_tell(asked: list[tuple[float, float]], period: float) -> None:
    """Whatever work and time limits a server chooses: few times, never earlier, few of them later."""
    clock = Clock()
    pace, after, refused = Pace(clock), [], []
    for work, seconds in asked:
        began = clock.now
        try:
            after.append(leaves_after(pace, clock, work, seconds=seconds, period=period))
        except NeedsTime as error:
            refused.append((clock.now - began, seconds, error.seconds))
    assert all(waited == 0.0 for waited, _, _ in refused)
    assert all(period <= needed <= DAY for _, _, needed in refused)
    assert all(seconds < deadline_with(needed) for _, seconds, needed in refused)
    powers = [math.log2(each / period) for each in after]
    assert all(abs(each - round(each)) < 1e-6 and each > -1e-6 for each in powers)
    assert all(later >= sooner - 1e-6 for sooner, later in pairwise(after))
    assert len({round(each) for each in powers}) <= math.ceil(math.log2(DAY / period)) + 1


def test_a_servers_time_limit_tells_no_more() -> None:
    """Work is stopped at one of the public times; that it was stopped shows once, not in every round."""
    clock = Clock()
    for seconds, last in ((160.0, 100.0), (199.9, 100.0), (200.0, 200.0), (399.0, 200.0)):
        pace = Pace(clock)
        pace.begin(PERIOD, seconds)
        assert pace.left() == pytest.approx(last)
    pace = Pace(clock)
    assert leaves_after(pace, clock, 1e9, seconds=160.0) == pytest.approx(100.0)
    clock.now += 1e-3
    pace = Pace(clock)
    began = clock.now
    pace.begin(PERIOD, 160.0)
    clock.now += pace.left() + 0.05  # it took a moment to stop it
    assert pace.wait(clock.stopped)
    assert clock.now - began == pytest.approx(100.05)
    with pytest.raises(NeedsTime) as caught:  # the same again is refused
        pace.begin(PERIOD, 160.0)
    assert caught.value.seconds == 200.0


def test_a_request_that_leaves_too_little_time_is_refused_at_once() -> None:
    """It names the period and the shortest deadline; with exactly that deadline it is taken."""
    clock = Clock()
    pace = Pace(clock)
    with pytest.raises(
        NeedsTime, match=r"answers after 100 s, .* leaves 159.9 s.* at least 160"
    ) as caught:
        pace.begin(PERIOD, 159.9)
    assert caught.value.seconds == PERIOD
    assert not pace.holds
    assert pace.wait(clock.stopped)
    assert clock.now == 1e6
    pace.begin(PERIOD, deadline_with(PERIOD))
    assert pace.holds


def test_without_a_period_a_reply_leaves_at_once() -> None:
    """And the work has all of its time, even after a request that was held back."""
    clock = Clock()
    pace = Pace(clock)
    pace.begin(PERIOD, DAY)
    pace.begin(None, 50.0)
    assert (pace.holds, pace.left()) == (False, 50.0)
    clock.now += 60.0
    assert pace.left() == 0.0
    assert pace.wait(clock.stopped)
    assert clock.now == 1e6 + 60.0


def test_a_node_that_stops_sends_nothing_and_does_not_wait() -> None:
    """The wait ends at once, and says that the reply must not leave."""
    clock = Clock()
    pace = Pace(clock)
    pace.begin(PERIOD, DAY)
    clock.stops = True
    assert not pace.wait(clock.stopped)
    assert clock.now == 1e6


def test_a_wait_that_ends_early_is_continued() -> None:
    """A timer may wake too soon; the reply does not leave before its time."""
    clock = Clock()
    pace = Pace(clock)

    def dozes(seconds: float) -> bool:
        return clock.stopped(min(seconds, 7.0))

    pace.begin(PERIOD, DAY)
    assert pace.wait(dozes)
    assert clock.now >= 1e6 + PERIOD


def test_the_operator_reads_how_long_the_work_took(caplog: pytest.LogCaptureFixture) -> None:
    """In the node's own log; a period that is too short is a warning that names the remedy."""
    caplog.set_level("INFO", logger="fedslm.client.pace")
    clock = Clock()
    pace = Pace(clock)
    leaves_after(pace, clock, 12.0)
    leaves_after(pace, clock, 120.0)
    (kept, late) = caplog.records
    assert (kept.levelname, late.levelname) == ("INFO", "WARNING")
    assert kept.getMessage() == "the work took 12.0 s; the reply leaves after 100 s"
    assert "answers after 200 s: set answer_after_seconds" in late.getMessage()


def test_real_seconds() -> None:
    """By the machine's own clock, and a real event that somebody else sets."""
    pace, stop = Pace(), threading.Event()
    began = time.monotonic()
    pace.begin(0.3, DAY)
    assert pace.wait(stop.wait)
    assert time.monotonic() - began >= 0.3
    pace.begin(3600.0, DAY)
    threading.Timer(0.05, stop.set).start()
    assert not pace.wait(stop.wait)
    assert time.monotonic() - began < 3600.0


def test_whose_policy_counts(tmp_path: Path) -> None:
    """A real node's own, read again each time; a simulated client never waits."""
    node = write_policy(tmp_path / "node", answer_after_seconds=PERIOD)
    real = context_of(0, node)
    real.node_config["data-directory"] = str(tmp_path)
    assert period_of(real) == PERIOD
    write_policy(node)
    assert period_of(real) is None
    write_policy(node, answer_after_seconds=-1.0)
    with pytest.raises(PolicyRefused, match="is invalid"):
        period_of(real)
    with pytest.raises(FederationError, match="a node's config must have"):
        period_of(Context(0, 2, {"partition-id": 0}, context_of(0).state, {}))
    assert period_of(context_of(0)) is None


@pytest.fixture(scope="module")
def honest(config_in: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Request:
    """The first request of a private run."""
    return first_request(config_in(tmp_path_factory.mktemp("server") / "run", privacy=PRIVATE))


def message_for(request: Request, context: Context, seconds: float, kind: str = TRAIN) -> Message:
    """The request as a server with this deadline sends it to a real node."""
    LocalGrid(1, InlinePool())  # tells Flower who sends
    data = str(Path(request.setup.directory) / layout.DATA)
    context.node_config.setdefault("data-directory", data)
    made = Message(request.to_records(), context.node_id, kind, ttl=lifetime_of(seconds))
    made.metadata.__dict__["_message_id"] = "1"
    return made


@pytest.fixture(params=["app", "node"])
def node_of(request: pytest.FixtureRequest) -> Callable[[Clock], Callable[[Message, Context], Message]]:
    """A node in its process: below Flower's SuperNode, and that of `fedslm node`."""

    def build(clock: Clock) -> Callable[[Message, Context], Message]:
        pace = Pace(clock)
        if request.param == "app":
            usual = {TRAIN: train, MEASURE: measure}

            def by_app(message: Message, context: Context) -> Message:
                handler = usual[message.metadata.message_type]
                return app.paced(handler, pace, clock.stopped)(message, context)

            return by_app
        ready: Any = Ready(Path(), None, None)  # type: ignore[arg-type]
        running = _Running(ready, NodeCounts(), pace, threading.Event())
        running.stop.wait = clock.stopped  # type: ignore[method-assign, assignment]

        def by_node(message: Message, context: Context) -> Message:
            reply = running.reply(message, context, lambda: nullcontext(InlinePool()))  # type: ignore[arg-type, return-value]
            assert running.leaves()
            return reply

        return by_node

    return build


def test_every_reply_waits(
    honest: Request,
    tmp_path: Path,
    node_of: Callable[[Clock], Callable[[Message, Context], Message]],
) -> None:
    """An update, the same again, a refusal, a failure and what a measurement says: all after one period."""
    clock, directory = Clock(), write_policy(tmp_path / "node", answer_after_seconds=PERIOD)
    node, context = node_of(clock), context_of(0, directory)
    found = []

    def ask(kind: str = TRAIN, seconds: float = 3600.0) -> Message:
        began = clock.now
        reply = node(message_for(honest, context, seconds, kind), context)
        found.append(clock.now - began)
        return reply

    first, again = (Reply.from_records(ask().content) for _ in range(2))
    assert (first.status, first.delta_sha256) == ("ok", again.delta_sha256)
    write_policy(directory, answer_after_seconds=PERIOD, min_noise_multiplier=9.0)
    assert Reply.from_records(ask().content).status == "refused"
    write_policy(directory, answer_after_seconds=PERIOD)
    (directory / layout.LEDGER).write_text("no ledger\n")
    assert Reply.from_records(ask().content).status == "failed"
    assert ask(MEASURE).content.config_records["measured"]["status"] == "ok"
    assert found == [PERIOD] * 5


def test_what_depends_on_no_record_is_refused_at_once(
    honest: Request,
    tmp_path: Path,
    node_of: Callable[[Clock], Callable[[Message, Context], Message]],
) -> None:
    """A deadline that is too short, and a policy that cannot be read: nothing is charged, nobody waits."""
    clock, directory = Clock(), write_policy(tmp_path / "node", answer_after_seconds=PERIOD)
    node, context = node_of(clock), context_of(0, directory)
    short = Reply.from_records(node(message_for(honest, context, 120.0), context).content)
    assert (short.status, short.round, short.answer_after_seconds) == ("needs-time", 1, PERIOD)
    assert "round_deadline_seconds to at least 160" in short.reason
    measured = node(message_for(honest, context, 120.0, MEASURE), context)
    assert measured.content.config_records["measured"]["status"] == short.reason
    write_policy(directory, answer_after_seconds=0.0)
    closed = Reply.from_records(node(message_for(honest, context, 3600.0), context).content)
    assert (closed.status, "answer_after_seconds" in closed.reason) == ("refused", True)
    assert clock.now == 1e6
    assert not (directory / layout.LEDGER).exists()
    write_policy(directory, answer_after_seconds=PERIOD)
    taken = Reply.from_records(node(message_for(honest, context, 160.0), context).content)
    assert (taken.status, len(chain_of(directory).charges)) == ("ok", 1)
    assert clock.now == 1e6 + PERIOD


class Endless:
    """A pool whose job never ends; the node is stopped after a few looks at it."""

    def __init__(self, stop: threading.Event) -> None:
        self.stop, self.looks, self.abandoned = stop, 0, list[int]()

    def submit(self, *_: object) -> int:
        """The job's number."""
        return 7

    def poll(self, job: int, timeout_seconds: float) -> None:
        """Nothing yet."""
        self.looks += 1
        if self.looks == 3:
            self.stop.set()

    def abandon(self, jobs: list[int]) -> None:
        """Takes note."""
        self.abandoned += jobs


def test_a_node_that_stops_gives_up_its_work(honest: Request, tmp_path: Path) -> None:
    """At the next look, so that the end of the work does not show; nothing is sent."""
    directory = write_policy(tmp_path / "node", answer_after_seconds=PERIOD)
    context, stop = context_of(0, directory), threading.Event()
    running = _Running(Ready(Path(), None, None), NodeCounts(), Pace(), stop)  # type: ignore[arg-type]
    pool: Any = Endless(stop)

    def workers() -> AbstractContextManager[Any]:
        return nullcontext(pool)

    running.reply(message_for(honest, context, 3600.0), context, workers)
    assert (pool.looks, pool.abandoned) == (3, [7])
    assert not running.leaves()
