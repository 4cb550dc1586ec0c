"""The nodes of one run: fixed when it begins and unchanged until it ends, even if one is revoked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedslm.errors import FederationError
from fedslm.protocol.bounds import cut
from fedslm.storage import read_text, write_text

ROSTER = "roster.json"
_MOST_LIST_BYTES = 64 << 20


@dataclass(frozen=True)
class Registered:
    """An admitted node, as recorded by `fedslm provision admit`.

    Attributes:
        name: Its name.
        node_id: Its number at the SuperLink.
        ledger_key: The public key that signs its ledger and its replies, hexadecimal.
    """

    name: str
    node_id: int
    ledger_key: str


def roster_of(
    directory: Path, listed: Path, *, names: Sequence[str], num_clients: int
) -> dict[int, Registered]:
    """The nodes of a run: those that it began with or, for a new run, those admitted now.

    Nothing that a node claims about itself is used: its key identifies it.

    Args:
        directory: The run's directory; the roster is written there once.
        listed: The server's list of nodes.
        names: Nodes that take part; empty: all that are admitted.
        num_clients: Number of clients from the config.

    Returns:
        Client index (position in the list of nodes) to node.

    Raises:
        FederationError: A file cannot be read, a node is not admitted, or there are not exactly
            ``num_clients`` of them.
    """
    path = directory / ROSTER
    if path.exists():
        return _read(path)
    chosen = chosen_nodes(listed, names, num_clients)
    values = {client: asdict(node) for client, node in chosen.items()}
    write_text(path, json.dumps(values, indent=2) + "\n")
    return chosen


def chosen_nodes(listed: Path, names: Sequence[str], num_clients: int) -> dict[int, Registered]:
    """The nodes for a new run, in the order in which they were admitted.

    Raises:
        FederationError: As for :func:`roster_of`.
    """
    admitted = [node for node in _listed(listed) if not node["revoked"]]
    there = {str(node["name"]): _registered(node) for node in admitted}
    missing = [name for name in names if name not in there]
    if missing:
        raise FederationError(
            f"federation.nodes: {missing[0]!r} is not admitted; admitted: {', '.join(there) or 'none'}"
        )
    chosen = [node for name, node in there.items() if not names or name in names]
    if len(chosen) != num_clients:
        raise FederationError(
            f"federation.num_clients={num_clients}, but {len(chosen)} nodes would take part "
            f"({', '.join(node.name for node in chosen) or 'none'}): --set "
            f"federation.num_clients={len(chosen)}, name those that take part (federation.nodes), or "
            f"admit more"
        )
    return dict(enumerate(chosen))


def revoked_keys(listed: Path, roster: dict[int, Registered]) -> frozenset[str]:
    """Ledger keys of a run's nodes that are no longer admitted.

    Raises:
        FederationError: The list cannot be read.
    """
    admitted = {_registered(node) for node in _listed(listed) if not node["revoked"]}
    return frozenset(node.ledger_key for node in roster.values() if node not in admitted)


def clients_of(directory: Path) -> dict[str, int]:
    """Ledger key to client index of a run's nodes; empty for a simulation.

    Raises:
        FederationError: The roster cannot be read.
    """
    path = directory / ROSTER
    return {node.ledger_key: client for client, node in _read(path).items()} if path.exists() else {}


def _read(path: Path) -> dict[int, Registered]:
    """Reads the roster that a run began with."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return {int(client): Registered(**node) for client, node in values.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise FederationError(f"{path} cannot be read: {error}; start a new run") from error


def _registered(node: dict[str, Any]) -> Registered:
    """Reads one node of the list."""
    return Registered(str(node["name"]), int(node["node_id"]), str(node["ledger_key"]))


def _listed(path: Path) -> list[dict[str, Any]]:
    """Reads the server's list of nodes."""
    try:
        nodes: list[dict[str, Any]] = json.loads(read_text(path, _MOST_LIST_BYTES))["nodes"]
        for node in nodes:
            _registered(node)
            node["revoked"] = bool(node["revoked"])
        return nodes
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise FederationError(f"{path} is not a list of admitted nodes: {cut(error)}") from error
