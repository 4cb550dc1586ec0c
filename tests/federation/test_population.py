"""Which admitted node is which client, and that a run keeps its nodes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import PRIVATE

from fedslm import simulation
from fedslm.config import Config
from fedslm.errors import FederationError
from fedslm.federation.checkpoint import RunDirectory
from fedslm.federation.exchange import Exchange
from fedslm.federation.local_grid import LocalGrid
from fedslm.federation.population import Registered, check_keys, registered
from fedslm.federation.wire import Reply
from fedslm.federation.workers import InlinePool
from fedslm.progress import Silent


def listed(path: Path, **changes: Any) -> Path:
    """A list of two nodes and one that was revoked."""
    node = {"name": "a", "client": 0, "node_id": 5, "ledger_key": "00", "revoked": False, **changes}
    nodes = [
        {**node, "name": "b", "client": 1, "node_id": 6, "revoked": False},
        node,
        {**node, "name": "gone", "node_id": 7, "revoked": True},
    ]
    path.write_text(json.dumps({"nodes": nodes}))
    return path


def test_admitted_nodes_by_index(tmp_path: Path) -> None:
    """In the order of the indices, without the revoked."""
    found = registered(listed(tmp_path / "nodes.json"), 2)
    assert found == {0: Registered("a", 5, "00"), 1: Registered("b", 6, "00")}
    assert list(found) == [0, 1]


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_nodes(tmp_path: Path, count: int) -> None:
    """A run is over exactly the admitted nodes, and the error says how to make it so."""
    with pytest.raises(FederationError, match=r"clients \[0, 1\]: set it to their number"):
        registered(listed(tmp_path / "nodes.json"), count)


@pytest.mark.parametrize("changes", [{"client": "x"}, {"node_id": None}])
def test_a_damaged_list(tmp_path: Path, changes: dict[str, Any]) -> None:
    """A list that cannot be read is no list."""
    with pytest.raises(FederationError, match="no list of admitted nodes"):
        registered(listed(tmp_path / "nodes.json", **changes), 2)


def test_statements_are_the_admitted_nodes_own(make_config: Callable[..., Config]) -> None:
    """A statement by another key than was admitted is not believed, and ends a run that is continued."""
    config = make_config(privacy=PRIVATE, federation={"rounds": 1})
    simulation.simulate(config.resolved(), Silent())
    directory, _ = RunDirectory.open(Path(str(config.run.directory)))
    statements = dict(directory.statements())
    keys = {client: statement.public_key for client, statement in statements.items()}
    nodes = {client: Registered(f"n{client}", client, key) for client, key in keys.items()}
    check_keys(nodes, statements)
    with pytest.raises(FederationError, match="client 1 of this run was another node than 'new'"):
        check_keys({**nodes, 1: Registered("new", 9, "f" * 64)}, statements)
    exchange = Exchange(LocalGrid(3, InlinePool()), {}, 1.0, keys={**keys, 1: "f" * 64})
    replies = {c: Reply("ok", 1, statement=each.to_json()) for c, each in statements.items()}
    assert [exchange.is_signed(client, replies[client]) for client in range(3)] == [True, False, True]
    assert Exchange(LocalGrid(3, InlinePool()), {}, 1.0).is_signed(1, replies[1])
