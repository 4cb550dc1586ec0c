"""Trust in a real federation: signed requests, accepted replies, excluded nodes; one object per run.

A simulation does not use it: its clients are the server's own processes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from flwr.app import Message, RecordDict

from fedslm import layout
from fedslm.errors import FederationError, FedslmError, LedgerError
from fedslm.federation.roster import Registered, revoked_keys
from fedslm.federation.spends import SPENDS, STANDING, Spends
from fedslm.federation.standings import Standing, as_values
from fedslm.privacy.keys import private_key, read_public_key
from fedslm.privacy.statement import read_statement
from fedslm.protocol.envelopes import RequestHeader, content_sha256, enclosed, is_answer
from fedslm.protocol.messages import proofs_of
from fedslm.storage import write_text

logger = logging.getLogger(__name__)
REVOKED = "the node was revoked"


@dataclass
class Trust:
    """Signs a run's requests and checks its replies against the admitted nodes.

    Attributes:
        roster: Client index to node.
        listed: The server's list of nodes; its directory contains the operator's key and the register.
        directory: The run's directory: gets a copy of its nodes' standings, for the audit.
    """

    roster: Mapping[int, Registered]
    listed: Path
    directory: Path
    _asked: dict[int, tuple[str, tuple[tuple[int, str], ...]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            self._key = private_key(self.listed.parent / layout.OPERATOR_KEY)
            self._public = {
                client: read_public_key(node.ledger_key) for client, node in self.roster.items()
            }
        except LedgerError as error:
            raise FederationError(
                f"{error}; `fedslm provision init` makes the operator's key"
            ) from error
        self.spends = Spends(self.listed.parent / SPENDS)
        self.spends.refresh()

    def active(self) -> list[int]:
        """Node ids of the nodes that are neither revoked nor excluded."""
        shut_out = self.shut_out(list(self.roster))
        return [node.node_id for client, node in self.roster.items() if client not in shut_out]

    def needed(self, min_clients: int | None) -> int:
        """Number of nodes that the run waits for before it begins, or resumes after a restart.

        Args:
            min_clients: Minimum from the config; None: all active nodes.

        Raises:
            FederationError: Fewer nodes are active, or none is.
        """
        active, least = len(self.active()), min_clients or 1
        if active < least:
            raise FederationError(
                f"{active} of the run's {len(self.roster)} nodes are neither revoked nor excluded; "
                f"federation.min_clients={least} is the least: see `fedslm server status`"
            )
        return min_clients or active

    def shut_out(self, clients: list[int]) -> dict[int, str]:
        """The clients that are not asked now, with reasons; reads both files again."""
        self.spends.refresh()
        revoked = revoked_keys(self.listed, dict(self.roster))
        found = {}
        for client in clients:
            node = self.roster[client]
            standing = self.spends.standing(node.ledger_key)
            if node.ledger_key in revoked:
                found[client] = REVOKED
            elif standing.out:
                found[client] = (
                    f"excluded since {standing.since}: {standing.out}; `fedslm provision readmit "
                    f"{node.name} --reason …` readmits it"
                )
        return found

    def signed(self, contents: Mapping[int, RecordDict], asked: RequestHeader) -> dict[int, RecordDict]:
        """Adds each client's own signed envelope to its content.

        Args:
            contents: Client index to content; contents that are one object are hashed once.
            asked: The header that is signed for all of them.
        """
        hashes = {id(content): content_sha256(content) for content in contents.values()}
        found = {}
        for client, content in contents.items():
            key = self.roster[client].ledger_key
            seen = self.spends.standing(key).seen
            envelope = asked.envelope(key, client, hashes[id(content)], seen)
            found[client], name = enclosed(content, envelope, self._key)
            self._asked[client] = (name, seen)
        return found

    def is_proven(self, client: int, reply: Message) -> bool:
        """Whether the admitted node signed a reply as the answer to the last request.

        Flower's own errors (a disconnected node) have no content and no author; they count as failed
        regardless of their origin.
        """
        if reply.has_error():
            return True
        asked = self._asked.get(client)
        return asked is not None and is_answer(reply.content, asked[0], self._public[client])

    def problem_of(self, client: int, reply: Message) -> str | None:
        """Checks a proven reply's statement against everything that was seen of its ledger.

        This check comes before all others of the reply: what was spent counts, whatever happens to the
        update.

        Returns:
            Why the node is excluded from now on; None if no check failed.
        """
        node = self.roster[client]
        if reply.has_error() or (values := reply.content.config_records.get("reply")) is None:
            return None
        if values.get("status") == "rolled-back":
            self.spends.put_out(node.ledger_key, "it says that its ledger was rolled back")
            return None
        try:
            statement = read_statement(str(values.get("statement", "")))
            extension = proofs_of(values.get("extension"))
        except FedslmError:
            return None  # there is no statement, or the reply is refused for it
        if statement.public_key != node.ledger_key:
            return "the spend statement is not signed with the ledger key that was admitted"
        problem = self.spends.believe(statement, self._asked[client][1], extension)
        if problem is None:
            return None
        logger.error("%s is out: %s", node.name, problem)
        return f"the node is excluded: {problem}; `fedslm provision readmit {node.name} --reason …`"

    def save(self) -> None:
        """Writes what was learned, and the run's copy; synced on return, so the round may count.

        Raises:
            RunError: It cannot be written.
        """
        self.spends.save()
        write_text(
            self.directory / STANDING, json.dumps(self._standings(), indent=2, allow_nan=False) + "\n"
        )

    def _standings(self) -> dict[str, object]:
        """Name to standing, for the nodes of this run."""
        found: dict[str, object] = {}
        for node in self.roster.values():
            standing: Standing = self.spends.standing(node.ledger_key)
            found[node.name] = {"ledger_key": node.ledger_key, "standing": as_values(standing)}
        return found
