"""Tests of charges for shared noise: the assumption is on every line, and no older reader overlooks it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from support.ledgers import AMPLE, DELTA, EVENT, KEY, charge, lines_of

from fedslm.errors import LedgerError, PrivacyError
from fedslm.privacy import accounting
from fedslm.privacy.keys import signature_of
from fedslm.privacy.ledger import Ledger
from fedslm.privacy.statement import Statement, read_statement
from fedslm.records import Event

SHARED = Event(1.0, 8.0, 1, honest_nodes=4)
OLD_EVENT = dataclasses.make_dataclass("Event", ["sample_rate", "noise_multiplier", "steps"])


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """A ledger with a charge of each kind: one in a run of its own, one shared."""
    ledger = Ledger(tmp_path / "ledger.jsonl", KEY)
    ledger.reserve([charge(EVENT, run="own")], AMPLE)
    ledger.reserve([charge(SHARED, protocol="ideal")], AMPLE)
    return ledger


def stated(ledger: Ledger, run: str = "run") -> Statement:
    """The statement of a run."""
    return ledger.statement(run, 1, "release")


def test_a_ledger_keeps_the_assumption(ledger: Ledger) -> None:
    """Number of honest nodes and protocol come back, and epsilon counts all charges by whole orders."""
    found = ledger.read()
    assert [each.event for each in found.charges] == [EVENT, SHARED]
    assert [each.protocol for each in found.charges] == [None, "ideal"]
    assert found.epsilon(DELTA) == accounting.epsilon([EVENT, SHARED], DELTA)
    assert found.epsilon_if_all_collude(DELTA) == accounting.epsilon_if_all_collude(
        [EVENT, SHARED], DELTA
    )
    assert found.epsilon_if_all_collude(DELTA) > found.epsilon(DELTA)


def test_an_older_reader_refuses_a_shared_charge_and_no_other(ledger: Ledger) -> None:
    """Its event has three values: it reads a charge with all of the noise, and fails on a shared one."""
    charges = [json.loads(line).get("charge") for line in lines_of(ledger.path)]
    own, shared = (each for each in charges if each is not None)
    OLD_EVENT(**own["event"])
    assert "protocol" not in own
    with pytest.raises(TypeError):
        OLD_EVENT(**shared["event"])
    for values, fits in ((stated(ledger, "own"), True), (stated(ledger), False)):
        (*event, _), *_ = json.loads(values.to_json())["charged"]
        assert (len(event) == 3) is fits


def test_a_statement_gives_both_numbers(ledger: Ledger) -> None:
    """Also for a run that shared nothing: its epsilon is that of the whole ledger."""
    for run, charged in (("run", SHARED), ("own", EVENT)):
        found = read_statement(stated(ledger, run).to_json())
        assert found.charged == ((charged, 1),)
        assert found.honest_nodes == 4
        assert found.epsilon == accounting.epsilon([EVENT, SHARED], DELTA)
        assert found.epsilon_if_all_collude == accounting.epsilon_if_all_collude([EVENT, SHARED], DELTA)


def test_a_statement_without_shared_noise_is_as_before(tmp_path: Path) -> None:
    """It names no assumption at all."""
    ledger = Ledger(tmp_path / "ledger.jsonl", KEY)
    ledger.reserve([charge()], AMPLE)
    assert not {"honest_nodes", "epsilon_if_all_collude"} & set(json.loads(stated(ledger).to_json()))


@pytest.mark.parametrize(
    "change",
    [
        {"honest_nodes": 3},
        {"honest_nodes": True},
        {"honest_nodes": 2**21},
        {"epsilon_if_all_collude": 0.0},
        {"epsilon_if_all_collude": "none"},
        {"honest_nodes": None, "epsilon_if_all_collude": None},
        {"epsilon_if_all_collude": None},
    ],
)
def test_a_statement_cannot_understate_the_assumption(ledger: Ledger, change: dict[str, Any]) -> None:
    """Fewer honest nodes than a charge assumes, other types and half of the figures are refused, though signed."""
    values = json.loads(stated(ledger).to_json())
    del values["signature"]
    values = {k: v for k, v in {**values, **change}.items() if v is not None}
    values["signature"] = signature_of(KEY, values)
    with pytest.raises(PrivacyError):
        read_statement(json.dumps(values))


@pytest.mark.parametrize(
    ("event", "protocol"), [(SHARED, None), (SHARED, "plain"), (SHARED, ""), (EVENT, "ideal")]
)
def test_noise_is_shared_by_a_known_protocol_or_not_at_all(event: Event, protocol: str | None) -> None:
    """A charge with one of the two, or of an unknown protocol, is refused before it is written."""
    with pytest.raises(PrivacyError, match="protocol"):
        charge(event, protocol=protocol)


@pytest.mark.parametrize("nodes", [0, -1, 1.5, True, "4"])
def test_an_event_of_no_nodes_is_refused(nodes: object) -> None:
    """Honest nodes are counted from 1."""
    with pytest.raises(PrivacyError):
        Event(1.0, 8.0, 1, honest_nodes=nodes)  # type: ignore[arg-type]


def test_removing_the_assumption_breaks_the_signature(ledger: Ledger) -> None:
    """A shared charge cannot be turned into one of a node that added all of the noise."""
    content = ledger.path.read_bytes()
    assert content.count(b', "honest_nodes": 4') == 1
    ledger.path.write_bytes(content.replace(b', "honest_nodes": 4', b""))
    with pytest.raises(LedgerError):
        ledger.read()
