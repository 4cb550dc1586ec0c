"""Requests to nodes and their replies, one at a time, on any Flower ``Grid``."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedslm.errors import Unanswered
from fedslm.federation.fetch import Fetch
from fedslm.federation.population import pull
from fedslm.federation.replies import expected_shapes
from fedslm.federation.steady import Steady
from fedslm.federation.trust import Trust
from fedslm.protocol.envelopes import RequestHeader
from fedslm.protocol.inflating import Limits
from fedslm.protocol.legs import SECAGG, Leg
from fedslm.protocol.lifetime import deadline_with, lifetime_of
from fedslm.protocol.messages import Reply, Request, most_bytes
from fedslm.records import AdapterState

logger = logging.getLogger(__name__)
_PATIENCE_SECONDS, _POLL_SECONDS, _GRACE_SECONDS = 45.0, 0.2, 30.0
_MOST_TIMES_LONGER = 4
_RECORD_BYTES, _PIECE_BYTES, _RECORDS = 1 << 17, 5 << 20, 8


@dataclass
class Exchange:
    """Sends requests to the nodes of a run, for the lifetime of the server's process.

    Attributes:
        grid: The grid that connects the nodes.
        nodes: Client index to node id.
        seconds: How long one exchange may take; a reply that comes later is dropped. Nodes whose policy
            takes longer extend it (:meth:`heard`), to four times its first value at most.
        frozen: Tensors that a node may not have yet: sent until it has answered once; empty in a
            simulation, whose clients read them from the run directory.
        trust: Signs requests, and decides which replies and nodes are trusted; None in a simulation.
        away: Nodes that are not waited for until they are connected to the grid again.
        leg_seconds: As ``seconds``, for an exchange in which no client trains.
        bytes_down: Bytes of tensors sent so far.
    """

    grid: Grid
    nodes: Mapping[int, int]
    seconds: float
    frozen: AdapterState = field(default_factory=lambda: AdapterState({}))
    trust: Trust | None = None
    away: frozenset[int] = frozenset()
    bytes_down: int = 0
    leg_seconds: float = 60.0

    def __post_init__(self) -> None:
        self._have: set[int] = set()
        self._most_seconds = _MOST_TIMES_LONGER * self.seconds
        self._steady = Steady(self.grid)

    def replies(
        self, request: Request, clients: list[int], kind: str, legs: Mapping[int, Leg] | None = None
    ) -> Iterator[tuple[int, Message | str | None]]:
        """Yields each reply in the order of the clients.

        With ``legs`` each client gets its own leg of secure aggregation with the request.

        None stands for a late reply or an absent node; a text is the reason why a node was not asked,
        or why its reply is not trusted. A fixed order makes the sum reproducible; earlier replies wait
        at the grid. Nodes that are not connected to the grid are not asked: the others would have to
        wait for them. If the SuperLink does not answer until the deadline, all replies are late.
        """
        asked = Asked(request, kind, self._seconds(kind), legs)
        deadline = time.monotonic() + asked.seconds
        shut_out = {} if self.trust is None else self.trust.shut_out(clients)
        try:
            wanted = [client for client in clients if client not in shut_out]
            sent = self._sent(asked, wanted, deadline)
        except Unanswered as error:
            logger.warning("the round continues without its nodes: %s", error)
            sent = {}
        identifiers = {client: identifier for identifier, (client, _) in sent.items()}
        messages = {each: message for each, (_, message) in sent.items()}
        take = self._taker(messages, deadline, _limits(request, clients))
        for client in clients:
            identifier = identifiers.get(client)
            reply = None if identifier is None else take(identifier)
            if reply is None:
                yield client, shut_out.get(client)
            elif self.trust is not None and not self.trust.is_proven(client, reply):
                yield client, "the reply is not signed for this request with the admitted ledger key"
            else:
                problem = None if self.trust is None else self.trust.problem_of(client, reply)
                yield client, problem or reply

    def _seconds(self, kind: str) -> float:
        """How long an exchange of this type may take."""
        return self.leg_seconds if kind == SECAGG else self.seconds

    def _sent(self, what: Asked, clients: list[int], deadline: float) -> dict[str, tuple[int, Message]]:
        """Sends the request to the connected nodes; returns each message id with client and message."""
        seen = self._seen(clients, deadline)
        asked = [client for client in clients if self.nodes[client] in seen]
        messages = self._messages(what, asked)
        if not messages:
            return {}
        try:
            pushed = self._steady.call(lambda grid: list(grid.push_messages(messages)), deadline)
        except Unanswered as error:  # some messages may have arrived: their replies count
            logger.warning("not all requests were sent: %s", error)
            pushed = [message.metadata.message_id for message in messages]
        taken = zip(pushed, asked, messages, strict=True)
        return {each: (client, message) for each, client, message in taken if each}

    def _taker(
        self, sent: Mapping[str, Message], deadline: float, limits: Limits
    ) -> Callable[[str], Message | None]:
        """A function that fetches the reply to a message; it returns None if the reply is late."""
        if self._steady.is_remote:
            return Fetch(self._steady, sent, deadline, limits).reply
        return lambda identifier: pull(self.grid, identifier, deadline)

    def save(self) -> None:
        """Saves what was learned of the nodes' spending; it is on disk on return.

        Raises:
            RunError: It cannot be written.
        """
        if self.trust is not None:
            self.trust.save()

    def heard(self, client: int, answer: Reply | str) -> None:
        """Records whether a node has the frozen tensors, and how much time it takes."""
        if not isinstance(answer, Reply):
            return
        if answer.status == "ok":
            self._have.add(client)
        elif answer.status == "needs-frozen":
            self._have.discard(client)
        elif answer.answer_after_seconds is not None:
            self._extend(client, answer.answer_after_seconds)

    def _extend(self, client: int, period: float) -> None:
        """Extends the next exchanges for a node that answers after ``period`` seconds.

        The limit keeps a hostile node from delaying every round by as much as it likes.
        """
        needed = deadline_with(period)
        if needed > self._most_seconds:
            logger.warning(
                "client %d answers after %g s and needs federation.round_deadline_seconds of at least "
                "%g; a run extends it to %g at most",
                client,
                period,
                needed,
                self._most_seconds,
            )
        elif needed > self.seconds:
            text = "client %d answers after %g s: the deadline of the next rounds is %g s, not %g s"
            logger.warning(text, client, period, needed, self.seconds)
            self.seconds = needed

    def _messages(self, what: Asked, asked: list[int]) -> list[Message]:
        """One message for each client that is asked; signed in a real federation."""
        request, kind, ttl = what.request, what.kind, lifetime_of(what.seconds)
        own: dict[int, RecordDict] = {}
        made: dict[tuple[bool, Leg | None], RecordDict] = {}  # equal requests are packed once
        for client in asked:
            lacking = kind != SECAGG and client not in self._have
            its_own = what.of(client, self.frozen if lacking else None)
            self.bytes_down += its_own.num_bytes
            key = (lacking, its_own.leg)
            if key not in made:
                made[key] = its_own.to_records()
            own[client] = made[key]
        if self.trust is not None:
            seconds = what.seconds + _GRACE_SECONDS  # after that, training would be wasted
            grid_run = self.grid.run.run_id
            asked_for = RequestHeader(request.setup.run_id, grid_run, request.round, kind, seconds)
            own = self.trust.signed(own, asked_for)
        return [
            Message(own[client], self.nodes[client], kind, ttl=ttl, group_id=str(request.round))
            for client in asked
        ]

    def _seen(self, clients: list[int], deadline: float = math.inf) -> set[int]:
        """Nodes that are connected to the grid; waits once, for a while, for those that were before.

        After a restart of the SuperLink each node must send a heartbeat to count as connected again.

        Raises:
            Unanswered: The grid does not answer until the deadline.
        """
        wanted = {self.nodes[client] for client in clients}
        give_up = None
        while True:
            seen = self._steady.call(lambda grid: set(grid.get_node_ids()), deadline)
            give_up = give_up or time.monotonic() + min(_PATIENCE_SECONDS, self.seconds / 2)
            self.away = self.away - seen
            missing = wanted - seen - self.away
            if not missing or time.monotonic() > give_up:
                self.away = self.away | missing
                return seen
            time.sleep(_POLL_SECONDS)


@dataclass(frozen=True)
class Asked:
    """What one exchange asks: a request, its message type and time limit, and each client's leg."""

    request: Request
    kind: str
    seconds: float
    legs: Mapping[int, Leg] | None

    def of(self, client: int, frozen: AdapterState | None) -> Request:
        """The request for one client, with the frozen tensors if it lacks them."""
        request = self.request if not frozen else replace(self.request, frozen=frozen)
        return request if self.legs is None else replace(request, leg=self.legs[client])


def _limits(request: Request, clients: list[int]) -> Limits:
    """Limits on a reply: the size of its records and of the requested tensors."""
    most = max(
        (most_bytes(request.packing, expected_shapes(request, client)) for client in clients), default=0
    )
    return Limits(most, record_bytes=_RECORD_BYTES, most_objects=_RECORDS + -(-most // _PIECE_BYTES))
