"""What the tests of secure aggregation share: a federation of a few nodes without a network."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from fedslm.privacy.keys import public_hex
from fedslm.secagg.cohort import Cohort, Requirements, threshold_for
from fedslm.secagg.kept import Kept
from fedslm.secagg.node import MaskedInput, Node
from fedslm.secagg.roster import Member, Roster, signed_roster, verified
from fedslm.secagg.server import Outcome, Server

RUN, PLAN = "run-1", "cd" * 32
LENIENT = Requirements(num_colluding=0, least_honest_nodes=2, plan_sha256=PLAN)
Vector = NDArray[np.uint32]


def ledger_key(client: int) -> Ed25519PrivateKey:
    """A client's ledger key, the same in every test."""
    return Ed25519PrivateKey.from_private_bytes(bytes([client % 251, client // 251]) + bytes(30))


def authority_key(number: int = 1) -> ec.EllipticCurvePrivateKey:
    """An authority's key, the same in every test."""
    return ec.derive_private_key(1000 + number, ec.SECP384R1())


def members_of(clients: Collection[int]) -> list[Member]:
    """Members of a roster."""
    return [
        Member(each, f"node key {each}", public_hex(ledger_key(each).public_key())) for each in clients
    ]


def roster_of(clients: Collection[int], serial: int = 1) -> Roster:
    """A verified roster of some clients."""
    text = signed_roster(authority_key(), "federation", serial, members_of(clients))
    return verified(text, authority_key().public_key())


@dataclass
class Federation:
    """Nodes with their directories, a cohort of all of them, and the messages of one attempt.

    Each leg asks the given clients, or all that answered the leg before.
    """

    directory: Path
    num_nodes: int
    num_values: int = 5
    num_colluding: int = 0
    nodes: dict[int, Node] = field(default_factory=dict)
    requests: dict[str, Any] = field(default_factory=dict)
    inputs: dict[int, MaskedInput] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.roster = roster_of(range(self.num_nodes))
        self.nodes = {client: self.node(client) for client in range(self.num_nodes)}
        self.begin()

    def node(self, client: int, session: str = "process 1") -> Node:
        """A client's node; another session is a restarted process."""
        kept = Kept(self.directory / str(client), RUN, session)
        return Node(ledger_key(client), self.roster, LENIENT, kept)

    def begin(self, attempt: int = 1, **changes: Any) -> None:
        """Begins an attempt at a server."""
        threshold = threshold_for(self.num_nodes, self.num_colluding)
        clients = tuple(range(self.num_nodes))
        values = (RUN, 1, attempt, clients, threshold, self.num_colluding, self.num_values)
        self.cohort = replace(Cohort(*values, self.roster.sha256, PLAN), **changes)
        self.server = Server(self.cohort, self.roster)
        self.requests, self.inputs = {}, {}

    def keys(self, clients: Collection[int] | None = None) -> None:
        """The first leg."""
        self.requests["keys"] = request = self.server.keys_request()
        for client in self.nodes if clients is None else clients:
            self.server.add_keys(client, self.nodes[client].keys(request))

    def shares(self, clients: Collection[int] | None = None) -> None:
        """The second leg."""
        self.requests["shares"] = request = self.server.shares_request()
        for client in self.server._keys if clients is None else clients:
            self.server.add_shares(client, self.nodes[client].shares(request))

    def input(self, vectors: Mapping[int, Vector], clients: Collection[int] | None = None) -> None:
        """The third leg; vectors are copied."""
        self.requests["input"] = requests = self.server.input_requests()
        for client in requests if clients is None else clients:
            vector = vectors[client].copy()
            sent = self.nodes[client].masked_input(requests[client], lambda _, vector=vector: vector)
            self.inputs[client] = MaskedInput(sent.head, sent.vector.copy())
            self.server.add_input(client, sent.head, sent.vector)

    def survivors(self, clients: Collection[int] | None = None) -> None:
        """The fourth leg."""
        self.requests["survivors"] = request = self.server.survivors_request()
        for client in self.server.survivors if clients is None else clients:
            self.server.add_signature(client, self.nodes[client].survivors(request))

    def unmask(self, clients: Collection[int] | None = None) -> None:
        """The last leg."""
        self.requests["unmask"] = request = self.server.unmask_request()
        for client in list(self.server._signatures) if clients is None else clients:
            self.server.add_unmask(client, self.nodes[client].unmask(request))

    def vectors(self) -> dict[int, Vector]:
        """A vector for each client, of any uint32 values."""
        generator = np.random.default_rng(7)
        return {each: generator.integers(0, 1 << 32, self.num_values, np.uint32) for each in self.nodes}

    def until(self, leg: str) -> None:
        """Runs all legs before one, without dropouts."""
        steps = {
            "keys": lambda: None,
            "shares": self.keys,
            "input": self.shares,
            "survivors": lambda: self.input(self.vectors()),
            "unmask": self.survivors,
            "sum": self.unmask,
        }
        for name, before in steps.items():
            before()
            if name == leg:
                return
        raise KeyError(leg)

    def finish(self) -> Outcome:
        """The sum."""
        return self.server.finish()


def plain_sum(vectors: Mapping[int, Vector], clients: Collection[int]) -> Vector:
    """The sum modulo 2^32 of some clients' vectors, in Python's whole numbers."""
    columns = zip(*(vectors[client].tolist() for client in clients), strict=True)
    return np.array([sum(column) % (1 << 32) for column in columns], np.uint32)
