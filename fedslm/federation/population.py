"""The population on any Flower ``Grid``: which nodes are connected, asked, and answering."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

import fedslm
from fedslm.config import FederationConfig
from fedslm.errors import FederationError
from fedslm.federation.steady import Steady
from fedslm.protocol import bounds
from fedslm.protocol.messages import HELLO
from fedslm.rng import stream

_POLL_SECONDS, _LONGEST_POLL_SECONDS = 0.05, 1.0


def choose_cohort(config: FederationConfig, seed: int, round: int) -> list[int]:
    """Chooses the clients of a round: a function of seed and round, so a resume needs no replay."""
    generator = stream(seed, "cohort", round)
    chosen = generator.choice(config.num_clients, config.cohort_size, replace=False)
    return sorted(int(index) for index in chosen)


def choose_measured(nodes: Iterable[int], seed: int, most: int = 1_000) -> list[int]:
    """Chooses the clients that measure the last adapter: all, or a sample of a large population.

    >>> choose_measured([3, 1, 2], seed=0), len(choose_measured(range(100_000), seed=0))
    ([1, 2, 3], 1000)
    """
    clients = sorted(nodes)
    if len(clients) <= most:
        return clients
    chosen = stream(seed, "measure").choice(len(clients), most, replace=False)
    return sorted(clients[int(index)] for index in chosen)


def join(grid: Grid, num_clients: int, seconds: float) -> dict[int, int]:
    """Waits for the exact population and asks each node for its client index.

    A grid that runs clients in this process's own workers knows them, and none is asked.

    Returns:
        Client index to node id.

    Raises:
        FederationError: Nodes are missing, do not answer, or run another version.
    """
    known: Mapping[int, int] | None = getattr(grid, "clients", None)
    if known is not None:
        return dict(known)
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
            f"{len(found)} nodes are connected, more than federation.num_clients={num_clients}"
        )
    question = RecordDict({"hello": ConfigRecord({"version": fedslm.__version__})})
    messages = [Message(question, node, HELLO, ttl=seconds, group_id="hello") for node in found]
    nodes: dict[int, int] = {}
    for node, identifier in zip(found, list(grid.push_messages(messages)), strict=True):
        reply = pull(grid, identifier, deadline + seconds)
        if reply is None or reply.has_error():
            reason = "no answer" if reply is None else bounds.cut(reply.error.reason)
            raise FederationError(f"node {node} cannot take part: {reason}")
        values = dict(reply.content.config_records.get("hello", {}))
        bounds.exactly(values, ("version", "client"), f"the answer of node {node}")
        version, client = values["version"], values["client"]
        if type(client) is not int or version != fedslm.__version__:
            said = f"{bounds.cut(version, 40)} as client {bounds.cut(client, 40)}"
            raise FederationError(f"node {node} runs fedslm {said}, the server {fedslm.__version__}")
        if client in nodes:
            raise FederationError(f"nodes {nodes[client]} and {node} both claim to be client {client}")
        nodes[client] = node
    if sorted(nodes) != list(range(num_clients)):
        raise FederationError(
            f"federation.num_clients={num_clients}, but the nodes are clients {sorted(nodes)}"
        )
    return nodes


def gather(grid: Grid, nodes: Iterable[int], needed: int, seconds: float) -> frozenset[int]:
    """Waits until enough of these nodes are connected; returns the connected ones.

    Raises:
        FederationError: Too few connect within the time, or the SuperLink does not answer.
    """
    deadline, steady, wanted = time.monotonic() + seconds, Steady(grid), set(nodes)

    def there() -> set[int]:
        return set(steady.call(lambda each: list(each.get_node_ids()), deadline)) & wanted

    while len(found := there()) < needed:
        if time.monotonic() > deadline:
            raise FederationError(
                f"{len(found)} of the {needed} nodes that the first round waits for came within "
                f"federation.join_deadline_seconds={seconds:g}"
            )
        time.sleep(_POLL_SECONDS)
    return frozenset(found)


def pull(grid: Grid, identifier: str, deadline: float) -> Message | None:
    """Waits for one reply; None once the deadline has passed.

    The longer it waits, the less often it asks: every request costs the grid, and so the nodes, time.
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
