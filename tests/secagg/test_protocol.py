"""Tests of whole attempts: the sum for every dropout, too few survivors, and wrong shares."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.secagg import Federation, plain_sum

from fedslm.errors import FederationError
from fedslm.secagg.messages import Shares, Unmask, decode, encode
from fedslm.secagg.unmasking import Misfit

LEGS = 5


def run_with(federation: Federation, left: dict[int, int]) -> tuple[int, ...]:
    """Runs an attempt in which clients leave before a leg (0 to 4); returns the survivors."""
    federation.begin(federation.cohort.attempt + 1)

    def there(leg: int) -> list[int]:
        return [client for client in federation.nodes if left.get(client, LEGS) > leg]

    federation.keys(there(0))
    federation.shares(there(1))
    vectors = federation.vectors()
    federation.input(vectors, there(2))
    federation.survivors(there(3))
    federation.unmask(there(4))
    outcome = federation.finish()
    assert outcome.sum.tolist() == plain_sum(vectors, outcome.survivors).tolist()
    assert outcome.survivors == tuple(there(2))
    assert outcome.dropped == tuple(sorted(federation.nodes.keys() - set(there(2))))
    assert outcome.misfits == ()
    return outcome.survivors


def all_dropouts(num_nodes: int, most: int) -> Iterable[dict[int, int]]:
    """Every way in which at most so many clients leave, each before any of the legs."""
    for count in range(most + 1):
        for clients in itertools.combinations(range(num_nodes), count):
            for legs in itertools.product(range(LEGS), repeat=count):
                yield dict(zip(clients, legs, strict=True))


@pytest.mark.parametrize("num_nodes", [2, 4])
def test_the_sum_with_every_dropout(num_nodes: int, tmp_path: Path) -> None:
    """For 2 and 4 nodes: whoever leaves, up to n − t of them, before whichever leg."""
    federation = Federation(tmp_path, num_nodes)
    for left in all_dropouts(num_nodes, num_nodes - federation.cohort.threshold):
        run_with(federation, left)


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_the_sum_with_any_dropouts(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """For 3 to 7 nodes, any colluding bound, any length, up to n − t dropouts before any legs."""
    num_nodes = data.draw(st.integers(3, 7))
    colluding = data.draw(st.integers(0, (num_nodes - 2) // 3))
    length = data.draw(st.integers(1, 20))
    federation = Federation(tmp_path_factory.mktemp("nodes"), num_nodes, length, colluding)
    spare = num_nodes - federation.cohort.threshold
    who = data.draw(st.lists(st.integers(0, num_nodes - 1), max_size=spare, unique=True))
    run_with(federation, {client: data.draw(st.integers(0, LEGS - 1)) for client in who})


@pytest.mark.parametrize("leg", range(LEGS))
def test_fewer_than_the_threshold_reveal_nothing(leg: int, tmp_path: Path) -> None:
    """With 5 nodes and a threshold of 4, two that leave before any leg end the attempt without a sum."""
    federation = Federation(tmp_path, 5)
    assert federation.cohort.threshold == 4
    with pytest.raises(FederationError, match="threshold is 4"):
        run_with(federation, {1: leg, 3: leg})
    unmasked = [node.kept.read() for node in federation.nodes.values()]
    answered = sum(each is not None and "unmask" in each.legs for each in unmasked)
    assert answered == (3 if leg == 4 else 0)  # three gave shares; four are needed


def test_the_masked_inputs_say_nothing_without_unmasking(tmp_path: Path) -> None:
    """The sum of all masked inputs is not the sum: self masks are still there."""
    federation = Federation(tmp_path, 3)
    federation.until("survivors")
    plain = plain_sum(federation.vectors(), range(3))
    masked = sum(each.vector for each in federation.inputs.values())
    assert not (masked == plain).any()


def test_a_larger_cohort(tmp_path: Path) -> None:
    """24 nodes, 8 of which leave after their shares or before them; more than one block of values."""
    federation = Federation(tmp_path, 24, num_values=20_000)
    assert federation.cohort.threshold == 16
    assert len(run_with(federation, {client: 1 + client % 2 for client in range(3, 11)})) == 16


def _changed_share(value: str) -> str:
    """Another share than this."""
    return f"{'0' * 64}{'00' if value.endswith('01') else '01'}"


def test_a_wrong_share_is_named(tmp_path: Path) -> None:
    """One node gives wrong shares of one seed: the sum is right, and the report names both."""
    federation = Federation(tmp_path, 7)
    federation.until("unmask")
    request = federation.server.unmask_request()
    for client, node in federation.nodes.items():
        reply = decode(Unmask, node.unmask(request))
        if client == 2:
            reply = replace(reply, seeds={**reply.seeds, 4: _changed_share(reply.seeds[4])})
        federation.server.add_unmask(client, encode(reply))
    outcome = federation.finish()
    assert outcome.misfits == (Misfit(owner=4, holder=2),)
    assert outcome.sum.tolist() == plain_sum(federation.vectors(), range(7)).tolist()


def test_a_wrong_share_of_a_dropped_node_is_named(tmp_path: Path) -> None:
    """The same for the mask key of a node that dropped out, with one spare share: noticed, not named."""
    federation = Federation(tmp_path, 10)
    federation.until("input")
    federation.input(federation.vectors(), [client for client in range(10) if client != 6])
    federation.survivors()
    request = federation.server.unmask_request()
    assert len(federation.server.survivors) - federation.cohort.threshold == 2
    for client in federation.server.survivors:
        reply = decode(Unmask, federation.nodes[client].unmask(request))
        if client == 1:
            reply = replace(reply, mask_keys={6: _changed_share(reply.mask_keys[6])})
        federation.server.add_unmask(client, encode(reply))
    outcome = federation.finish()
    assert outcome.misfits == (Misfit(owner=6, holder=1),)
    assert outcome.sum.tolist() == plain_sum(federation.vectors(), outcome.survivors).tolist()


def test_shares_that_do_not_reconstruct(tmp_path: Path) -> None:
    """Too many wrong shares: no sum, and the error names whose secret it is."""
    federation = Federation(tmp_path, 7)
    federation.until("unmask")
    request = federation.server.unmask_request()
    for client, node in federation.nodes.items():
        reply = decode(Unmask, node.unmask(request))
        if client in (1, 2):
            reply = replace(reply, seeds={**reply.seeds, 4: _changed_share(reply.seeds[4])})
        federation.server.add_unmask(client, encode(reply))
    masked = federation.server._sum.copy()
    with pytest.raises(FederationError, match="the seed of client=4 cannot be reconstructed"):
        federation.finish()
    assert (federation.server._sum == masked).all()


def test_without_spare_shares_a_wrong_one_is_noticed(tmp_path: Path) -> None:
    """Exactly the threshold answers: the commitment shows a wrong secret, which is never used."""
    federation = Federation(tmp_path, 4)
    federation.until("unmask")
    request = federation.server.unmask_request()
    for client in range(3):
        reply = decode(Unmask, federation.nodes[client].unmask(request))
        if client == 0:
            reply = replace(reply, seeds={**reply.seeds, 1: _changed_share(reply.seeds[1])})
        federation.server.add_unmask(client, encode(reply))
    with pytest.raises(FederationError, match="the seed of client=1"):
        federation.finish()
    federation.server.add_unmask(3, federation.nodes[3].unmask(request))  # one more share names nobody
    with pytest.raises(FederationError, match="the seed of client=1"):
        federation.finish()


def test_a_late_share_completes_the_sum(tmp_path: Path) -> None:
    """Too few shares leave everything as it was; one more gives the sum."""
    federation = Federation(tmp_path, 4)
    federation.until("unmask")
    federation.unmask([0, 1])
    with pytest.raises(FederationError, match="2 nodes answered 'unmask'"):
        federation.finish()
    request = federation.requests["unmask"]
    federation.server.add_unmask(2, federation.nodes[2].unmask(request))
    assert federation.finish().sum.tolist() == plain_sum(federation.vectors(), range(4)).tolist()
    with pytest.raises(FederationError, match="follows"):
        federation.finish()


def test_shares_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    """A node encrypts rubbish for one peer: the peer says so, and the others' shares suffice."""
    federation = Federation(tmp_path, 7)
    federation.until("shares")
    request = federation.server.shares_request()
    for client, node in federation.nodes.items():
        reply = decode(Shares, node.shares(request))
        if client == 5:
            reply = replace(reply, boxes={**reply.boxes, 3: "00" * 94})
        federation.server.add_shares(client, encode(reply))
    federation.input(federation.vectors())
    federation.survivors()
    federation.unmask()
    outcome = federation.finish()
    assert outcome.misfits == (Misfit(owner=5, holder=3),)
    assert outcome.sum.tolist() == plain_sum(federation.vectors(), range(7)).tolist()


def test_values_wrap_around(tmp_path: Path) -> None:
    """Sums are modulo 2^32: negative numbers are their complements."""
    federation = Federation(tmp_path, 3, num_values=3)
    federation.until("input")
    minus = np.array([-1, -(2**31), 2**31 - 1]).astype(np.int32).view(np.uint32)
    federation.input({0: minus, 1: minus, 2: minus})
    federation.survivors()
    federation.unmask()
    assert federation.finish().sum.view(np.int32).tolist() == [-3, -(2**31), 2**31 - 3]
