"""Who is there, who is asked, and who answers: the population on any Flower ``Grid``."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

import fedslm
from fedslm.config import FederationConfig
from fedslm.errors import FederationError
from fedslm.federation.wire import HELLO
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


def registered(path: Path, num_clients: int) -> dict[int, int]:
    """Which admitted node is which client, as `fedslm provision admit` wrote it down.

    What a node says of itself plays no part: its key names it.

    Returns:
        Client index to node id.

    Raises:
        FederationError: The file cannot be read, or there are not exactly ``num_clients`` nodes.
    """
    nodes = [node for node in _listed(path) if not node["revoked"]]
    found = {int(node["client"]): int(node["node_id"]) for node in nodes}
    if sorted(found) != list(range(num_clients)):
        raise FederationError(
            f"federation.num_clients={num_clients}, but the admitted nodes are clients "
            f"{sorted(found)}: set it to their number, or admit more; see `fedslm provision list`"
        )
    return found


def names_of(path: Path) -> tuple[str, ...]:
    """Names of the admitted nodes, by client index.

    Raises:
        FederationError: The file cannot be read.
    """
    nodes = [node for node in _listed(path) if not node["revoked"]]
    return tuple(str(node["name"]) for node in sorted(nodes, key=lambda node: int(node["client"])))


def _listed(path: Path) -> list[dict[str, Any]]:
    """The nodes of a list."""
    try:
        nodes: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["nodes"]
        for node in nodes:
            int(node["client"]), int(node["node_id"]), str(node["name"]), bool(node["revoked"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FederationError(f"{path} is no list of admitted nodes: {error}") from error
    return nodes


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
