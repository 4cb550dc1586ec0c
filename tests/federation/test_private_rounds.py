"""Whole private runs: what is charged, what a crash costs, patients, and the noisy metric."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import Message
from flwr.common.serde import recorddict_to_proto
from support.served import StopAfter, StopDuring, chain_of, records_of, run_with
from support.tiny import PATIENT, PRIVATE

from fedslm import simulation
from fedslm.config import Config
from fedslm.errors import DataError
from fedslm.privacy import accounting
from fedslm.privacy.chain import check_head
from fedslm.privacy.keys import signing_key
from fedslm.privacy.ledger import Ledger
from fedslm.privacy.limits import Limits
from fedslm.privacy.lines import ADAPTER, METRIC
from fedslm.privacy.statement import read_statement
from fedslm.protocol.messages import Reply

MakeConfig = Callable[..., Config]


def nodes_of(config: Config) -> list[Path]:
    """The directories of a run's nodes."""
    return sorted(Path(str(config.run.directory)).glob("nodes/client-*"))


def charged_rounds(node: Path) -> list[int]:
    """The round of each charge for an adapter."""
    return [charge.round for charge in chain_of(node).charges if charge.purpose == ADAPTER]


def test_private_run_spends_exactly_its_plan(make_config: MakeConfig) -> None:
    """Every client's ledger holds all rounds; epsilon recomputed from it is the report's, within budget."""
    config = make_config(privacy=PRIVATE)
    report = simulation.simulate(config)
    assert report["epsilon"] <= 8.0
    assert report["plan"]["unit"] == "record"
    nodes = nodes_of(config)
    assert len(nodes) == 3
    for node in nodes:
        chain = chain_of(node)
        assert sum(event.steps for event in chain.events) == 6
        assert accounting.epsilon(chain.events, 1e-5) == pytest.approx(report["epsilon"])
        kinds = ["o" if e.opening else "r" if e.charge else "c" for e in chain.entries]
        assert kinds == ["o", *"rcrcrc"]
    assert "ε" in (Path(report["directory"]) / "adapter" / "README.md").read_text()
    assert all(line["epsilon"] <= report["epsilon"] + 1e-9 for line in records_of(config))
    assert records_of(config)[-1]["epsilon"] == pytest.approx(report["epsilon"])


def test_the_server_keeps_a_signed_head_of_every_release(make_config: MakeConfig) -> None:
    """Each round's statement of each client is on the server's disk, and its head is in the ledger."""
    config = make_config(privacy=PRIVATE)
    simulation.simulate(config)
    directory = Path(str(config.run.directory))
    lines = [json.loads(line) for line in (directory / "statements.jsonl").read_text().splitlines()]
    assert [(line["client"], read_statement(line["statement"]).round) for line in lines] == [
        (client, number) for number in (1, 2, 3) for client in range(3)
    ]
    for line in lines:
        statement, path = read_statement(line["statement"]), nodes_of(config)[line["client"]]
        chain = chain_of(path)
        check_head(path / "ledger.jsonl", chain, statement.index, statement.head_sha256)
        commit = chain.entries[statement.index]
        assert commit.release_sha256 == statement.release_sha256


def test_interrupted_private_run_never_forgets_and_resends_for_free(make_config: MakeConfig) -> None:
    """A client that had released in the interrupted round sends the same bytes and pays nothing."""
    config = make_config(privacy=PRIVATE)
    path = Path(str(config.run.directory))
    with pytest.raises(KeyboardInterrupt):
        simulation.simulate(config, [StopDuring(2)])
    first = path / "nodes" / "client-00000"
    before = chain_of(first).entries
    released = before[-1].release_sha256
    assert charged_rounds(first) == [1, 2]
    report = simulation.resume(path)
    assert report["stopped"] == ""
    assert chain_of(first).entries[: len(before)] == before
    assert charged_rounds(first) == [1, 2, 3]
    lines = [json.loads(line) for line in (path / "statements.jsonl").read_text().splitlines()]
    sent = [read_statement(line["statement"]) for line in lines if line["client"] == 0]
    assert sent[1].release_sha256 == released
    assert report["epsilon"] <= 8.0


def crashed(config: Config, client: int) -> None:
    """Charges a round that was never released, as a crash between charge and release does."""
    node = Path(str(config.run.directory)) / "nodes" / f"client-{client:05d}"
    ledger = Ledger(node / "ledger.jsonl", signing_key(node), unit="record", dataset=node.name)
    *_, last = ledger.read().charges
    ledger.reserve([last], Limits((100.0, 1e-5)))


def test_client_stops_before_its_budget(make_config: MakeConfig) -> None:
    """A client whose budget was spent by an interrupted reserve refuses; the run goes on without it."""
    config = make_config(privacy=PRIVATE)
    path = Path(str(config.run.directory))
    with pytest.raises(KeyboardInterrupt):
        simulation.simulate(config, [StopAfter(1)])
    crashed(config, 1)
    report = simulation.resume(path)
    lines = records_of(config)
    assert [line["refused"] for line in lines] == [0, 0, 1]
    assert "budget exhausted" in lines[2]["reasons"][0]
    assert report["privacy"]["site-1"]["epsilon"] <= 8.0


def test_spare_rounds_pay_for_crashes(make_config: MakeConfig) -> None:
    """With a spare round the same crash costs nothing but epsilon, which stays within the budget."""
    config = make_config(privacy={**PRIVATE, "spare_rounds": 1})
    path = Path(str(config.run.directory))
    with pytest.raises(KeyboardInterrupt):
        simulation.simulate(config, [StopAfter(1)])
    crashed(config, 1)
    report = simulation.resume(path)
    assert [line["refused"] for line in records_of(config)] == [0, 0, 0]
    assert report["privacy"]["site-0"]["epsilon"] < report["privacy"]["site-1"]["epsilon"] <= 8.0
    assert report["epsilon"] == report["privacy"]["site-1"]["epsilon"]


def test_private_replies_depend_on_no_record_count(make_config: MakeConfig) -> None:
    """Under privacy a reply holds the same fields, weight 1, public events and as many bytes for every client."""
    seen: dict[int, Reply] = {}
    sizes = set()

    def look(message: Message) -> Message:
        sizes.add(recorddict_to_proto(message.content).ByteSize())
        reply = Reply.from_records(message.content)
        seen[message.metadata.src_node_id] = reply
        return message

    run_with(make_config(privacy=PRIVATE, federation={"rounds": 1}), dict.fromkeys(range(3), look))
    assert len(sizes) == 1
    kept = ("status", "round", "reason", "base_sha256", "weight", "metric")
    assert len({tuple(getattr(reply, name) for name in kept) for reply in seen.values()}) == 1
    statements = [read_statement(reply.statement) for reply in seen.values()]
    assert len({(each.run, each.unit, each.events, each.index) for each in statements}) == 1
    assert len({each.public_key for each in statements}) == 3


def test_patients_are_trained_and_charged_as_patients(make_config: MakeConfig) -> None:
    """unit="user" end to end: plan, every ledger, every statement and the report say so."""
    config = make_config(privacy=PATIENT)
    report = simulation.simulate(config)
    assert (report["plan"]["unit"], report["plan"]["unit_column"]) == ("user", "patient")
    assert report["plan"]["max_records_per_unit"] == 3
    assert 0 < report["epsilon"] <= 8.0
    assert report["epsilon"] == max(spent["epsilon"] for spent in report["privacy"].values())
    assert report["failures"] == []
    for node in nodes_of(config):
        chain = chain_of(node)
        assert chain.opening is not None
        assert chain.opening.unit == "user"
        assert accounting.epsilon(chain.events, 1e-5) == pytest.approx(report["epsilon"])


def test_the_same_noise_for_patients_costs_what_it_costs_for_records(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """A patient plan is calibrated as a record plan is: the unit is stronger, the mechanism the same."""
    reports = [
        simulation.simulate(
            make_config(
                privacy=privacy, run={"directory": str(tmp_path / path)}, federation={"rounds": 1}
            )
        )
        for privacy, path in ((PRIVATE, "a"), (PATIENT, "b"))
    ]
    assert reports[0]["plan"]["noise_multiplier"] == reports[1]["plan"]["noise_multiplier"]


def test_patients_of_several_clients_compose(make_config: MakeConfig) -> None:
    """overlapping=true: the network's epsilon is that of all clients together, above each of theirs."""
    privacy = {**PATIENT, "unit_column": "traveller", "overlapping": True}
    config = make_config(privacy=privacy)
    report = simulation.simulate(config)
    each = [spent["epsilon"] for spent in report["privacy"].values()]
    events = [event for node in nodes_of(config) for event in chain_of(node).events]
    assert report["overlapping"] is True
    assert max(each) <= 8.0 < report["epsilon"]
    assert report["epsilon"] == pytest.approx(accounting.epsilon(events, 1e-5))
    assert records_of(config)[-1]["epsilon"] == pytest.approx(report["epsilon"])


def test_patients_of_several_clients_are_refused_unless_announced(make_config: MakeConfig) -> None:
    """The same data without overlapping=true does not run, and leaves no directory behind."""
    config = make_config(privacy={**PATIENT, "unit_column": "traveller"})
    with pytest.raises(DataError, match=r"set privacy\.overlapping=true"):
        simulation.simulate(config)
    assert not Path(str(config.run.directory)).exists()


@pytest.mark.parametrize("privacy", [PRIVATE, PATIENT], ids=["record", "patient"])
def test_a_metric_leaves_with_noise_and_is_paid(
    make_config: MakeConfig, privacy: dict[str, object]
) -> None:
    """One noisy metric each round, charged as an event of its own, all within the one budget."""
    config = make_config(privacy={**privacy, "metric_noise_multiplier": 4.0})
    report = simulation.simulate(config)
    found = [line["private_metric"] for line in records_of(config)]
    assert len(found) == 3
    told = [each for each in found if each is not None]  # noise may leave less than one unit
    assert told == report["private_metrics"]
    assert told
    assert 0 < report["epsilon"] <= 8.0
    for node in nodes_of(config):
        charges = chain_of(node).charges
        assert [charge.purpose for charge in charges] == [ADAPTER, METRIC] * 3
        paid = {(c.event.sample_rate, c.event.noise_multiplier) for c in charges if c.purpose == METRIC}
        assert paid == {(1.0, 4.0)}
        alone = accounting.epsilon([c.event for c in charges if c.purpose == ADAPTER], 1e-5)
        assert alone < report["epsilon"]
