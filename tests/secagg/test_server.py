"""Tests of what the server refuses: every reply is hostile until proven."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.secagg import Federation, ledger_key, plain_sum, roster_of

from fedslm.errors import FederationError
from fedslm.secagg.keys import RoundSecrets
from fedslm.secagg.messages import (
    InputHead,
    PublicKeys,
    Shares,
    SurvivorsSignature,
    Unmask,
    decode,
    encode,
)
from fedslm.secagg.server import Server


def refused(add: Callable[..., None], *arguments: Any, match: str = "") -> None:
    """Expects that the server refuses a reply."""
    with pytest.raises(FederationError, match=match):
        add(*arguments)


def test_a_server_checks_its_own_cohort(tmp_path: Path) -> None:
    """A cohort of another roster, or with a client that is not on it."""
    federation = Federation(tmp_path, 4)
    with pytest.raises(FederationError, match="another roster"):
        Server(federation.cohort, roster_of(range(5)))
    with pytest.raises(FederationError, match="not on the roster"):
        Server(replace(federation.cohort, clients=(0, 1, 2, 9)), federation.roster)


def test_keys_that_are_refused(tmp_path: Path) -> None:
    """Twice, in another's name, unsigned, used by another, from a stranger, late."""
    federation = Federation(tmp_path, 4)
    server, cohort = federation.server, federation.cohort
    replies = {who: node.keys(server.keys_request()) for who, node in federation.nodes.items()}
    refused(server.add_keys, 1, replies[0], match="in the name of")
    refused(server.add_keys, 9, replies[0], match="was not asked")
    refused(server.add_keys, 0, b"{}")
    forged = RoundSecrets.fresh().public(cohort, 0, ledger_key(1))
    refused(server.add_keys, 0, encode(forged), match="did not sign")
    server.add_keys(0, replies[0])
    refused(server.add_keys, 0, replies[0], match="second time")
    secrets = federation.nodes[0].kept.read().secrets  # type: ignore[union-attr]
    assert secrets is not None
    for twin in (secrets, replace(RoundSecrets.fresh(), share_key=secrets.mask_key)):
        refused(server.add_keys, 1, encode(twin.public(cohort, 1, ledger_key(1))), match="used already")
    same = RoundSecrets.fresh()
    same = replace(same, share_key=same.mask_key)
    refused(server.add_keys, 1, encode(same.public(cohort, 1, ledger_key(1))), match="used already")
    server.add_keys(1, replies[1])
    server.add_keys(2, replies[2])
    server.shares_request()
    refused(server.add_keys, 3, replies[3], match="the leg is 'shares'")


def test_shares_that_are_refused(tmp_path: Path) -> None:
    """Too few or too many boxes, twice, of another attempt, in another's name, too early."""
    federation = Federation(tmp_path, 4)
    refused(federation.server.add_shares, 0, b"{}", match="the leg is 'keys'")
    federation.keys()
    request = federation.server.shares_request()
    server = federation.server
    reply = federation.nodes[0].shares(request)
    found = decode(Shares, reply)
    box = found.boxes[1]
    for boxes in ({1: box, 2: box}, {**found.boxes, 0: box}, {**found.boxes, 9: box}, {}):
        refused(server.add_shares, 0, encode(replace(found, boxes=boxes)), match="one box for each")
    refused(server.add_shares, 0, encode(replace(found, context="ab" * 32)), match="another attempt")
    refused(server.add_shares, 1, reply, match="in the name of")
    server.add_shares(0, reply)
    refused(server.add_shares, 0, reply, match="second time")


def test_inputs_that_are_refused(tmp_path: Path) -> None:
    """Another type or length, twice, of another attempt; the sum holds each vector once."""
    federation = Federation(tmp_path, 4)
    federation.until("input")
    vectors, requests = federation.vectors(), federation.server.input_requests()
    server = federation.server
    sent = {
        who: node.masked_input(requests[who], lambda _, who=who: vectors[who].copy())
        for who, node in federation.nodes.items()
    }
    head, vector = sent[0].head, sent[0].vector
    for wrong in (vector[:4], vector.reshape(1, -1), vector.astype(np.float32), vector.view(np.int32)):
        refused(server.add_input, 0, head, wrong, match="must send 5 values")
    stale = encode(InputHead("ab" * 32, 0, ()))
    refused(server.add_input, 0, stale, vector, match="another attempt")
    refused(server.add_input, 1, head, vector, match="in the name of")
    for unreadable in ((0,), (9,)):  # itself, a stranger
        framing = encode(replace(decode(InputHead, head), unreadable=unreadable))
        refused(server.add_input, 0, framing, vector, match="not sent")
    assert not server._sum.any()
    for who, each in sent.items():
        server.add_input(who, each.head, each.vector)
        refused(server.add_input, who, each.head, each.vector, match="second time")
    federation.survivors()
    federation.unmask()
    assert federation.finish().sum.tolist() == plain_sum(vectors, range(4)).tolist()


def test_signatures_and_shares_that_are_refused(tmp_path: Path) -> None:
    """Another's signature; shares of both kinds, of strangers, or in another's name."""
    federation = Federation(tmp_path, 6)
    federation.until("input")
    federation.input(federation.vectors(), [0, 1, 2, 3, 4])
    server = federation.server
    request = server.survivors_request()
    replies = {who: federation.nodes[who].survivors(request) for who in range(5)}
    forged = replace(decode(SurvivorsSignature, replies[1]), client=0)
    refused(server.add_signature, 0, encode(forged), match="did not sign")
    refused(server.add_signature, 5, replies[0], match="was not asked")
    for who, reply in replies.items():
        server.add_signature(who, reply)
        refused(server.add_signature, who, reply, match="second time")
    request = server.unmask_request()
    found = decode(Unmask, federation.nodes[0].unmask(request))
    share = found.seeds[0]
    for changes in (
        {"mask_keys": {1: share, 5: share}},  # both shares of one peer
        {"seeds": {5: share}},
        {"seeds": {9: share}},
        {"context": "ab" * 32},
        {"client": 1},
    ):
        refused(server.add_unmask, 0, encode(replace(found, **changes)))
    server.add_unmask(0, encode(found))
    refused(server.add_unmask, 0, encode(found), match="second time")


def test_requests_come_in_their_order(tmp_path: Path) -> None:
    """A leg cannot be skipped, or ended twice."""
    federation = Federation(tmp_path, 4)
    server = federation.server
    steps = [
        server.input_requests,
        server.survivors_request,
        server.unmask_request,
        server.finish,
    ]
    for step in steps:
        with pytest.raises(FederationError, match="follows"):
            step()
    federation.until("input")
    with pytest.raises(FederationError, match="follows 'keys'"):
        server.shares_request()


@pytest.mark.parametrize("leg", ["add_keys", "add_shares", "add_signature", "add_unmask"])
def test_any_bytes_leave_the_server_as_it_was(leg: str, tmp_path: Path) -> None:
    """Rubbish from each client at each leg, then the honest replies: the same sum."""
    federation = Federation(tmp_path, 4)
    rubbish = [b"", b"{}", b"\xff" * 100, b"[" * 1000, encode(PublicKeys(0, "", "", "", ""))]
    legs = {"add_keys": 0, "add_shares": 1, "add_signature": 3, "add_unmask": 4}
    steps: list[Callable[[], None]] = [
        federation.keys,
        federation.shares,
        lambda: federation.input(federation.vectors()),
        federation.survivors,
        federation.unmask,
    ]
    for i, step in enumerate(steps):
        if i == legs[leg]:
            for client in range(4):
                for content in rubbish:
                    refused(getattr(federation.server, leg), client, content)
        step()
    assert federation.finish().sum.tolist() == plain_sum(federation.vectors(), range(4)).tolist()
