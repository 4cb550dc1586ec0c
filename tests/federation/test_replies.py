"""What the server believes of a node's spend statement: what is not exactly right is not used."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from support.served import ask, context_of, first_request, message_to, records_of, run_with
from support.tiny import PRIVATE

from fedslm.config import Config
from fedslm.federation.replies import checked, continued
from fedslm.privacy.keys import public_hex, signature_of, signing_key
from fedslm.privacy.plan import PrivatePlan
from fedslm.privacy.statement import Statement, _values, read_statement
from fedslm.protocol.messages import Reply, Request
from fedslm.records import AdapterState, Event

MakeConfig = Callable[..., Config]
OTHER = Ed25519PrivateKey.from_private_bytes(b"7" * 32)


@pytest.fixture(scope="module")
def request_of_a_run(config_in: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Request:
    """The first request of a private run."""
    return first_request(config_in(tmp_path_factory.mktemp("server") / "run", privacy=PRIVATE))


@pytest.fixture(scope="module")
def good(request_of_a_run: Request) -> list[Reply]:
    """A node's own replies to the first two rounds."""
    return [ask(replace(request_of_a_run, round=number), context_of(0)) for number in (1, 2)]


@pytest.fixture(scope="module")
def key(request_of_a_run: Request, good: list[Reply]) -> Ed25519PrivateKey:
    """The node's key: a node that lies signs what it says."""
    return signing_key(Path(request_of_a_run.setup.directory) / "nodes" / "client-00000")


def signed_again(reply: Reply, key: Ed25519PrivateKey, **values: Any) -> Reply:
    """The reply with another statement, properly signed by ``key``."""
    public = public_hex(key.public_key())
    statement = replace(read_statement(reply.statement), **{"public_key": public, **values})
    signature = signature_of(key, _values(statement))
    return replace(reply, statement=replace(statement, signature=signature).to_json())


def verdict(reply: Reply, request: Request) -> Reply | str:
    """What the server makes of a reply that comes as a message."""
    message = message_to(request, context_of(0))
    message.content = reply.to_records()
    return checked(message, request, 0)


def test_only_what_was_asked_for_is_taken(request_of_a_run: Request, good: list[Reply]) -> None:
    """A reply with a record of its own, such as a claim of 10^12 values, is no reply."""
    message = message_to(request_of_a_run, context_of(0))
    message.content = good[0].to_records()
    found = checked(message, request_of_a_run, 0)
    assert isinstance(found, Reply)
    assert found.delta is not None
    assert found.num_bytes == found.delta.num_bytes
    junk = Array("float32", (2**31 - 1,) * 500, "numpy.ndarray", b"")
    for record in (ArrayRecord({"junk": junk}), ConfigRecord({}), MetricRecord({})):
        message.content = RecordDict({**good[0].to_records(), "junk": record})
        assert "has an unknown 'junk'" in str(checked(message, request_of_a_run, 0))


def test_a_reply_is_no_larger_than_its_shapes(request_of_a_run: Request, good: list[Reply]) -> None:
    """The bytes of the tensors that were asked for, and little more, are read; a value more is not."""
    delta = good[0].delta
    assert delta is not None
    key = next(iter(delta))
    more = AdapterState({**delta.tensors, key: np.zeros((300, 300), np.float32)})
    found = verdict(replace(good[0], delta=more), request_of_a_run)
    assert isinstance(found, str)
    assert "bytes, more than" in found


def test_an_error_of_a_node_is_a_short_reason(request_of_a_run: Request) -> None:
    """Whatever Flower's error says, the report holds a line of it."""
    message = message_to(request_of_a_run, context_of(0))
    failed = Message(Error(code=2, reason="x" * 10**6), reply_to=message)
    assert len(str(checked(failed, request_of_a_run, 0))) <= 301


def test_an_honest_reply_is_used(request_of_a_run: Request, good: list[Reply]) -> None:
    """The base of the tests below: this node's own replies are taken, one after the other."""
    statements: dict[int, Statement] = {}
    for number, reply in enumerate(good, start=1):
        request = replace(request_of_a_run, round=number)
        believed = verdict(reply, request)
        assert isinstance(believed, Reply)
        assert believed.delta is not None
        assert continued(believed, statements, 0) is believed
    assert statements[0] == read_statement(good[1].statement)


FOREIGN = Event(0.2, 1.5, 2)
LIES: list[tuple[str, dict[str, Any], str]] = [
    ("run", {"run": "another run"}, "is for another release"),
    ("round", {"round": 2}, "is for another release"),
    ("unit", {"unit": "user"}, "is for another release"),
    ("release", {"release_sha256": "0" * 64}, "is for another release"),
    ("foreign", {"charged": ((FOREIGN, 1),)}, "charges that this plan does not make"),
    ("none", {"charged": ()}, "fewer or more charges than the plan allows"),
    ("word round", {"round": "1"}, "round, index and charges must be whole numbers"),
    ("half index", {"index": 1.5}, "round, index and charges must be whole numbers"),
    ("boolean round", {"round": True}, "round, index and charges must be whole numbers"),
    ("negative index", {"index": -1}, "round, index and charges must be whole numbers"),
    ("huge index", {"index": 10**30}, "round, index and charges must be whole numbers"),
]


@pytest.mark.parametrize(
    ("values", "reason"), [(v, r) for _, v, r in LIES], ids=[name for name, _, _ in LIES]
)
def test_a_statement_that_does_not_fit_is_not_used(
    request_of_a_run: Request,
    good: list[Reply],
    key: Ed25519PrivateKey,
    values: dict[str, Any],
    reason: str,
) -> None:
    """Well signed, but for another release, or with charges that this plan does not make."""
    found = verdict(signed_again(good[0], key, **values), request_of_a_run)
    assert isinstance(found, str)
    assert reason in found


@pytest.mark.parametrize("count", [4, 50])
def test_more_charges_than_the_budget_are_not_used(
    request_of_a_run: Request, good: list[Reply], key: Ed25519PrivateKey, count: int
) -> None:
    """Right events, but more of them than the budget pays for."""
    ((event, _),) = read_statement(good[0].statement).charged
    more = {"charged": ((event, count),), "charges": count, "index": 2 * count, "epsilon": 1e6}
    found = verdict(signed_again(good[0], key, **more), request_of_a_run)
    assert found == "the spend statement has fewer or more charges than the plan allows"


def test_fewer_steps_than_planned_are_not_used(
    request_of_a_run: Request, good: list[Reply], key: Ed25519PrivateKey
) -> None:
    """A charge for half of a round's steps is another charge."""
    (event,) = read_statement(good[0].statement).events
    cheaper = replace(event, steps=event.steps // 2)
    found = verdict(signed_again(good[0], key, charged=((cheaper, 1),)), request_of_a_run)
    assert found == "the spend statement has charges that this plan does not make"


@pytest.mark.parametrize(
    "field", ["run", "round", "unit", "release_sha256", "ledger_id", "index", "head_sha256", "charged"]
)
def test_a_changed_statement_is_not_used(
    request_of_a_run: Request, good: list[Reply], field: str
) -> None:
    """Whatever is changed after it was signed, the signature shows it."""
    values = json.loads(good[0].statement)
    match values[field]:
        case int(number):
            values[field] = number + 1
        case list(charged):
            values[field] = [[*charged[0][:3], charged[0][3] + 1]]
            values["charges"] += 1
        case "record":
            values[field] = "patient"
        case text:
            values[field] = text[::-1]
    found = verdict(replace(good[0], statement=json.dumps(values)), request_of_a_run)
    assert found == "the spend statement cannot be used: the signature does not match"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "{}",
        "[]",
        "null",
        "7",
        '{"charged": 5}',
        '{"charged": [5]}',
        '{"charged": [[2, 1, 1, 1]]}',
        "[" * 100_000,
        '{"a":' * 100_000,
    ],
    ids=[
        "empty",
        "cut",
        "no values",
        "list",
        "null",
        "number",
        "event",
        "events",
        "rate",
        "deep",
        "dig",
    ],
)
def test_a_statement_that_is_none_is_not_used(
    request_of_a_run: Request, good: list[Reply], text: str
) -> None:
    """Whatever stands in its place, the server gives a reason and goes on."""
    assert isinstance(verdict(replace(good[0], statement=text), request_of_a_run), str)


@pytest.mark.parametrize("values", [{"delta": 1e-4}, {"epsilon": 0.0}], ids=str)
def test_a_lifetime_that_is_less_than_the_run_is_not_used(
    request_of_a_run: Request, good: list[Reply], key: Ed25519PrivateKey, values: dict[str, Any]
) -> None:
    """What a node has spent in all is stated at the run's delta, and is no less than in this run."""
    found = verdict(signed_again(good[0], key, **values), request_of_a_run)
    assert found == "the spend statement has another delta, or less epsilon in all than in this run"


@pytest.mark.parametrize("public_key", ["", "zz", "00", 7, None, "0" * 63])
def test_a_key_that_is_none_is_not_used(
    request_of_a_run: Request, good: list[Reply], key: Ed25519PrivateKey, public_key: Any
) -> None:
    """A statement names the key that signed it, or it is none."""
    found = verdict(signed_again(good[0], key, public_key=public_key), request_of_a_run)
    assert isinstance(found, str)
    assert "the spend statement cannot be used" in found


def test_a_metric_that_was_not_asked_is_not_used(request_of_a_run: Request, good: list[Reply]) -> None:
    """A plan without a metric has no reply with one."""
    found = verdict(replace(good[0], metric=(20.0, 30.0)), request_of_a_run)
    assert found == "the reply has another metric than the plan"


def test_a_metric_that_is_missing_is_not_used(request_of_a_run: Request, good: list[Reply]) -> None:
    """A plan with a metric has no reply without one."""
    plan = request_of_a_run.setup.plan
    assert isinstance(plan, PrivatePlan)
    plan = replace(plan, metric_noise_multiplier=10.0)
    assert plan.round_events[1] == Event(1.0, 10.0, 1)
    request = replace(request_of_a_run, setup=replace(request_of_a_run.setup, plan=plan))
    assert checked(answer(good[0], request_of_a_run), request, 0) == (
        "the reply has another metric than the plan"
    )


def answer(reply: Reply, request: Request) -> Message:
    """A reply as a message."""
    message = message_to(request, context_of(0))
    message.content = reply.to_records()
    return message


ROLLED_BACK: list[tuple[str, dict[str, Any]]] = [
    ("lower index", {"index": 2}),
    ("same index, other head", {"index": 2, "head_sha256": "1" * 64}),
    ("other ledger", {"ledger_id": "0" * 32}),
    ("forgotten charge", {"charged": ()}),
    ("other charges", {"charged": ((FOREIGN, 2),)}),
    ("fewer in all", {"charges": 0, "charged": ()}),
]


@pytest.mark.parametrize("values", [v for _, v in ROLLED_BACK], ids=[name for name, _ in ROLLED_BACK])
def test_a_ledger_that_was_rolled_back_is_not_used(
    good: list[Reply], key: Ed25519PrivateKey, values: dict[str, Any]
) -> None:
    """A statement must continue the one before: longer, from the same ledger, with the same charges."""
    first, second = good
    statements = {0: read_statement(first.statement)}
    found = continued(signed_again(second, key, **values), statements, 0)
    assert isinstance(found, str)
    assert "it was rolled back" in found
    assert statements == {0: read_statement(first.statement)}


def test_another_key_does_not_continue_a_ledger(good: list[Reply]) -> None:
    """A node cannot start over with a new key in mid-run; as another client's it is welcome."""
    first, second = good
    statements = {0: read_statement(first.statement)}
    assert isinstance(continued(signed_again(second, OTHER), statements, 0), str)
    assert isinstance(continued(signed_again(second, OTHER), statements, 1), Reply)


def test_a_new_round_needs_a_new_charge(good: list[Reply], key: Ed25519PrivateKey) -> None:
    """A release of the next round with the charges of the last one was not paid for."""
    first, second = good
    statements = {0: read_statement(first.statement)}
    unpaid = signed_again(second, key, charged=read_statement(first.statement).charged)
    assert isinstance(continued(unpaid, statements, 0), str)


def test_a_lying_node_is_counted_and_left_out(make_config: MakeConfig) -> None:
    """In a run: its round counts as failed with the reason, and the others' run completes."""

    def lie(message: Message) -> Message:
        reply = Reply.from_records(message.content)
        lying = signed_again(reply, OTHER) if reply.round == 2 else reply
        message.content = lying.to_records()
        return message

    config = make_config(privacy=PRIVATE)
    report = run_with(config, {1: lie})
    lines = records_of(config)
    assert [(line["completed"], line["failed"]) for line in lines] == [(3, 0), (2, 1), (3, 0)]
    assert lines[1]["reasons"] == [
        "site-1: the spend statement does not extend this client's ledger: it was rolled back"
    ]
    assert lines[1]["left_out"] == [1]
    assert report["stopped"] == ""
