"""Where a client's round starts: the frozen tensors, at a deployed node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.served import ask, context_of, first_request, write_policy
from support.tiny import PRIVATE

from fedslm import layout
from fedslm.client import start
from fedslm.config import Config
from fedslm.engines.local import LocalGrid
from fedslm.federation.exchange import Asked, Exchange
from fedslm.protocol.messages import TRAIN, Reply, Request
from fedslm.records import AdapterState
from fedslm.workers import InlinePool

NOTHING = AdapterState({})


@pytest.fixture
def whole(make_config: Callable[..., Config]) -> Request:
    """The first request of a run whose A is frozen; it carries the frozen tensors."""
    request = first_request(make_config(aggregation={"method": "ffa"}, privacy=PRIVATE))
    assert request.frozen
    return request


def test_a_node_asks_for_frozen_tensors_that_it_lacks(whole: Request, tmp_path: Path) -> None:
    """It answers "needs-frozen" before anything is charged, keeps what it is sent, and asks again if that is lost."""
    node = write_policy(tmp_path / "node")
    short = replace(whole, frozen=NOTHING)
    lacking = ask(short, context_of(0, node))
    assert (lacking.status, lacking.delta, lacking.statement) == ("needs-frozen", None, "")
    assert not (node / layout.LEDGER).exists() or not (node / layout.LEDGER).read_bytes()
    assert ask(whole, context_of(0, node)).status == "ok"
    assert ask(replace(short, round=2), context_of(0, node)).status == "ok"
    (node / layout.FROZEN).unlink()
    start._frozen.cache_clear()  # as in a new process
    assert ask(replace(short, round=3), context_of(0, node)).status == "needs-frozen"


def test_other_frozen_tensors_are_refused(whole: Request, tmp_path: Path) -> None:
    """What the server sends must be what it names."""
    other = AdapterState({key: value + np.float32(1) for key, value in whole.frozen.tensors.items()})
    reply = ask(replace(whole, frozen=other), context_of(0, write_policy(tmp_path / "node")))
    assert (reply.status, reply.reason.startswith("the frozen tensors that came")) == ("refused", True)


def test_the_server_sends_frozen_tensors_until_it_is_answered(whole: Request) -> None:
    """And again after "needs-frozen"; another refusal changes nothing."""
    exchange = Exchange(LocalGrid(1, InlinePool()), {0: 2}, 60.0, whole.frozen)
    short = replace(whole, frozen=NOTHING)

    def sent() -> bool:
        (message,) = exchange._messages(Asked(short, TRAIN, 60.0, None), [0])
        return bool(Request.from_records(message.content).frozen)

    seen = [sent()]
    for status in ("ok", "refused", "needs-frozen", "ok"):
        exchange.heard(0, Reply(status, 1))  # type: ignore[arg-type]
        seen.append(sent())
    assert seen == [True, False, False, True, False]
