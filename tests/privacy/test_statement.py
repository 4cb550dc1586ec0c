"""Tests of spend statements: nothing in one can be changed, and an older one shows."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ledgers import DELTA, EVENT, FILLED_LINES, KEY, OTHER, OTHER_KEY, filled, reserve

from fedslm.errors import LedgerError, PrivacyError
from fedslm.privacy.chain import Chain, check_head
from fedslm.privacy.keys import public_hex
from fedslm.privacy.ledger import Ledger
from fedslm.privacy.statement import Statement, read_statement, signed
from fedslm.records import Event

FIELDS = [field.name for field in dataclasses.fields(Statement)]
_EVENTS = st.builds(
    Event,
    st.floats(0.001, 1.0),
    st.floats(0.1, 100.0),
    st.integers(1, 1000),
)


def state(ledger: Ledger, **changes: Any) -> Statement:
    """What a ledger states of a run."""
    return ledger.statement(**{"run": "run", "round": 2, "release_sha256": "release", **changes})


@pytest.fixture(scope="module")
def stated(tmp_path_factory: pytest.TempPathFactory) -> Statement:
    """A statement of a filled ledger."""
    return state(filled(tmp_path_factory.mktemp("stated") / "ledger.jsonl"))


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """A filled ledger."""
    return filled(tmp_path / "ledger.jsonl")


def test_a_statement_says_what_the_ledger_holds(ledger: Ledger) -> None:
    """Run, round, unit, every charge of this run, the release and the ledger's head."""
    reserve(ledger, OTHER, run="another")
    found, chain = state(ledger, round=7), ledger.read()
    assert chain.opening is not None
    assert (found.run, found.round, found.unit, found.release_sha256) == ("run", 7, "record", "release")
    assert found.events == (EVENT, EVENT, OTHER, OTHER) == ledger.events("run")
    assert state(ledger, run="another").events == (OTHER,)
    assert state(ledger, run="unknown").events == ()
    assert (found.ledger_id, found.index) == (chain.opening.ledger_id, FILLED_LINES)
    assert (found.head_sha256, found.public_key) == (chain.head, public_hex(KEY.public_key()))
    check_head(ledger.path, chain, found.index, found.head_sha256)


def test_a_statement_reads_back_as_it_was(stated: Statement) -> None:
    """The server reads the very statement that the node made."""
    assert read_statement(stated.to_json()) == stated
    assert read_statement(json.dumps(json.loads(stated.to_json()), indent=2, sort_keys=True)) == stated


def test_an_empty_ledger_states_nothing(tmp_path: Path) -> None:
    """Without a charge there is nothing to sign."""
    with pytest.raises(LedgerError, match="nothing to state"):
        state(Ledger(tmp_path / "ledger.jsonl", KEY))
    with pytest.raises(LedgerError, match="nothing to state"):
        signed(KEY, Chain((), "", torn=False), run="run", round=1, release_sha256="r")


def other_value(name: str) -> st.SearchStrategy[Any]:
    """Something that may stand in a field."""
    if name == "events":
        return st.lists(_EVENTS, max_size=5).map(lambda each: [dataclasses.asdict(e) for e in each])
    if name in ("round", "index"):
        return st.integers(-5, 1000)
    if name in ("head_sha256", "public_key", "signature"):
        return st.binary(min_size=32, max_size=64).map(bytes.hex)
    return st.text(max_size=20)


@pytest.mark.parametrize("name", FIELDS)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_the_signature_is_over_every_field(stated: Statement, name: str, data: st.DataObject) -> None:
    """Whatever is put into any one field, the statement is refused unless it is what was there."""
    values = json.loads(stated.to_json())
    changed = {**values, name: data.draw(other_value(name))}
    if changed == values:
        assert read_statement(json.dumps(changed)) == stated
    else:
        with pytest.raises(PrivacyError, match=r"signature|cannot be used"):
            read_statement(json.dumps(changed))


@pytest.mark.parametrize("name", ["sample_rate", "noise_multiplier", "steps"])
@pytest.mark.parametrize("position", range(4))
def test_no_charge_can_be_made_cheaper(stated: Statement, position: int, name: str) -> None:
    """A rate, a noise or a number of steps that was changed in one charge breaks the signature."""
    values = json.loads(stated.to_json())
    values["events"][position][name] = {"sample_rate": 0.01, "noise_multiplier": 9.0, "steps": 1}[name]
    with pytest.raises(PrivacyError, match="signature does not match"):
        read_statement(json.dumps(values))


def test_no_charge_can_be_left_out(stated: Statement) -> None:
    """A charge that is dropped, doubled or moved breaks the signature."""
    values = json.loads(stated.to_json())
    events = values["events"]
    for changed in (events[1:], [*events, events[0]], [events[3], *events[1:3], events[0]], []):
        with pytest.raises(PrivacyError, match="signature does not match"):
            read_statement(json.dumps({**values, "events": changed}))


def test_another_key_signs_for_itself_alone(stated: Statement) -> None:
    """A foreign key's signature under this key's name, or this signature under a foreign name, fails."""
    values = json.loads(stated.to_json())
    del values["signature"]
    from fedslm.privacy.keys import signature_of

    foreign = {**values, "signature": signature_of(OTHER_KEY, values)}
    named = {**json.loads(stated.to_json()), "public_key": public_hex(OTHER_KEY.public_key())}
    for changed in (foreign, named):
        with pytest.raises(PrivacyError, match="signature does not match"):
            read_statement(json.dumps(changed))


@pytest.mark.parametrize("name", FIELDS)
def test_a_statement_with_something_missing_or_of_another_type_is_refused(
    stated: Statement, name: str
) -> None:
    """Every field is needed, and rubbish in it is a privacy error like any other."""
    values = json.loads(stated.to_json())
    for rubbish in (None, [], {}, 1.5, True, "x", "00", ["x"], [{}], [[1, 2, 3]]):
        if values[name] != rubbish:
            with pytest.raises(PrivacyError):
                read_statement(json.dumps({**values, name: rubbish}))
    del values[name]
    with pytest.raises(PrivacyError):
        read_statement(json.dumps(values))


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "5", "null", "[]", "{}", '"text"', '{"events": 5}', '{"events": []}'),
        "[" * 100_000,
    ],
    ids=lambda text: text[:20] or "empty",
)
def test_a_text_that_is_no_statement_is_refused(text: str) -> None:
    """What is no statement is a privacy error, whatever it is."""
    with pytest.raises(PrivacyError):
        read_statement(text)


def test_nothing_but_public_values_leaves(stated: Statement) -> None:
    """A statement holds constants, identifiers and hashes: neither a delta of data nor a file name."""
    values = json.loads(stated.to_json())
    assert set(values) == set(FIELDS)
    assert {key for event in values["events"] for key in event} == {
        "sample_rate",
        "noise_multiplier",
        "steps",
    }
    assert str(DELTA) not in stated.to_json()
    assert "jsonl" not in stated.to_json()


def test_a_statement_follows_one_of_a_shorter_ledger(ledger: Ledger) -> None:
    """As the ledger grows, each statement follows all before it, and none that comes later."""
    statements = [state(ledger)]
    for number in (3, 4):
        ledger.commit(reserve(ledger, round=number), "release")
        statements.append(state(ledger, round=number))
    for later, one in enumerate(statements):
        for earlier, other in enumerate(statements):
            assert one.follows(other) == (later >= earlier)


def test_a_repeated_release_follows_itself(ledger: Ledger) -> None:
    """The same head may be stated twice: an equal request was answered again."""
    assert state(ledger, release_sha256="again").follows(state(ledger))


def test_a_later_round_has_to_be_paid(ledger: Ledger) -> None:
    """A statement of a later round without a further charge does not follow."""
    first = state(ledger)
    assert not state(ledger, round=first.round + 1).follows(first)


@pytest.mark.parametrize(
    "changes",
    [
        {"index": 2},
        {"head_sha256": "f" * 64},
        {"events": (EVENT,)},
        {"events": (EVENT, OTHER, EVENT, OTHER)},
        {"events": ()},
        {"ledger_id": "0" * 32},
        {"unit": "patient"},
        {"run": "another"},
        {"public_key": public_hex(OTHER_KEY.public_key())},
    ],
    ids=str,
)
def test_a_rollback_or_another_ledger_does_not_follow(
    stated: Statement, changes: dict[str, Any]
) -> None:
    """A smaller index, another head at the same, fewer charges, another ledger, unit, run or key."""
    assert stated.follows(stated)
    assert not dataclasses.replace(stated, **changes).follows(stated)


def test_fewer_charges_in_a_longer_ledger_do_not_follow(stated: Statement) -> None:
    """A ledger that grew does not forget: charges that are gone show in spite of a larger index."""
    longer = dataclasses.replace(stated, index=stated.index + 5, head_sha256="f" * 64)
    assert longer.follows(stated)
    assert not dataclasses.replace(longer, events=stated.events[:-1]).follows(stated)
    assert not dataclasses.replace(longer, events=stated.events[1:]).follows(stated)
