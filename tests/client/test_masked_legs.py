"""What a node answers to a hostile server in the legs of secure aggregation; every refusal is free."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from support.served import ask, chain_of, context_of, first_request, with_plan, write_policy
from support.tiny import PRIVATE

from fedslm import layout
from fedslm.aggregation.summed import num_values
from fedslm.client.handlers import secagg
from fedslm.config import Config
from fedslm.engines.local import LocalGrid
from fedslm.federation.replies import expected_shapes
from fedslm.protocol.legs import MOST_BODY, SECAGG, Leg
from fedslm.protocol.messages import Reply, Request
from fedslm.secagg.cohort import Cohort
from fedslm.secagg.kept import INPUT, KEYS, LEGS, SHARES, UNMASK
from fedslm.secagg.membership import roster_at
from fedslm.secagg.server import Server
from fedslm.workers import InlinePool

MakeConfig = Callable[..., Config]
CLIENTS = (0, 1, 2)
ALLOWS = {"allow_distributed_noise": True, "least_honest_nodes": 2, "most_colluding_nodes": 1}


class Hostile:
    """A server that asks three nodes what it likes, with the legs of one honest round.

    Args:
        request: The first training request of a run.
        round: The round of the cohort that it names.
    """

    def __init__(self, request: Request, round: int = 1) -> None:
        self.request, self.nodes = request, Path(request.setup.directory) / layout.NODES
        roster = roster_at(self.nodes)
        size = num_values(expected_shapes(request, 0))
        run = request.setup.run_id
        self.server = Server(
            Cohort(run, round, 1, CLIENTS, 3, 1, size, roster.sha256, request.setup.plan_sha256), roster
        )

    def leg(self, name: str, body: bytes, client: int, request: Request | None = None) -> Reply:
        """One leg of one node."""
        LocalGrid(1, InlinePool())  # tells Flower who sends
        asked = replace(request or self.request, leg=Leg(name, body))
        context = context_of(client)
        message = Message(asked.to_records(), context.node_id, SECAGG)
        message.metadata.__dict__["_message_id"] = "1"
        return Reply.from_records(secagg(message, context).content)

    def opened(self) -> dict[int, bytes]:
        """The honest legs before training; gives what each node is asked to train with."""
        first = self.server.keys_request()
        for client in CLIENTS:
            self.server.add_keys(client, self.leg(KEYS, first, client).body)
        second = self.server.shares_request()
        for client in CLIENTS:
            self.server.add_shares(client, self.leg(SHARES, second, client).body)
        return self.server.input_requests()

    def charges(self, client: int) -> int:
        """Number of charges in a node's ledger."""
        node = self.nodes / layout.simulated(client)
        return len(chain_of(node).charges) if (node / layout.LEDGER).exists() else 0


@pytest.fixture
def request_(make_config: MakeConfig) -> Request:
    """The first request of a run of three clients, of which one may collude."""
    config = make_config(
        privacy={**PRIVATE, "noise": "distributed"},
        training={"local_steps": 1, "optimizer": "sgd", "learning_rate": 0.05, "batch_size": 6},
        secure_aggregation={"threshold": 3, "max_colluding": 1},
    )
    return first_request(config)


def with_shares(request: Request, **values: Any) -> Request:
    """The request with another way to share the noise."""
    plan = json.loads(request.setup.plan.to_json())
    return with_plan(request, shares={**plan["shares"], **values})


def test_an_honest_round_is_answered_and_a_repetition_is_free(request_: Request) -> None:
    """The same leg again gets the same masked part and costs nothing."""
    hostile = Hostile(request_)
    body = hostile.opened()[0]
    assert hostile.charges(0) == 0
    first, again = (ask(replace(request_, leg=Leg(INPUT, body)), context_of(0)) for _ in range(2))
    assert (first.status, again.status) == ("ok", "ok")
    assert first.words is not None
    assert again.words is not None
    assert first.words.tobytes() == again.words.tobytes()
    assert (first.body, hostile.charges(0)) == (again.body, 1)


def test_a_part_without_masks_is_not_given(request_: Request) -> None:
    """A training request without its leg is refused, also after the honest legs."""
    hostile = Hostile(request_)
    assert ask(request_, context_of(0)).status == "refused"
    hostile.opened()
    reply = ask(request_, context_of(0))
    assert (reply.status, reply.words, reply.delta) == ("refused", None, None)
    assert "masked part of a sum" in reply.reason
    assert hostile.charges(0) == 0


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"max_colluding": 0}, "must be at least 3"),
        ({"threshold": 4, "max_colluding": 0}, "must be at least 4"),
        ({"threshold": 4, "max_colluding": 2}, "must be at least 2"),
    ],
)
def test_noise_for_more_honest_nodes_than_the_cohort_has_is_refused(
    values: dict[str, int], reason: str, request_: Request
) -> None:
    """A plan of the training leg that differs from that of the legs before: each share would be too small."""
    hostile = Hostile(request_)
    body = hostile.opened()[0]
    weaker = with_shares(request_, **values)
    reply = ask(replace(weaker, leg=Leg(INPUT, body)), context_of(0))
    assert (reply.status, hostile.charges(0)) == ("refused", 0)
    assert reason in reply.reason


def test_a_cohort_of_another_round_is_refused(request_: Request) -> None:
    """The round that is charged is the round whose masks are used."""
    hostile = Hostile(request_, round=2)
    body = hostile.opened()[0]
    reply = ask(replace(request_, leg=Leg(INPUT, body)), context_of(0))
    assert (reply.status, hostile.charges(0)) == ("refused", 0)
    assert "the cohort is for round 2" in reply.reason


def test_a_restarted_node_only_repeats(request_: Request) -> None:
    """Its process has another session: the round goes on without it."""
    hostile = Hostile(request_)
    body = hostile.opened()[0]
    (hostile.nodes / layout.SESSION).write_text("0" * 32)
    reply = ask(replace(request_, leg=Leg(INPUT, body)), context_of(0))
    assert (reply.status, hostile.charges(0)) == ("refused", 0)
    assert "restarted" in reply.reason


def test_a_node_without_a_session_takes_no_part(request_: Request) -> None:
    """A process that cannot tell a restart, such as Flower's own SuperNode, is refused."""
    hostile = Hostile(request_)
    (hostile.nodes / layout.SESSION).unlink()
    reply = hostile.leg(KEYS, hostile.server.keys_request(), 0)
    assert reply.status == "refused"
    assert "fedslm node up" in reply.reason


@pytest.mark.parametrize("name", [INPUT, UNMASK, KEYS])
def test_a_leg_out_of_place_is_refused(name: str, request_: Request) -> None:
    """The training leg is not a query, and no leg comes before its turn or with another's body."""
    hostile = Hostile(request_)
    reply = hostile.leg(name, b"{}", 0)
    assert (reply.status, reply.body, hostile.charges(0)) == ("refused", b"", 0)


def test_a_policy_refuses_before_the_first_leg(request_: Request) -> None:
    """A node that does not allow shared noise gives no key."""
    hostile = Hostile(request_)
    local = with_plan(request_, shares=None)
    assert "shares no noise" in hostile.leg(KEYS, hostile.server.keys_request(), 0, local).reason
    ideal = with_shares(request_, protocol="ideal")
    assert "shares no noise" in hostile.leg(KEYS, hostile.server.keys_request(), 0, ideal).reason


def test_a_node_that_cannot_pay_takes_no_part(request_: Request) -> None:
    """It says so in the first leg: later, the others would have paid for a sum that is not formed."""
    hostile = Hostile(request_)
    write_policy(hostile.nodes / layout.simulated(0), unit="record", max_rounds=1, **ALLOWS)
    assert hostile.leg(KEYS, hostile.server.keys_request(), 0).status == "ok"
    body = hostile.opened()[0]
    assert ask(replace(request_, leg=Leg(INPUT, body)), context_of(0)).status == "ok"
    later = Hostile(replace(request_, round=2), round=2)
    reply = later.leg(KEYS, later.server.keys_request(), 0)
    assert reply.status == "refused"
    assert "at most 1 rounds" in reply.reason


@pytest.mark.parametrize(
    "changes",
    [
        {"leg": "other"},
        {"leg": 5},
        {"body": "text"},
        {"body": b"x" * (MOST_BODY + 1)},
        {"roster": b"bytes"},
        {"more": "values"},
    ],
)
def test_odd_values_are_refused_before_they_are_read(
    changes: dict[str, Any], request_: Request
) -> None:
    """Each of the leg's values has a type and a bound."""
    LocalGrid(1, InlinePool())
    records = replace(request_, leg=Leg(LEGS[0], b"{}")).to_records()
    for key, value in changes.items():
        records["request"][key] = value  # type: ignore[index]
    message = Message(records, context_of(0).node_id, SECAGG)
    message.metadata.__dict__["_message_id"] = "1"
    reply = Reply.from_records(secagg(message, context_of(0)).content)
    assert reply.status == "refused"
