"""Attacks by a malicious server with two colluding nodes of seven, against five honest ones."""

from __future__ import annotations

import threading
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.secagg import Federation, Vector, ledger_key, plain_sum
from support.secagg_views import is_uniform, secrets_of, small_numbers, without_masks

from fedslm.errors import FederationError, FedslmError, PolicyRefused
from fedslm.privacy.keys import signature_of
from fedslm.secagg import cohort as cohort_module
from fedslm.secagg import unmasking
from fedslm.secagg.cohort import Cohort
from fedslm.secagg.keys import survivor_values
from fedslm.secagg.messages import (
    InputHead,
    InputRequest,
    Shares,
    SharesRequest,
    SurvivorsRequest,
    SurvivorsSignature,
    Unmask,
    UnmaskRequest,
    decode,
    encode,
    survivors_context,
)
from fedslm.secagg.shamir import Interpolation
from fedslm.secagg.unmasking import Misfit, Reconstruction, remove_masks

NODES, COLLUDERS, HONEST = 7, (5, 6), (0, 1, 2, 3, 4)
LENGTH = 20_000
EVERYBODY, WITHOUT_4 = (0, 1, 2, 3, 4, 5, 6), (0, 1, 2, 3, 5, 6)


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    """Seven nodes, of which the cohort allows two to collude: a threshold of five."""
    federation = Federation(tmp_path, NODES, LENGTH, len(COLLUDERS))
    assert federation.cohort.threshold == 5
    return federation


def inputs(federation: Federation) -> dict[int, Vector]:
    """Small numbers of each node."""
    return {client: small_numbers(client, LENGTH) for client in federation.nodes}


def two_sums(
    federation: Federation, told: dict[tuple[int, ...], Collection[int]]
) -> list[tuple[int, ...]]:
    """Tells honest nodes of different survivors, and lets colluders sign each set; returns what opened.

    Args:
        federation: All nodes sent a masked input.
        told: Survivor set to the honest nodes that are told of it.
    """
    context = decode(SurvivorsRequest, federation.server.survivors_request()).context
    opened: dict[tuple[int, ...], dict[int, Unmask]] = {}
    for survivors, honest in told.items():
        values = survivor_values(federation.cohort, context, survivors)
        signatures = {client: signature_of(ledger_key(client), values) for client in COLLUDERS}
        for client in honest:
            reply = federation.nodes[client].survivors(encode(SurvivorsRequest(context, survivors)))
            signatures[client] = decode(SurvivorsSignature, reply).signature
        request = UnmaskRequest(survivors_context(context, survivors), dict(sorted(signatures.items())))
        replies: dict[int, Unmask] = {}
        for client in honest:
            try:
                replies[client] = decode(Unmask, federation.nodes[client].unmask(encode(request)))
            except PolicyRefused:
                continue
        opened[survivors] = {**replies, **colluders_give_all(federation, survivors)}
    threshold = federation.cohort.threshold
    return [survivors for survivors, replies in opened.items() if len(replies) >= threshold]


def colluders_give_all(federation: Federation, survivors: tuple[int, ...]) -> dict[int, Unmask]:
    """What colluding nodes give for any survivors: all that they hold, as often as it is wanted."""
    found = {}
    for client in COLLUDERS:
        node = federation.nodes[client]
        attempt = node._attempt()
        signed = encode(
            SurvivorsRequest(decode(InputHead, federation.inputs[client].head).context, survivors)
        )
        reply = encode(SurvivorsSignature("00" * 32, client, "00" * 64))
        context = decode(SurvivorsRequest, signed).context
        values = survivor_values(federation.cohort, context, survivors)
        signatures = {each: signature_of(ledger_key(each), values) for each in survivors}
        request = UnmaskRequest(survivors_context(context, survivors), signatures)
        _, content = node._open_shares(attempt.with_leg("survivors", signed, reply), encode(request))
        found[client] = decode(Unmask, content)
    return found


@pytest.mark.parametrize("first", [5, 4, 3, 2, 0])
def test_the_server_cannot_learn_two_sums(federation: Federation, first: int) -> None:
    """Their difference would be one node's vector. However honest nodes are divided, one set opens at most."""
    federation.until("input")
    federation.input(inputs(federation))
    rest = [client for client in HONEST[first:] if client != 4]
    opened = two_sums(federation, {EVERYBODY: HONEST[:first], WITHOUT_4: rest})
    assert opened == ([EVERYBODY] if first >= 3 else [WITHOUT_4] if len(rest) >= 3 else [])


def test_a_lower_threshold_would_give_two_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Power: with a threshold of 4, as for fewer colluders, the same attack opens both sets."""
    with pytest.raises(FederationError, match="threshold=4 must be"):
        Federation(tmp_path, NODES, LENGTH, 2).begin(threshold=4)
    monkeypatch.setattr(cohort_module, "threshold_for", lambda *_: 4)
    federation = Federation(tmp_path, NODES, LENGTH, 2)
    federation.begin(threshold=4)
    federation.until("input")
    federation.input(inputs(federation))
    assert two_sums(federation, {EVERYBODY: (3, 4), WITHOUT_4: (0, 1)}) == [EVERYBODY, WITHOUT_4]


def test_a_node_that_is_said_to_have_dropped_stays_hidden(federation: Federation) -> None:
    """The server has node 4's vector, and gets its mask key: the self mask is left, as 2 shares of 5 show."""
    federation.until("input")
    federation.input(inputs(federation))
    assert is_uniform(without_masks(federation, 4, [0, 1, 2, 3, 5, 6], with_self=False))
    held = [node._attempt() for node in (federation.nodes[client] for client in COLLUDERS)]
    shares = [
        federation.nodes[client]._boxes(attempt, attempt.legs["input"].request.encode())[4]
        for client, attempt in zip(COLLUDERS, held, strict=True)
    ]
    assert None not in shares
    with pytest.raises(FederationError, match="threshold=5"):
        Interpolation((6, 7), 5)
    guess = Interpolation((6, 7), 2).secret([share[33:] for share in shares if share])
    assert guess != secrets_of(federation, 4).seed


def test_a_node_with_another_view_stays_hidden(federation: Federation) -> None:
    """Node 0 is told of fewer peers than the others: no mask of it cancels, and no sum comes out."""
    federation.until("input")
    requests = federation.server.input_requests()
    federation.requests["input"] = requests
    full = decode(InputRequest, requests[0])
    fewer = {client: full.boxes[client] for client in (1, 2, 5, 6)}  # with itself: the threshold
    requests[0] = encode(replace(full, boxes=fewer))
    vectors = inputs(federation)
    for client in federation.nodes:
        sent = federation.nodes[client].masked_input(
            requests[client], lambda _, c=client: vectors[c].copy()
        )
        federation.inputs[client] = sent
    context = decode(InputHead, federation.inputs[1].head).context
    assert decode(InputHead, federation.inputs[0].head).context != context
    # Those with the same view are enough to open everybody's seeds, node 0's among them.
    request = encode(SurvivorsRequest(context, EVERYBODY))
    with pytest.raises(PolicyRefused, match="other shares"):
        federation.nodes[0].survivors(request)
    for client in EVERYBODY[1:]:
        federation.nodes[client].survivors(request)
    left = without_masks(federation, 0, [5, 6], with_self=True)
    assert is_uniform(left)
    total = np.sum([each.vector for each in federation.inputs.values()], axis=0, dtype=np.uint32)
    keys = {each.client: each for each in decode(SharesRequest, federation.requests["shares"]).keys}
    seeds = {client: secrets_of(federation, client).seed for client in EVERYBODY}
    for view in (context, decode(InputHead, federation.inputs[0].head).context):
        attempted = total.copy()
        remove_masks(attempted, seeds, {}, keys, view)
        assert is_uniform(attempted)


def test_different_keys_for_different_nodes_join_nothing(federation: Federation) -> None:
    """Node 0 is shown one cohort's keys and the others more: nobody reads the other side's shares."""
    federation.keys()
    request = decode(SharesRequest, federation.server.shares_request())
    smaller = replace(request, keys=request.keys[:6])
    told = {client: encode(smaller if client == 0 else request) for client in range(6)}
    replies = {client: federation.nodes[client].shares(content) for client, content in told.items()}
    boxes = {client: decode(Shares, reply) for client, reply in replies.items()}
    assert boxes[0].context != boxes[1].context
    for receiver, senders in ((0, range(1, 6)), (1, [0, 2, 3, 4, 5])):
        found = {sender: boxes[sender].boxes[receiver] for sender in senders}
        content = encode(InputRequest(boxes[receiver].context, found))
        node = federation.nodes[receiver]
        read = node._boxes(node._attempt(), content)
        assert [sender for sender in senders if read[sender] is None] == (
            list(senders) if receiver == 0 else [0]
        )


def test_reflected_shares_are_not_read(federation: Federation) -> None:
    """The server returns a node's own boxes as its peers': they are bound to their way."""
    federation.until("input")
    node = federation.nodes[0]
    own = decode(Shares, node._attempt().legs["shares"].reply.encode())
    content = encode(InputRequest(own.context, own.boxes))
    assert set(node._boxes(node._attempt(), content).values()) == {None}


def test_messages_of_an_earlier_attempt_are_useless(federation: Federation) -> None:
    """Each request of attempt 1 is refused in attempt 2, and attempt 1 is over."""
    federation.until("sum")
    old = dict(federation.requests)
    node = federation.nodes[0]
    federation.begin(2)
    federation.keys()
    federation.shares()
    with pytest.raises(FedslmError):
        node.shares(old["shares"])
    with pytest.raises(PolicyRefused, match="another attempt"):
        node.masked_input(old["input"][0], lambda _: pytest.fail("trained"))
    federation.input(inputs(federation))
    with pytest.raises(PolicyRefused, match="another attempt"):
        node.survivors(old["survivors"])
    federation.survivors()
    with pytest.raises(PolicyRefused):
        node.unmask(old["unmask"])
    with pytest.raises(PolicyRefused, match="must come after"):
        node.keys(old["keys"])


def test_two_requests_at_the_same_time(federation: Federation) -> None:
    """A race of two survivor sets, and of two inputs, in ten threads: one set signed, one vector made."""
    federation.until("input")
    requests = federation.server.input_requests()
    federation.requests["input"] = requests
    made: list[int] = []

    def vector(cohort: Cohort) -> Vector:
        made.append(1)
        return small_numbers(0, LENGTH)

    barrier = threading.Barrier(10)

    def ask(number: int) -> bytes | None:
        barrier.wait()
        try:
            return federation.nodes[0].masked_input(requests[0], vector).head
        except PolicyRefused:
            return None

    with ThreadPoolExecutor(10) as pool:
        heads = set(pool.map(ask, range(10))) - {None}
    assert (len(made), len(heads)) == (1, 1)
    (head,) = heads
    assert head is not None
    context = decode(InputHead, head).context

    def sign(number: int) -> bytes | None:
        barrier.wait()
        survivors = EVERYBODY if number % 2 else WITHOUT_4
        try:
            return federation.nodes[0].survivors(encode(SurvivorsRequest(context, survivors)))
        except PolicyRefused:
            return None

    with ThreadPoolExecutor(10) as pool:
        assert len(set(pool.map(sign, range(10))) - {None}) == 1


def test_colluding_nodes_cannot_shift_a_sum_by_their_shares(federation: Federation) -> None:
    """Both give wrong shares of everybody: the honest shares suffice, or there is no sum; never a wrong one."""
    federation.until("unmask")
    request = federation.server.unmask_request()
    for client in (5, 6, 0, 1, 2, 3):
        found = decode(Unmask, federation.nodes[client].unmask(request))
        if client in COLLUDERS:
            found = replace(found, seeds=dict.fromkeys(found.seeds, "00" * 33))
        federation.server.add_unmask(client, encode(found))
    with pytest.raises(FederationError, match="cannot be reconstructed"):  # four honest shares of five
        federation.finish()
    federation.server.add_unmask(4, federation.nodes[4].unmask(request))
    with pytest.raises(FederationError, match="cannot be reconstructed"):  # two wrong, two spare
        federation.finish()


def test_a_hostile_holder_costs_the_server_one_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One node gives wrong shares of all: it is found once and then left out; the sum is right."""
    federation = Federation(tmp_path, 10)
    federation.until("unmask")
    request = federation.server.unmask_request()
    for client, node in federation.nodes.items():
        found = decode(Unmask, node.unmask(request))
        if client == 3:
            found = replace(found, seeds=dict.fromkeys(found.seeds, "00" * 33))
        federation.server.add_unmask(client, encode(found))
    searches = []

    class Counting(Interpolation):
        """Counts searches for wrong shares."""

        def corrected(self, shares: list[bytes]) -> tuple[bytes, tuple[int, ...]] | None:  # type: ignore[override]
            searches.append(1)
            return super().corrected(shares)

    monkeypatch.setattr(unmasking, "Interpolation", Counting)
    outcome = federation.finish()
    assert outcome.misfits == (Misfit(owner=0, holder=3),)
    assert len(searches) == 1
    assert outcome.sum.tolist() == plain_sum(federation.vectors(), range(10)).tolist()


def test_a_hostile_dealer_is_named(tmp_path: Path) -> None:
    """A node shares other secrets than it committed to: no sum, and the error names it."""
    federation = Federation(tmp_path, 7)
    federation.keys()
    node = federation.nodes[5]
    attempt = node._attempt()
    assert attempt.secrets is not None
    node.kept.write(replace(attempt, secrets=replace(attempt.secrets, seed=b"\x01" * 32)))
    federation.shares()
    federation.input(federation.vectors())
    federation.survivors()
    federation.unmask()
    with pytest.raises(FederationError, match="the seed of client=5 cannot be reconstructed"):
        federation.finish()
    found = Reconstruction(federation.cohort, federation.server._keys, federation.server._opened)
    assert [found.seed(client) is None for client in (0, 1, 2, 3, 4, 6)] == [False] * 6
