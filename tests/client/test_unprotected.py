"""A round without privacy at a node whose policy allows it: it leaves a trace that nothing takes away."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from support.served import (
    ask,
    chain_of,
    context_of,
    first_request,
    message_to,
    records_of,
    run_with,
    write_policy,
)
from support.tiny import PRIVATE

from fedslm import layout
from fedslm.audit.ledgers import Evidence, as_json, audit_ledger
from fedslm.client.node import FAILED
from fedslm.client.personal import measure
from fedslm.config import Config
from fedslm.federation.replies import checked
from fedslm.privacy.keys import PUBLIC_KEY, read_public_key, signing_key
from fedslm.privacy.ledger import Ledger
from fedslm.privacy.limits import Limits
from fedslm.privacy.lines import ADAPTER, METRIC, Unprotected
from fedslm.privacy.statement import read_statement
from fedslm.protocol.messages import MEASURE, Reply, Request

MakeConfig = Callable[..., Config]


@pytest.fixture(scope="module")
def plain(config_in: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Request:
    """A server's first request for a run without privacy."""
    return first_request(config_in(tmp_path_factory.mktemp("plain") / "run"))


@pytest.fixture(scope="module")
def private(config_in: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Request:
    """And one for a private run, on the same records."""
    return first_request(config_in(tmp_path_factory.mktemp("private") / "run", privacy=PRIVATE))


def open_node(directory: Path, **values: Any) -> Path:
    """A node whose policy lets a server train without privacy."""
    return write_policy(directory, unit="none", **values)


def no_constant(name: str) -> float:
    """JSON has no such number."""
    raise AssertionError(name)


def test_a_round_without_privacy_is_in_the_ledger_before_it_leaves(
    plain: Request, tmp_path: Path
) -> None:
    """Run, round and hash of exactly what was sent; audit, statement and every JSON say infinite."""
    node = open_node(tmp_path / "node")
    reply = ask(plain, context_of(0, node))
    assert reply.status == "ok"
    chain = chain_of(node)
    (found,) = chain.unprotected
    assert (found.run, found.round, found.purpose) == (plain.setup.run_id, 1, ADAPTER)
    assert found.release_sha256 == reply.delta_sha256
    assert chain.epsilon(1e-5) == math.inf
    statement = read_statement(reply.statement)
    assert (statement.epsilon, statement.unprotected, statement.charged) == (math.inf, 1, ())
    assert json.loads(reply.statement, parse_constant=no_constant)["epsilon"] == "infinite"
    audit = audit_ledger(node, read_public_key(node / PUBLIC_KEY), Evidence(statements=(statement,)))
    assert audit.unprotected == 1
    (finding,) = audit.findings
    assert "1 release without privacy, the first in round 1" in finding
    json.loads(json.dumps(as_json(audit)), parse_constant=no_constant)


def test_the_server_takes_the_reply_and_its_statement(plain: Request, tmp_path: Path) -> None:
    """The trace is no fault of the reply; one that claims charges, or no such release, is refused."""
    node = open_node(tmp_path / "node")
    message = message_to(plain, context_of(0, node))
    assert isinstance(checked(message, plain, 0), Reply)
    reply = Reply.from_records(message.content)
    message.content = replace(reply, statement="").to_records()
    assert isinstance(checked(message, plain, 0), Reply)  # a simulated client keeps no ledger
    message.content = replace(reply, statement=reply.statement.replace("infinite", "2.5")).to_records()
    assert "epsilon='2.5' must be a finite number" in str(checked(message, plain, 0))
    assert "another release" in str(
        checked(message_to(plain, context_of(0, node)), replace(plain, round=2), 0)
    )


def test_private_and_unprotected_rounds_in_one_ledger(
    plain: Request, private: Request, tmp_path: Path
) -> None:
    """Private runs before it are what they were; after it all statements are infinite, and a policy with a unit refuses."""
    node = open_node(tmp_path / "node")
    context = context_of(0, node)
    assert read_statement(ask(private, context).statement).epsilon <= 8.0
    assert ask(plain, context).status == "ok"
    second = replace(private, round=2)
    reply = ask(second, context)
    assert isinstance(checked(message_to(second, context), second, 0), Reply)
    statement = read_statement(reply.statement)
    assert (statement.epsilon, statement.unit, statement.num_charged) == (math.inf, "record", 2)
    audit = audit_ledger(node, read_public_key(node / PUBLIC_KEY), Evidence(budget=(8.0, 1e-5)))
    (spent,) = audit.spent
    assert spent.epsilon == math.inf
    assert spent.remaining_releases == 0
    assert any("is exceeded: ε = inf" in each for each in audit.findings)
    write_policy(node, unit="record")
    refused = ask(replace(private, round=3), context)
    assert refused.status == "refused"
    assert "without privacy left this node" in refused.reason
    assert "epsilon of the node's lifetime is infinite" in refused.reason
    assert plain.setup.run_id not in refused.reason  # it may be another federation's
    assert len(chain_of(node).charges) == 2


def test_the_same_request_again_is_one_line(plain: Request, tmp_path: Path) -> None:
    """A request that is answered again adds no line; another round does, and the statements follow each other."""
    node = open_node(tmp_path / "node")
    context = context_of(0, node)
    first, again = (read_statement(ask(plain, context).statement) for _ in range(2))
    assert len(chain_of(node).entries) == 2
    later = read_statement(ask(replace(plain, round=2), context).statement)
    assert len(chain_of(node).unprotected) == 2
    assert again.follows(first)
    assert later.follows(again)
    assert not first.follows(later)
    assert not replace(again, round=3).follows(first)


def test_limits_on_rounds_hold_without_privacy(plain: Request, tmp_path: Path) -> None:
    """Rounds a day and ever are the policy's, whatever the plan; what was refused did not leave."""
    node = open_node(tmp_path / "node", max_rounds_per_day=1)
    context = context_of(0, node)
    assert ask(plain, context).status == "ok"
    reply = ask(replace(plain, round=2), context)
    assert (reply.status, reply.delta) == ("refused", None)
    assert "1 rounds within 24 hours" in reply.reason
    assert len(chain_of(node).unprotected) == 1


def test_a_ledger_that_cannot_be_written_lets_nothing_leave(plain: Request, tmp_path: Path) -> None:
    """Without the line on disk there is no reply with tensors."""
    node = open_node(tmp_path / "node")
    context = context_of(0, node)
    assert ask(plain, context).status == "ok"
    (node / "ledger.jsonl.head").unlink()
    reply = ask(replace(plain, round=2), context)
    assert (reply.status, reply.delta, reply.statement) == ("failed", None, "")


def test_metrics_without_noise_are_recorded_too(plain: Request, tmp_path: Path) -> None:
    """What a node measures without privacy leaves only after the ledger has its hash."""
    node = open_node(tmp_path / "node")
    context = context_of(0, node)
    context.node_config["data-directory"] = str(Path(plain.setup.directory) / "data")
    message = Message(plain.to_records(), context.node_id, MEASURE)
    message.metadata.__dict__["_message_id"] = "1"
    answer = measure(message, context).content.config_records["measured"]
    assert answer["status"] == "ok"
    assert json.loads(str(answer["metrics"]))
    (found,) = chain_of(node).unprotected
    assert found.purpose == METRIC


def of_no_class(request: Request) -> Request:
    """A request that no record of the node is usable for: whether one is, is a fact about the records."""
    return replace(request, setup=replace(request.setup, labels=("neither", "nor")))


def test_a_failure_is_recorded_as_well(plain: Request, tmp_path: Path) -> None:
    """Whether training without privacy fails may hang on one record: that it did is a release, once for a round."""
    node = open_node(tmp_path / "node")
    context = context_of(0, node)
    for _ in range(2):
        assert ask(of_no_class(plain), context).status == "failed"
    (found,) = chain_of(node).unprotected
    assert (found.run, found.round, found.purpose) == (plain.setup.run_id, 1, ADAPTER)
    assert chain_of(node).epsilon(1e-5) == math.inf


def test_a_failed_measurement_is_recorded_as_well(plain: Request, tmp_path: Path) -> None:
    """Nor does a server learn without a trace whether a node could measure and personalise."""
    node = open_node(tmp_path / "node")
    context = context_of(0, node)
    context.node_config["data-directory"] = str(Path(plain.setup.directory) / "data")
    own = plain.setup.personalization.model_copy(update={"method": "fine-tune"})
    request = of_no_class(replace(plain, setup=replace(plain.setup, personalization=own)))
    message = Message(request.to_records(), context.node_id, MEASURE)
    message.metadata.__dict__["_message_id"] = "1"
    answer = measure(message, context).content.config_records["measured"]
    assert (answer["status"], answer["metrics"]) == (FAILED, "")
    assert [each.purpose for each in chain_of(node).unprotected] == [METRIC]


def test_a_round_too_many_is_refused_whatever_the_records_are(
    plain: Request, private: Request, tmp_path: Path
) -> None:
    """A server that has no round left learns nothing by asking: refusal and failure do not differ, and leave no line."""
    node = open_node(tmp_path / "node", max_rounds_per_day=1)
    context = context_of(0, node)
    assert ask(private, context).status == "ok"
    found = [ask(each, context) for each in (plain, of_no_class(plain))]
    assert {(each.status, each.reason) for each in found} == {
        ("refused", "1 rounds within 24 hours are the most here")
    }
    assert not chain_of(node).unprotected


def test_a_simulation_without_privacy_keeps_no_ledger(make_config: MakeConfig) -> None:
    """It promises nothing, and its nodes are of one run: nothing is written, and replies state nothing."""
    config = make_config(federation={"rounds": 1})
    seen: list[Reply] = []

    def look(message: Message) -> Message:
        seen.append(Reply.from_records(message.content))
        return message

    report = run_with(config, dict.fromkeys(range(3), look))
    assert [each.statement for each in seen] == [""] * 3
    assert report["epsilon"] == "infinite"
    assert not list(Path(str(config.run.directory)).glob("nodes/*/ledger*"))
    assert records_of(config)[0]["completed"] == 3
    assert records_of(config)[0]["epsilon"] == "infinite"


def test_a_simulated_node_that_has_a_ledger_records_it(plain: Request) -> None:
    """A client whose directory holds a ledger is not spared because it is simulated."""
    node = Path(plain.setup.directory) / "nodes" / "client-00001"
    earlier = Unprotected("earlier", 1, ADAPTER, "release")
    Ledger(node / "ledger.jsonl", signing_key(node)).release_unprotected(earlier, Limits((8.0, 1e-5)))
    reply = ask(plain, context_of(1))
    assert [each.release_sha256 for each in chain_of(node).unprotected] == [
        "release",
        reply.delta_sha256,
    ]


def test_what_fails_before_the_records_is_no_release(plain: Request, tmp_path: Path) -> None:
    """A model that cannot be loaded, or frozen tensors that are missing: no line, and no records are kept."""
    setup = plain.setup
    lora = setup.lora.model_copy(update={"target_modules": ("nonsense",)})
    unsuitable = replace(plain, setup=replace(setup, lora=lora))
    lacking = replace(plain, setup=replace(setup, frozen_sha256="0" * 64))
    for name, request, status in (("a", unsuitable, "failed"), ("b", lacking, "needs-frozen")):
        node = write_policy(tmp_path / name, unit="none")
        assert ask(request, context_of(0, node)).status == status
        assert not (node / layout.LEDGER).exists()
        assert not list((node / layout.NODE_RUNS).glob("*/records"))
