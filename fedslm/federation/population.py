"""Who is there, who is asked, and who answers: the population on any Flower ``Grid``."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

import fedslm
from fedslm.config import FederationConfig
from fedslm.errors import FederationError
from fedslm.federation.wire import HELLO
from fedslm.privacy.statement import Statement
from fedslm.rng import stream

_POLL_SECONDS, _LONGEST_POLL_SECONDS = 0.05, 1.0


def choose_cohort(config: FederationConfig, seed: int, round: int) -> list[int]:
    """The clients of a round: a function of seed and round, so that a resumed run needs no replay."""
    population = config.num_clients
    size = config.clients_per_round or population
    generator = stream(seed, "cohort", round)
    return sorted(int(index) for index in generator.choice(population, size, replace=False))


def join(grid: Grid, num_clients: int, seconds: float) -> dict[int, int]:
    """Waits for the exact population and asks who is who.

    Returns:
        Client index to node id.

    Raises:
        FederationError: Nodes are missing, answer nothing, or run another version.
    """
    deadline = time.monotonic() + seconds
    while len(found := list(grid.get_node_ids())) < num_clients:
        if time.monotonic() > deadline:
            raise FederationError(
                f"{len(found)} of federation.num_clients={num_clients} nodes joined within "
                f"federation.join_deadline_seconds={seconds:g}"
            )
        time.sleep(_POLL_SECONDS)
    if len(found) > num_clients:
        raise FederationError(
            f"{len(found)} nodes are there, more than federation.num_clients={num_clients}"
        )
    question = RecordDict({"hello": ConfigRecord({"version": fedslm.__version__})})
    messages = [Message(question, node, HELLO, ttl=seconds, group_id="hello") for node in found]
    nodes: dict[int, int] = {}
    for node, identifier in zip(found, list(grid.push_messages(messages)), strict=True):
        reply = pull(grid, identifier, deadline + seconds)
        if reply is None or reply.has_error():
            reason = "no answer" if reply is None else reply.error.reason
            raise FederationError(f"node {node} cannot take part: {reason}")
        values = dict(reply.content.config_records.get("hello", {}))
        version, client = values.get("version"), values.get("client")
        if version != fedslm.__version__ or not isinstance(client, int):
            raise FederationError(
                f"node {node} runs fedslm {version!s} as client {client!s}, the server "
                f"{fedslm.__version__}"
            )
        if client in nodes:
            raise FederationError(f"nodes {nodes[client]} and {node} both say that they are {client}")
        nodes[client] = node
    if sorted(nodes) != list(range(num_clients)):
        raise FederationError(
            f"federation.num_clients={num_clients}, but the nodes are clients {sorted(nodes)}"
        )
    return nodes


@dataclass(frozen=True)
class Registered:
    """An admitted node, as `fedslm provision admit` wrote it down.

    Attributes:
        name: Its name.
        node_id: Its number at the grid.
        ledger_key: The public key that signs its ledger, hexadecimal.
    """

    name: str
    node_id: int
    ledger_key: str


def registered(path: Path, num_clients: int) -> dict[int, Registered]:
    """Which admitted node is which client.

    What a node says of itself plays no part: its key names it.

    Returns:
        Client index to node, in the order of the indices.

    Raises:
        FederationError: The file cannot be read, or there are not exactly ``num_clients`` nodes.
    """
    try:
        nodes = json.loads(path.read_text(encoding="utf-8"))["nodes"]
        found = {
            int(node["client"]): Registered(
                str(node["name"]), int(node["node_id"]), str(node["ledger_key"])
            )
            for node in nodes
            if not node["revoked"]
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FederationError(f"{path} is no list of admitted nodes: {error}") from error
    if sorted(found) != list(range(num_clients)):
        raise FederationError(
            f"federation.num_clients={num_clients}, but the admitted nodes are clients "
            f"{sorted(found)}: set it to their number, or admit more; see `fedslm provision list`"
        )
    return dict(sorted(found.items()))


def check_keys(nodes: Mapping[int, Registered], statements: Mapping[int, Statement]) -> None:
    """Refuses to continue a run in which a client has become another node.

    Raises:
        FederationError: An index is another node's than when the run began.
    """
    for client, statement in statements.items():
        if statement.public_key != nodes[client].ledger_key:
            raise FederationError(
                f"client {client} of this run was another node than {nodes[client].name!r}: a run does "
                f"not go on with another node in its place; start a new one"
            )


def gather(grid: Grid, nodes: dict[int, int], needed: int, seconds: float) -> frozenset[int]:
    """Waits until so many of the admitted nodes are there.

    Returns:
        The node ids of those that are not.

    Raises:
        FederationError: They are not, within the time.
    """
    deadline = time.monotonic() + seconds
    while len(found := set(grid.get_node_ids()) & set(nodes.values())) < needed:
        if time.monotonic() > deadline:
            raise FederationError(
                f"{len(found)} of the {needed} nodes that the first round waits for came within "
                f"federation.join_deadline_seconds={seconds:g}"
            )
        time.sleep(_POLL_SECONDS)
    return frozenset(nodes.values()) - found


def pull(grid: Grid, identifier: str, deadline: float) -> Message | None:
    """Waits for one reply; None when the deadline has passed.

    The longer it waits, the more seldom it asks: every question costs the grid, and so the nodes, time.
    """
    began = time.monotonic()
    while True:
        for reply in grid.pull_messages([identifier]):
            return reply
        if time.monotonic() > deadline:
            forget = getattr(grid, "forget", None)
            if forget is not None:
                forget([identifier])
            return None
        waited = time.monotonic() - began
        time.sleep(min(_LONGEST_POLL_SECONDS, max(_POLL_SECONDS, waited / 10)))
