"""Tests of the roster: who signed it, what it may hold, and that an older one does not come back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.secagg import authority_key, ledger_key, members_of, roster_of

from fedslm.errors import FederationError, FedslmError, Refused, RunError
from fedslm.privacy.keys import public_hex
from fedslm.secagg.roster import MOST_BYTES, Member, accepted, signed_roster, verified

PUBLIC = authority_key().public_key()
TEXT = signed_roster(authority_key(), "federation", 3, members_of(range(4)))


def signed(values: dict[str, Any]) -> str:
    """A roster of any values that the authority did sign."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    content = json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
    signature = authority_key().sign(content, ec.ECDSA(hashes.SHA384())).hex()
    return json.dumps({**values, "signature": signature})


def test_a_roster_is_read() -> None:
    """Members in order, each with its key; the hash does not depend on the signature, which is random."""
    roster = verified(TEXT, PUBLIC)
    assert [member.client for member in roster.members] == [0, 1, 2, 3]
    assert roster.ledger_key(2).public_bytes_raw() == ledger_key(2).public_key().public_bytes_raw()
    assert roster.client_of(public_hex(ledger_key(3).public_key())) == 3
    again = signed_roster(authority_key(), "federation", 3, members_of([3, 1, 0, 2]))
    assert verified(again, PUBLIC).sha256 == roster.sha256
    assert roster_of(range(3)).sha256 != roster.sha256
    with pytest.raises(FederationError, match="not on the roster"):
        roster.ledger_key(4)
    with pytest.raises(FederationError, match="not on the roster"):
        roster.client_of(public_hex(ledger_key(9).public_key()))


def test_another_authority_is_refused() -> None:
    """The roster of another authority, and one that was changed after it was signed."""
    with pytest.raises(Refused):
        verified(TEXT, authority_key(2).public_key())
    values = json.loads(TEXT)
    for change in (
        {"serial": 4},
        {"federation": "other"},
        {"members": values["members"][:3]},  # a node left out
        {"members": [*values["members"], vars(members_of([4])[0])]},  # a peer that the server made up
    ):
        with pytest.raises(Refused):
            verified(json.dumps({**values, **change}), PUBLIC)


@pytest.mark.parametrize(
    "change",
    [
        {"purpose": "another list"},
        {"serial": -1},
        {"serial": True},
        {"serial": "3"},
        {"federation": ""},
        {"federation": "x" * 201},
        {"federation": 7},
        {"members": []},
        {"members": {}},
        {"members": [1]},
        {"members": [{"client": 0}]},
        {"members": [{**vars(members_of([0])[0]), "more": 1}]},
        {"members": [vars(each) for each in members_of([1, 0])]},
        {"members": [vars(each) for each in members_of([0, 0])]},
        {"members": [{**vars(members_of([0])[0]), "client": 10**9}]},
        {"members": [{**vars(members_of([0])[0]), "node_key": "x" * 601}]},
        {"members": [{**vars(members_of([0])[0]), "node_key": None}]},
        {"members": [{**vars(members_of([0])[0]), "ledger_key": "AB" * 32}]},
        {"members": [{**vars(members_of([0])[0]), "ledger_key": "/etc/passwd"}]},
        {"members": [{**vars(members_of([0])[0]), "ledger_key": "01" + "00" * 31}]},  # small order
        {"unknown": 1},
    ],
)
def test_a_signed_roster_has_bounds(change: dict[str, Any]) -> None:
    """Even what the authority signed is refused where a value is not what it must be."""
    values = {key: value for key, value in json.loads(TEXT).items() if key != "signature"}
    with pytest.raises(FederationError):
        verified(signed({**values, **change}), PUBLIC)


def test_one_person_is_one_member() -> None:
    """The same ledger or node key under two clients would count twice towards a threshold."""
    first, second = members_of([0, 1])
    for twin in (
        Member(1, first.node_key, second.ledger_key),
        Member(1, second.node_key, first.ledger_key),
    ):
        with pytest.raises(FederationError, match="the same"):
            signed_roster(authority_key(), "federation", 1, [first, twin])


@pytest.mark.parametrize("text", ["[" * 100_000, "{}", "[]", "1" * 5000, "\ud800", "null"])
def test_odd_texts_are_refused(text: str) -> None:
    """Deep lists, long numbers and values of other types."""
    with pytest.raises(FederationError):
        verified(text, PUBLIC)


@given(st.text(max_size=200))
def test_any_text_is_refused(text: str) -> None:
    """Nothing but a FedslmError, whatever the text is."""
    with pytest.raises(FedslmError):
        verified(text, PUBLIC)


def test_a_long_text_is_not_parsed() -> None:
    """The bound comes first."""
    with pytest.raises(FederationError, match="at most"):
        verified(" " * (MOST_BYTES + 1), PUBLIC)


def test_an_older_roster_does_not_come_back(tmp_path: Path) -> None:
    """A revoked node stays revoked: the newest roster is kept, also after a restart."""
    path = tmp_path / "roster.json"
    key = authority_key()
    newer = signed_roster(key, "federation", 4, members_of(range(3)))
    assert accepted(path, TEXT, PUBLIC).serial == 3
    assert accepted(path, TEXT, PUBLIC).serial == 3
    assert accepted(path, newer, PUBLIC).serial == 4
    with pytest.raises(Refused, match="serial=3"):
        accepted(path, TEXT, PUBLIC)
    twin = signed_roster(key, "federation", 4, members_of(range(2)))
    with pytest.raises(Refused, match="serial=4"):
        accepted(path, twin, PUBLIC)
    assert accepted(path, newer, PUBLIC).serial == 4
    path.write_text("{}")
    with pytest.raises(RunError, match="cannot be used"):
        accepted(path, newer, PUBLIC)


def test_a_text_that_was_padded_does_not_fill_the_file(tmp_path: Path) -> None:
    """A server adds a second value under one name: the node could not read what it kept."""
    path = tmp_path / "roster.json"
    padded = '{"purpose":"' + "\u00e9" * (MOST_BYTES // 2) + '",' + TEXT[1:]
    assert len(padded) <= MOST_BYTES
    with pytest.raises(FederationError, match="only encoding"):
        accepted(path, padded, PUBLIC)
    assert accepted(path, TEXT, PUBLIC).serial == 3
    assert accepted(path, TEXT, PUBLIC).serial == 3
