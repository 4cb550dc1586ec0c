"""Replies from a SuperLink: Flower's own grid, connected to a small server whose uploads a test controls."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.constant import OBJECT_PUSH_SESSION_TTL_SECONDS
from flwr.supercore.run import RunNotRunningException
from flwr.superlink.grid import HttpGrid
from support.served import first_request
from support.superlink import SuperLink, asked

from fedslm.config import Config
from fedslm.engines.local import LocalGrid
from fedslm.errors import Unanswered
from fedslm.federation import fetch
from fedslm.federation.exchange import Exchange
from fedslm.federation.fetch import Fetch
from fedslm.federation.steady import Steady
from fedslm.protocol.inflating import Limits
from fedslm.protocol.lifetime import lifetime_of
from fedslm.protocol.messages import TRAIN
from fedslm.workers import InlinePool

LIMIT = 1 << 20
LIMITS = Limits(LIMIT, record_bytes=1 << 16, most_objects=8)


@pytest.fixture
def superlink() -> Iterator[SuperLink]:
    """A SuperLink that is up."""
    with SuperLink().up() as made:
        yield made


def reply_to(message: Message, size: int = 100) -> Message:
    """A reply like ours: a record of values, and one of tensors."""
    tensors = Array("uint8", (size,), "safetensors", bytes([message.metadata.dst_node_id]) * size)
    content = RecordDict(
        {"reply": ConfigRecord({"status": "ok"}), "delta": ArrayRecord({"t": tensors})}
    )
    return Message(content, reply_to=message)


def fetching(superlink: SuperLink, messages: list[Message], seconds: float) -> Fetch:
    """What takes the replies to messages."""
    sent = {message.metadata.message_id: message for message in messages}
    return Fetch(Steady(superlink.grid()), sent, time.monotonic() + seconds, LIMITS)


def test_all_that_is_outstanding_is_asked_for_at_once(superlink: SuperLink) -> None:
    """The first poll names every message; a reply that came early is not asked for again, nor lost."""
    messages = [asked(number) for number in (5, 6, 7)]
    names = [message.metadata.message_id for message in messages]
    superlink.upload(reply_to(messages[0]))
    superlink.upload(reply_to(messages[2]))
    made = fetching(superlink, messages, 20.0)
    first = made.reply(names[0])
    assert first is not None
    assert dict(first.content.config_records["reply"]) == {"status": "ok"}
    threading.Timer(0.5, superlink.upload, [reply_to(messages[1])]).start()
    others = [made.reply(name) for name in names[1:]]
    nodes = [reply.metadata.src_node_id for reply in (first, *others) if reply is not None]
    assert nodes == [5, 6, 7]
    assert set(superlink.asked[0]) == set(names)
    assert all(asked_for == [names[1]] for asked_for in superlink.asked[1:])
    assert len(superlink.confirmed) == 3


def test_an_upload_that_stops_holds_nobody_beyond_the_deadline(superlink: SuperLink) -> None:
    """A node that died in mid-upload is late at the deadline; replies that were there by then count."""
    dead, healthy, slow = messages = [asked(number) for number in (5, 6, 7)]
    superlink.upload(reply_to(dead), most=1)
    superlink.upload(reply_to(healthy))
    made = fetching(superlink, messages, 2.0)
    threading.Timer(2.5, superlink.upload, [reply_to(slow)]).start()
    began = time.monotonic()
    replies = [made.reply(message.metadata.message_id) for message in messages]
    assert 1.5 < time.monotonic() - began < 15.0
    assert [reply is None for reply in replies] == [True, False, True]
    assert len(superlink.confirmed) == 2  # what came of the dead node's is deleted as well


def test_what_is_announced_after_the_deadline_is_late(superlink: SuperLink) -> None:
    """The last poll is for everybody: while replies are still taken, no later one is let in."""
    early, late = messages = [asked(5), asked(6)]
    made = fetching(superlink, messages, 1.0)
    superlink.upload(reply_to(early))
    made._poll()
    time.sleep(1.1)
    assert made.reply(early.metadata.message_id) is not None
    superlink.upload(reply_to(late))
    assert made.reply(late.metadata.message_id) is None


def test_an_upload_that_goes_on_is_waited_for(superlink: SuperLink) -> None:
    """Objects that come within the deadline are taken when they are there."""
    message = asked(5)
    reply = reply_to(message)
    superlink.upload(reply, most=1)
    threading.Timer(0.7, superlink.upload, [reply]).start()
    assert fetching(superlink, [message], 20.0).reply(message.metadata.message_id) is not None


def test_an_upload_that_the_superlink_gave_up_has_failed(superlink: SuperLink) -> None:
    """It is not waited for, and the reason is said."""
    message = asked(5)
    superlink.expired.update(superlink.upload(reply_to(message), most=1))
    found = fetching(superlink, [message], 20.0).reply(message.metadata.message_id)
    assert found is not None
    assert "not finished in time" in found.error.reason


def test_a_tree_of_many_objects_is_refused_before_it_is_fetched(superlink: SuperLink) -> None:
    """Not one object of it is pulled, it counts as failed, and it is deleted at the SuperLink."""
    message = asked(5)
    records = {f"r{number}": ConfigRecord({"n": number}) for number in range(9)}
    superlink.upload(Message(RecordDict(records), reply_to=message))
    found = fetching(superlink, [message], 20.0).reply(message.metadata.message_id)
    assert found is not None
    assert "more than 8 objects" in found.error.reason
    assert superlink.calls["pull_object"] == 0
    assert len(superlink.confirmed) == 1


def test_a_large_reply_is_refused(superlink: SuperLink) -> None:
    """Objects beyond the limit together count as failed."""
    message = asked(5)
    superlink.upload(reply_to(message, LIMIT + 1))
    found = fetching(superlink, [message], 20.0).reply(message.metadata.message_id)
    assert found is not None
    assert "more than 1048576 bytes" in found.error.reason


def test_a_reply_to_another_message_is_refused(superlink: SuperLink) -> None:
    """An outline that names one message, with a reply to another below it, counts as failed."""
    message, other = asked(5), asked(6)
    superlink.upload(reply_to(other))
    outline, tree = superlink.outlines.pop(other.metadata.message_id)
    outline.metadata.reply_to_message_id = message.metadata.message_id
    superlink.outlines[message.metadata.message_id] = outline, tree
    found = fetching(superlink, [message], 20.0).reply(message.metadata.message_id)
    assert found is not None
    assert "answers another message" in found.error.reason


@pytest.mark.parametrize("status", [500, 503])
def test_an_error_of_the_superlink_is_tried_again(superlink: SuperLink, status: int) -> None:
    """A 5xx of every call for a second costs a second, and no reply."""
    message = asked(5)
    superlink.upload(reply_to(message))
    superlink.status = status
    threading.Timer(1.0, setattr, [superlink, "status", 200]).start()
    assert fetching(superlink, [message], 20.0).reply(message.metadata.message_id) is not None
    assert superlink.calls["pull_messages"] > 1


def test_a_superlink_that_is_gone_makes_everybody_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """No call is tried longer than the deadline and the grace after it, whoever is still to come."""
    monkeypatch.setattr(fetch, "GRACE_SECONDS", 0.5)
    with SuperLink().up() as superlink:
        messages = [asked(number) for number in range(5, 25)]
        made = fetching(superlink, messages, 1.0)
    began = time.monotonic()
    assert [made.reply(message.metadata.message_id) for message in messages] == [None] * 20
    assert 1.0 <= time.monotonic() - began < 15.0


def test_an_exchange_without_a_superlink(make_config: Callable[..., Config]) -> None:
    """Nodes that cannot be asked until the deadline are late, and the round goes on."""
    request = first_request(make_config())
    with SuperLink().up() as superlink:
        grid = superlink.grid()
    began = time.monotonic()
    answers = list(Exchange(grid, {0: 5, 1: 6}, 2.0).replies(request, [0, 1], TRAIN))
    assert answers == [(0, None), (1, None)]
    assert time.monotonic() - began < 15.0


def test_a_run_that_is_over_ends(superlink: SuperLink) -> None:
    """A SuperLink that says that the run was stopped is not asked again."""
    superlink.status = 403
    with pytest.raises(RunNotRunningException):
        Steady(superlink.grid()).call(lambda grid: grid.get_node_ids(), time.monotonic() + 20.0)
    assert superlink.calls["get_nodes"] == 2


def test_who_hears_second_that_a_run_is_over_does_not_fail(superlink: SuperLink) -> None:
    """Flower interrupts the process at the first 401; a later one is the end as well, and no failed run."""
    superlink.status = 401
    steady, until = Steady(superlink.grid()), time.monotonic() + 20.0
    # A shell starts what ends in & with SIGINT ignored, and then Python does not raise either.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            steady.call(lambda grid: grid.get_node_ids(), until)
    finally:
        signal.signal(signal.SIGINT, before)
    with pytest.raises(RunNotRunningException):
        steady.call(lambda grid: grid.get_node_ids(), until)


def test_an_error_of_ours_is_not_tried_again(superlink: SuperLink) -> None:
    """A call that the SuperLink cannot understand fails at once."""
    superlink.status = 400
    with pytest.raises(Exception, match="400"):
        Steady(superlink.grid()).call(lambda grid: grid.get_node_ids(), time.monotonic() + 20.0)
    assert superlink.calls["get_nodes"] == 1


def test_a_call_gives_up(superlink: SuperLink) -> None:
    """It ends at the time that the caller gave."""
    superlink.status = 503
    began = time.monotonic()
    with pytest.raises(Unanswered, match="503"):
        Steady(superlink.grid()).call(lambda grid: grid.get_node_ids(), began + 1.0)
    assert time.monotonic() - began < 15.0


def test_other_grids_are_called_as_they_are() -> None:
    """A simulation's grid is no SuperLink."""
    steady = Steady(LocalGrid(2, InlinePool()))
    assert not steady.is_remote
    assert steady.call(lambda grid: list(grid.get_node_ids()), 0.0) == [2, 3]


def test_what_we_lean_on_in_flower(superlink: SuperLink) -> None:
    """Contract: Flower's grid has the parts that Steady and Fetch use; its upload session lasts 180 s."""
    changed = "Flower has changed: see fedslm/federation/steady.py and fetch.py"
    grid = superlink.grid()
    for name in ("_client", "_retry_invoker", "_runtime_client", "node", "run"):
        assert hasattr(grid, name), f"{changed}: HttpGrid has no {name}"
    assert isinstance(type(grid)._runtime_client, property), f"{changed}: it connects by itself"
    for name in ("PullMessages", "PullObject", "ConfirmMessageReceived", "GetNodes", "PushMessages"):
        assert hasattr(grid._runtime_client, name), f"{changed}: no call {name}"
    steady = Steady(grid)
    once = steady._once
    assert once is not grid, changed
    assert isinstance(once, HttpGrid), changed
    assert grid._runtime_client._retry_invoker is not None, f"{changed}: it tries nothing again"
    assert once._runtime_client._retry_invoker is None, f"{changed}: it tries calls again"
    assert once._runtime_client is not grid._runtime_client, f"{changed}: connections are shared"
    steady.call(lambda each: each.get_node_ids(), time.monotonic() + 7.0)
    assert once._runtime_client._client.timeout.read <= 7.0, f"{changed}: no time-out can be set"
    assert lifetime_of(10.0) > 10.0 + OBJECT_PUSH_SESSION_TTL_SECONDS + fetch.SWEEP_SECONDS
