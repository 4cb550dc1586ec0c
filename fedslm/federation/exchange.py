"""Requests to nodes and their replies, one at a time, on any Flower ``Grid``."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedslm.federation.population import pull
from fedslm.federation.update import NO_FROZEN
from fedslm.federation.wire import Reply, Request
from fedslm.privacy.statement import read_statement
from fedslm.records import AdapterState

_PATIENCE_SECONDS, _POLL_SECONDS = 45.0, 0.2
_GRACE_SECONDS = 30.0  # replies that came in time must not expire while an earlier client is waited for


@dataclass
class Exchange:
    """Asks the nodes of a run, for as long as the server's process lives.

    Attributes:
        grid: Where nodes are reached.
        nodes: Client index to node id.
        seconds: How long one exchange may take; a reply that comes later is dropped.
        frozen: What a node may not have yet: sent until it has answered once; empty in a simulation,
            whose clients read it from the run directory.
        keys: Client index to the ledger key that was admitted; empty in a simulation.
        away: Nodes that are not waited for until the grid sees them again.
        bytes_down: Bytes of tensors sent so far.
    """

    grid: Grid
    nodes: Mapping[int, int]
    seconds: float
    frozen: AdapterState = field(default_factory=lambda: AdapterState({}))
    keys: Mapping[int, str] = field(default_factory=dict)
    away: frozenset[int] = frozenset()
    bytes_down: int = 0

    def __post_init__(self) -> None:
        self._have: set[int] = set()

    def replies(
        self, request: Request, clients: list[int], kind: str
    ) -> Iterator[tuple[int, Message | None]]:
        """Yields each reply in the order of the clients; None for one that is late, or is not there.

        A fixed order makes the sum reproducible; replies that came earlier wait at the grid. Nodes that
        the grid does not see are not asked: they would only keep the others waiting.
        """
        deadline = time.monotonic() + self.seconds
        seen = self._seen(clients)
        asked = [client for client in clients if self.nodes[client] in seen]
        contents = self._contents(request)
        for client in asked:
            lacking = client not in self._have
            self.bytes_down += request.num_bytes + lacking * self.frozen.num_bytes
        messages = [
            Message(
                contents[client in self._have],
                self.nodes[client],
                kind,
                ttl=self.seconds + _GRACE_SECONDS + len(asked),
                group_id=str(request.round),
            )
            for client in asked
        ]
        identifiers = dict(zip(asked, self.grid.push_messages(messages), strict=True))
        for client in clients:
            identifier = identifiers.get(client)
            yield client, None if identifier is None else pull(self.grid, identifier, deadline)

    def heard(self, client: int, answer: Reply | str) -> None:
        """Takes note of whether a node has the frozen tensors."""
        if not isinstance(answer, Reply):
            return
        if answer.status == "ok":
            self._have.add(client)
        elif NO_FROZEN in answer.reason:
            self._have.discard(client)

    def is_signed(self, client: int, reply: Reply) -> bool:
        """False if a reply's spend statement is signed with another key than was admitted."""
        if not self.keys or not reply.statement:
            return True
        return read_statement(reply.statement).public_key == self.keys[client]

    def _seen(self, clients: list[int]) -> set[int]:
        """Nodes that the grid sees; those that it saw before are waited for, once, for a while.

        After a restart of the SuperLink nodes need a heartbeat to be seen again.
        """
        wanted = {self.nodes[client] for client in clients}
        give_up = time.monotonic() + min(_PATIENCE_SECONDS, self.seconds / 2)
        while True:
            seen = set(self.grid.get_node_ids())
            self.away = self.away - seen
            missing = wanted - seen - self.away
            if not missing or time.monotonic() > give_up:
                self.away = self.away | missing
                return seen
            time.sleep(_POLL_SECONDS)

    def _contents(self, request: Request) -> tuple[RecordDict, RecordDict]:
        """The request for nodes that lack the frozen tensors, and for those that have them."""
        short = request.to_records()
        return (replace(request, frozen=self.frozen).to_records() if self.frozen else short), short
