"""Tests of spend statements: nothing in one can be changed, and an older one shows."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.ledgers import (
    AMPLE,
    DELTA,
    EVENT,
    FILLED,
    FILLED_LINES,
    KEY,
    OTHER,
    OTHER_KEY,
    charge,
    filled,
    reserve,
)

from fedslm.errors import LedgerError, PrivacyError
from fedslm.privacy import accounting
from fedslm.privacy.chain import Chain, check_head
from fedslm.privacy.keys import public_hex, signature_of
from fedslm.privacy.ledger import Ledger
from fedslm.privacy.lines import ADAPTER, METRIC, Unprotected
from fedslm.privacy.statement import Statement, read_statement, signed
from fedslm.records import Event

OMITTED = {"unprotected", "honest_nodes", "epsilon_if_all_collude"}  # where they say nothing
FIELDS = [each.name for each in dataclasses.fields(Statement) if each.name not in OMITTED]
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
    assert sorted(found.events, key=str) == sorted(ledger.events("run"), key=str)
    assert found.charged == ((OTHER, 2), (EVENT, 2))
    assert state(ledger, run="another").events == (OTHER,)
    assert (found.charges, found.num_charged) == (5, 4)
    assert found.epsilon == accounting.epsilon([*FILLED, OTHER], DELTA) == ledger.spent(DELTA).epsilon
    assert (found.delta, found.root_sha256) == (DELTA, chain.root())
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
    if name == "charged":
        return st.lists(_EVENTS, max_size=5).map(
            lambda each: [[*event.as_values().values(), 1] for event in each]
        )
    if name in ("epsilon", "delta"):
        return st.floats(0.0, 1.0)
    if name in ("round", "index", "charges"):
        return st.integers(-5, 1000)
    if name in ("head_sha256", "root_sha256", "public_key", "signature"):
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


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("position", range(2))
def test_no_charge_can_be_made_cheaper(stated: Statement, position: int, place: int) -> None:
    """A rate, a noise, a number of steps or a count that was changed breaks the signature."""
    values = json.loads(stated.to_json())
    values["charged"][position][place] = (0.01, 9.0, 1, 1)[place]
    with pytest.raises(PrivacyError, match="signature does not match"):
        read_statement(json.dumps(values))


def test_no_charge_can_be_left_out(stated: Statement) -> None:
    """A kind of charge that is dropped, replaced or moved breaks the signature."""
    values = json.loads(stated.to_json())
    first, second = values["charged"]
    for changed in ([first], [second, first], [first, [0.5, 1.0, 1, 1]], []):
        with pytest.raises(PrivacyError, match="signature does not match"):
            read_statement(json.dumps({**values, "charged": changed}))


@pytest.mark.parametrize(
    "charged",
    [
        [[0.05, 3.0, 10, 100_001]],
        [[0.05, 3.0, 10, 1], [0.05, 3.0, 10, 1]],
        [[0.05, 3.0, 10, 0]],
        [[0.05, 3.0, 10, True]],
        [[0.05, 3.0, 10]],
        [[0.05, 3.0, 10, 1, 1]],
        [[0.05 + n / 100, 3.0, 10, 1] for n in range(33)],
    ],
    ids=lambda each: str(each)[:30],
)
def test_charges_are_bounded(stated: Statement, charged: list[Any]) -> None:
    """At most 32 different kinds and 100,000 charges, each kind once, whoever signed for more."""
    values = {**json.loads(stated.to_json()), "charged": charged}
    del values["signature"]
    signed_for = {**values, "signature": signature_of(KEY, values)}
    with pytest.raises(PrivacyError, match="cannot be used"):
        read_statement(json.dumps(signed_for))


def test_a_statement_stays_small(tmp_path: Path) -> None:
    """After thirty rounds with a metric it has 2 kB at most, and only more digits than after the first."""
    ledger, sizes = Ledger(tmp_path / "ledger.jsonl", KEY), []
    for number in range(1, 31):
        charges = [charge(OTHER, round=number, request_sha256=f"{number}")] * 2
        charges[1] = dataclasses.replace(charges[0], purpose=METRIC, event=EVENT)
        ledger.reserve(charges, AMPLE)
        sizes.append(len(state(ledger, round=number).to_json()))
    assert state(ledger, round=30).num_charged == 60
    assert sizes[-1] <= min(sizes[0] + 16, 2000)


def test_a_statement_that_is_too_long_is_not_parsed(stated: Statement) -> None:
    """More than 8 KiB are refused by their length."""
    with pytest.raises(PrivacyError, match="at most 8192 characters"):
        read_statement(stated.to_json() + " " * 8192)


@pytest.mark.parametrize(
    ("name", "why"), [("run", "at most 200 characters"), ("unit", "must be text, and the uni")]
)
def test_a_statement_has_short_names(stated: Statement, name: str, why: str) -> None:
    """A server keeps them: whoever signs long ones would fill its register."""
    values = {**json.loads(stated.to_json()), name: "x" * 201}
    del values["signature"]
    signature = signature_of(KEY, values)
    with pytest.raises(PrivacyError, match=why):
        read_statement(json.dumps({**values, "signature": signature}))


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
        *("", "{", "5", "null", "[]", "{}", '"text"', '{"charged": 5}', '{"charged": []}'),
        "[" * 100_000,
    ],
    ids=lambda text: text[:20] or "empty",
)
def test_a_text_that_is_no_statement_is_refused(text: str) -> None:
    """What is no statement is a privacy error, whatever it is."""
    with pytest.raises(PrivacyError):
        read_statement(text)


def test_nothing_but_public_values_leaves(stated: Statement) -> None:
    """A statement holds constants, counts, identifiers and hashes: no file name, nothing computed from records."""
    values = json.loads(stated.to_json())
    assert set(values) == set(FIELDS)
    assert all(type(each) in (int, float) for kind in values["charged"] for each in kind)
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
        {"root_sha256": "f" * 64},
        {"charged": ((OTHER, 2), (EVENT, 1))},
        {"charged": ((EVENT, 4),)},
        {"charged": ()},
        {"charges": 3},
        {"ledger_id": "0" * 32},
        {"unit": "user"},
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
    assert not dataclasses.replace(longer, charged=stated.charged[:-1]).follows(stated)
    assert not dataclasses.replace(longer, charged=stated.charged[1:]).follows(stated)
    assert not dataclasses.replace(longer, charges=stated.charges - 1).follows(stated)


@pytest.fixture
def bare(ledger: Ledger) -> Statement:
    """A statement of a ledger that holds a release without privacy."""
    ledger.release_unprotected(Unprotected("open", 1, ADAPTER, "release"), AMPLE)
    return state(ledger)


def resigned(statement: Statement, **changes: Any) -> str:
    """A statement with other values, well signed."""
    from fedslm.privacy.keys import signature_of

    values = {**json.loads(statement.to_json()), **changes}
    del values["signature"]
    return json.dumps({**values, "signature": signature_of(KEY, values)})


def test_an_infinite_epsilon_reads_back_as_it_was(bare: Statement) -> None:
    """In JSON it is one word and no constant that some readers refuse; the number of releases is beside it."""
    assert (bare.epsilon, bare.unprotected) == (math.inf, 1)
    values = json.loads(bare.to_json(), parse_constant=lambda name: pytest.fail(name))
    assert (values["epsilon"], values["unprotected"]) == ("infinite", 1)
    assert read_statement(bare.to_json()) == bare


@pytest.mark.parametrize(
    "changes",
    [
        *({"epsilon": 3.0}, {"epsilon": "Infinity"}, {"epsilon": "inf"}, {"epsilon": True}),
        *({"epsilon": None}, {"epsilon": -1.0}, {"unprotected": 0}, {"unprotected": True}),
        *({"unprotected": -1}, {"unprotected": 10**6}, {"unprotected": 1.0}),
        *(
            {"unit": "visit"},
            {"unit": "rec\u043erd"},
            {"round": True},
            {"index": True},
            {"charges": True},
        ),
        *({"delta": True}, {"run": "r" * 600}, {"public_key": "AB" * 32}),
    ],
    ids=repr,
)
def test_a_statement_is_consistent_whoever_signed(bare: Statement, changes: dict[str, Any]) -> None:
    """Epsilon is infinite exactly if something was released without privacy; units are of a list; no booleans."""
    assert read_statement(resigned(bare)) == bare
    with pytest.raises(PrivacyError):
        read_statement(resigned(bare, **changes))


def test_infinity_without_a_release_is_refused(stated: Statement) -> None:
    """A node cannot claim the one without the other."""
    with pytest.raises(PrivacyError, match="only then"):
        read_statement(resigned(stated, epsilon="infinite"))


def test_a_statement_of_an_older_version_reads_back(stated: Statement) -> None:
    """Without a release the statement has the fields that it always had, so stored ones keep their signature."""
    assert "unprotected" not in json.loads(stated.to_json())
    with pytest.raises(PrivacyError, match="signature"):
        read_statement(resigned(stated, unprotected=0))


def test_releases_without_privacy_are_not_forgotten(bare: Statement) -> None:
    """A later statement has at least as many; in a private run they pay for no round."""
    later = dataclasses.replace(bare, index=bare.index + 5, head_sha256="f" * 64)
    assert later.follows(bare)
    assert not dataclasses.replace(later, unprotected=0).follows(bare)
    more = dataclasses.replace(later, round=bare.round + 1, unprotected=2)
    assert not more.follows(bare)
    assert dataclasses.replace(more, charged=()).follows(dataclasses.replace(bare, charged=()))
