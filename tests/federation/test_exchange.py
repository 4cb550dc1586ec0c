"""Which nodes a round asks and waits for, on the grid of a simulation whose nodes come and go."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import pytest
from flwr.app import Message
from support.pace import patient
from support.served import first_request

from fedslm.client.pace import Pace
from fedslm.config import Config
from fedslm.engines.local import LocalGrid
from fedslm.errors import FederationError, NeedsTime
from fedslm.federation import exchange
from fedslm.federation.exchange import Exchange
from fedslm.federation.population import gather
from fedslm.protocol.lifetime import work_seconds
from fedslm.protocol.messages import TRAIN, Reply, Request
from fedslm.workers import InlinePool

NODES = {0: 2, 1: 3, 2: 4}


class Coming(LocalGrid):
    """A grid that sees some nodes only from a time on."""

    hidden: dict[int, float]

    def get_node_ids(self) -> Iterable[int]:
        """Those that are not hidden now."""
        now = time.monotonic()
        return [node for node in super().get_node_ids() if now >= self.hidden.get(node, 0.0)]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Notes what was sent."""
        self.pushed = list(messages)
        return super().push_messages(self.pushed)


@pytest.fixture
def request_(make_config: Callable[..., Config]) -> Request:
    """The first request of a run."""
    return first_request(make_config())


@pytest.fixture
def grid() -> Coming:
    """Three nodes in this process, all there."""
    made = Coming(3, InlinePool())
    made.hidden = {}
    return made


def asked(made: Exchange, request: Request) -> list[bool]:
    """Whether each client gave an answer."""
    return [reply is not None for _, reply in made.replies(request, [0, 1, 2], TRAIN)]


def test_a_deadline_is_extended_for_a_nodes_policy(
    grid: Coming, request_: Request, caplog: pytest.LogCaptureFixture
) -> None:
    """From the next request on, never shortened, and to four times the operator's at most."""
    caplog.set_level("WARNING", logger="fedslm.federation.exchange")
    made, seconds = Exchange(grid, NODES, 100.0), []
    for period in (39.0, 100.5, 50.0, 340.0, 340.5, 86_400.0):
        made.heard(1, Reply("needs-time", 1, answer_after_seconds=period))
        seconds.append(made.seconds)
    assert seconds == [100.0, 161.0, 161.0, 400.0, 400.0, 400.0]
    assert caplog.messages == [
        "client 1 answers after 100.5 s: the deadline of the next rounds is 161 s, not 100 s",
        "client 1 answers after 340 s: the deadline of the next rounds is 400 s, not 161 s",
        "client 1 answers after 340.5 s and needs federation.round_deadline_seconds of at least 401; "
        "a run extends it to 400 at most",
        "client 1 answers after 86400 s and needs federation.round_deadline_seconds of at least 86460; "
        "a run extends it to 400 at most",
    ]
    list(made.replies(request_, [0], TRAIN))
    (message,) = grid.pushed
    pace = Pace()
    pace.begin(340.0, work_seconds(message.metadata.ttl))
    with pytest.raises(NeedsTime):
        pace.begin(340.5, work_seconds(message.metadata.ttl))
    made.heard(1, Reply("refused", 1))
    assert made.seconds == 400.0


def test_a_node_that_comes_back_is_waited_for(
    grid: Coming, request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that the grid saw before is waited for, and asked when it is back."""
    monkeypatch.setattr(exchange, "_PATIENCE_SECONDS", 120.0)  # ends once it is seen
    grid.hidden = {4: time.monotonic() + 1.0}
    assert asked(Exchange(grid, NODES, 600.0), request_) == [True, True, True]


def test_a_node_that_stays_away_is_waited_for_once(
    grid: Coming, request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second round does not wait for it, and asks it once it is seen again."""
    patience = patient(2.0)
    monkeypatch.setattr(exchange, "_PATIENCE_SECONDS", patience)
    grid.hidden = {4: float("inf")}
    made = Exchange(grid, NODES, 600.0)
    seconds = []
    for _ in range(2):
        began = time.monotonic()
        assert made._seen([0, 1, 2]) == {2, 3}
        seconds.append(time.monotonic() - began)
    assert seconds[0] >= patience
    assert seconds[1] < patience / 2
    grid.hidden = {}
    assert asked(made, request_) == [True, True, True]
    assert not made.away


def test_a_node_that_was_never_there_is_not_waited_for(grid: Coming) -> None:
    """Whoever was away when enough nodes had come is not waited for."""
    grid.hidden = {4: float("inf")}
    away = frozenset(NODES.values()) - gather(grid, NODES.values(), 2, 600.0)
    assert away == {4}
    began = time.monotonic()
    assert Exchange(grid, NODES, 600.0, away=away)._seen([0, 1, 2]) == {2, 3}
    assert time.monotonic() - began < exchange._PATIENCE_SECONDS / 2


def test_too_few_nodes_come(grid: Coming) -> None:
    """The first round does not begin without the nodes that it needs."""
    grid.hidden = {4: float("inf")}
    with pytest.raises(FederationError, match="2 of the 3 nodes"):
        gather(grid, NODES.values(), 3, 0.2)
