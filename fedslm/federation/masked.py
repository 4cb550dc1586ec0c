"""Rounds in which the server learns nothing but the sum of the clients' parts: secure aggregation.

Four short legs surround the one in which clients train (:mod:`fedslm.secagg`). A round has one attempt:
if it comes to nothing, or the server stops during it, the clients have paid for it, and the run goes on
with the next round.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from flwr.app import Message

from fedslm import layout
from fedslm.errors import FederationError, Refused
from fedslm.federation.exchange import Exchange
from fedslm.federation.roster import Registered
from fedslm.privacy.encoding import Words
from fedslm.privacy.keys import public_hex, signing_key
from fedslm.privacy.plan import PrivatePlan
from fedslm.privacy.shares import NoiseShares
from fedslm.protocol.bounds import cut
from fedslm.protocol.legs import SECAGG, Leg
from fedslm.protocol.messages import Reply, Request
from fedslm.records import AdapterState
from fedslm.secagg.cohort import Cohort
from fedslm.secagg.kept import INPUT, KEYS, SHARES, SURVIVORS, UNMASK
from fedslm.secagg.membership import begin_simulation, roster_at
from fedslm.secagg.roster import Roster
from fedslm.secagg.server import Outcome, Server
from fedslm.storage import read_text, write_text

logger = logging.getLogger(__name__)
_ATTEMPT = 1
_MOST_BEGUN_BYTES = 32
_UNLISTED = "the node is not on the signed roster any more"


@dataclass(frozen=True)
class Members:
    """Whom the authority admitted.

    Attributes:
        roster: The verified list.
        text: The list as signed: each client gets it.
        numbers: Client of the run to its number on the list; without those that are not on it any more.
    """

    roster: Roster
    text: str
    numbers: Mapping[int, int]


def simulated_members(nodes: Path, num_clients: int) -> Members:
    """All clients of a simulation, on a roster that is signed now.

    Args:
        nodes: The directory above those of the simulated nodes.
        num_clients: Size of the population.

    Raises:
        RunError: A file cannot be written.
        LedgerError: A client's ledger key cannot be made or read.
    """
    keys = {
        client: public_hex(signing_key(nodes / layout.simulated(client)).public_key())
        for client in range(num_clients)
    }
    roster = begin_simulation(nodes, keys)
    return Members(roster, "", {client: client for client in keys})


def admitted_members(server: Path, nodes: Mapping[int, Registered]) -> Members:
    """The real nodes of a run, on the roster that `fedslm provision roster` signed.

    Args:
        server: The server's directory.
        nodes: Client of the run to node.

    Raises:
        FederationError: There is no roster, or it lacks all nodes of the run, or is not this
            federation's.
    """
    path = server / layout.SIGNED_ROSTER
    try:
        roster = roster_at(server)
        listed = {member.ledger_key: member.client for member in roster.members}
        numbers = {
            client: listed[node.ledger_key]
            for client, node in nodes.items()
            if node.ledger_key in listed
        }
        if not numbers:
            raise FederationError("it lists no node of this run")
        return Members(roster, path.read_text(encoding="utf-8"), numbers)
    except (FederationError, Refused, OSError) as error:
        raise FederationError(
            f"{path}: {error}; run `fedslm provision roster --server {server}` where the authority's "
            f"key is, and put the file there"
        ) from error


class Begun:
    """The last round that was begun: one that the server did not finish is not begun again.

    Args:
        directory: The run's directory.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / layout.BEGUN

    def has(self, round: int) -> bool:
        """Whether a round was begun.

        Raises:
            FederationError: The file cannot be read.
        """
        try:
            return self._path.exists() and int(read_text(self._path, _MOST_BEGUN_BYTES)) >= round
        except (OSError, ValueError) as error:
            raise FederationError(
                f"{self._path} cannot be read: {error}; write the number of the last round that was "
                f"begun into it"
            ) from error

    def note(self, round: int) -> None:
        """Notes that a round begins; it is on disk on return.

        Raises:
            RunError: It cannot be written.
        """
        write_text(self._path, str(round))


class MaskedSum:
    """One round's sum, over the clients that answer.

    Call :meth:`opened`, then :meth:`add` for each client that trained, then :meth:`close`; then
    :meth:`total` has the sum.

    Args:
        exchange: Sends the legs.
        members: Whom the authority admitted.
        request: The round's training request.
        cohort: The clients of the round.
        num_values: Length of a part.
    """

    def __init__(
        self,
        exchange: Exchange,
        members: Members,
        request: Request,
        *,
        cohort: list[int],
        num_values: int,
    ) -> None:
        self._exchange, self._members = exchange, members
        self._clients = [client for client in cohort if client in members.numbers]
        self._unlisted = [client for client in cohort if client not in members.numbers]
        self._request = replace(request, adapter=AdapterState({}), control=AdapterState({}))
        self._num_values = num_values
        self._server: Server | None = None
        self._outcome: Outcome | None = None
        self._problem = "no client was asked for its part"
        self.legs: dict[int, Leg] = {}
        self.count = 0
        self.remarks: list[tuple[int, str]] = []

    def opened(self) -> Iterator[tuple[int, str]]:
        """Runs the legs before training; yields each client that is not asked to train, and why.

        ``legs`` then has what the others are asked.
        """
        left_out: dict[int, str] = {}
        yield from ((client, _UNLISTED) for client in self._unlisted)
        try:
            self._open(left_out)
        except FederationError as error:
            self._problem = str(error)
            self.legs = {}
        for client in self._clients:
            if client not in self.legs:
                yield client, left_out.get(client, self._problem)

    def add(self, client: int, words: Words, head: bytes) -> None:
        """Adds the masked part of one client.

        Raises:
            FederationError: It does not fit; the client drops out.
        """
        if self._server is None:
            raise FederationError("internal check failed: the round was not opened")
        self._server.add_input(self._members.numbers[client], head, words)
        self.count += 1

    def close(self) -> None:
        """Runs the legs after training, and removes the masks; what goes wrong is in ``remarks``."""
        if not self.legs:
            return
        try:
            self._close()
        except FederationError as error:
            self._problem = str(error)

    def total(self, threshold: int) -> Words:
        """Returns the sum.

        Raises:
            FederationError: It could not be formed, or is over fewer clients than ``threshold``.
        """
        if self._outcome is None:
            raise FederationError(self._problem)
        if len(self._outcome.survivors) < threshold:
            raise FederationError(f"the sum is over fewer than {threshold} clients")
        return self._outcome.sum

    def _open(self, left_out: dict[int, str]) -> None:
        """The legs of keys and shares."""
        server = self._server = Server(self._cohort(), self._members.roster)
        first = Leg(KEYS, server.keys_request(), self._members.text)
        self._ask(dict.fromkeys(self._clients, first), server.add_keys, left_out)
        answered = [client for client in self._clients if client not in left_out]
        second = Leg(SHARES, server.shares_request())
        self._ask(dict.fromkeys(answered, second), server.add_shares, left_out)
        bodies = server.input_requests()
        self.legs = {
            client: Leg(INPUT, bodies[self._members.numbers[client]])
            for client in answered
            if client not in left_out
        }

    def _close(self) -> None:
        """The legs of survivors and unmasking."""
        server, failed = self._server, dict[int, str]()
        if server is None:
            raise FederationError("internal check failed: the round was not opened")
        fourth = Leg(SURVIVORS, server.survivors_request())
        survivors = [each for each in self.legs if self._members.numbers[each] in server.survivors]
        self._ask(dict.fromkeys(survivors, fourth), server.add_signature, failed)
        self.remarks += failed.items()
        signed = [client for client in survivors if client not in failed]
        fifth, failed = Leg(UNMASK, server.unmask_request()), {}
        self._ask(dict.fromkeys(signed, fifth), server.add_unmask, failed)
        self.remarks += failed.items()
        self._outcome = server.finish()
        clients = {number: client for client, number in self._members.numbers.items()}
        for misfit in self._outcome.misfits:
            owner, holder = clients[misfit.owner], clients[misfit.holder]
            reason = f"its share at client {holder} does not fit; the sum is right nevertheless"
            self.remarks.append((owner, reason))

    def _cohort(self) -> Cohort:
        """Whom the round asks."""
        shares, numbers = _shares(self._request), self._members.numbers
        return Cohort(
            run=self._request.setup.run_id,
            round=self._request.round,
            attempt=_ATTEMPT,
            clients=tuple(sorted(numbers[client] for client in self._clients)),
            threshold=shares.threshold,
            num_colluding=shares.max_colluding,
            num_values=self._num_values,
            roster_sha256=self._members.roster.sha256,
            plan_sha256=self._request.setup.plan_sha256,
        )

    def _ask(
        self, legs: Mapping[int, Leg], add: Callable[[int, bytes], None], left_out: dict[int, str]
    ) -> None:
        """Asks one leg of several clients; a client whose answer cannot be used drops out."""
        for client, message in self._exchange.replies(self._request, sorted(legs), SECAGG, legs):
            problem = "late" if message is None else message
            if isinstance(problem, Message):
                problem = self._problem_of(client, problem, add)
            if problem:
                left_out[client] = problem
                logger.warning("client %d drops out of the sum: %s", client, problem)

    def _problem_of(self, client: int, message: Message, add: Callable[[int, bytes], None]) -> str:
        """Takes one answer; returns why it cannot be used, or nothing."""
        if message.has_error():
            return cut(f"error {message.error.code}: {message.error.reason}")
        try:
            reply = Reply.from_records(message.content, shapes={})
            if reply.status != "ok":
                return reply.reason or reply.status
            if reply.round != self._request.round or reply.delta is not None or reply.words is not None:
                return "the reply is for another request"
            add(self._members.numbers[client], reply.body)
        except FederationError as error:
            return cut(error)
        return ""


def _shares(request: Request) -> NoiseShares:
    """How the clients of a request share the noise."""
    plan = request.setup.plan
    if not isinstance(plan, PrivatePlan) or plan.shares is None:
        raise FederationError("internal check failed: the plan shares no noise")
    return plan.shares
