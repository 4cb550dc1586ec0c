"""Which admitted nodes a run takes, that it keeps them, and what a revoked one is to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedslm.errors import FederationError
from fedslm.federation.roster import (
    ROSTER,
    Registered,
    chosen_nodes,
    clients_of,
    revoked_keys,
    roster_of,
)

A, B = Registered("a", 5, "0a"), Registered("b", 6, "0b")


def listed(path: Path, *revoked: str, **changes: Any) -> Path:
    """A list of three nodes, in the order a, gone, b; "gone" and those that are named were revoked."""
    nodes = [
        {"name": name, "node_id": number, "ledger_key": f"0{name}", "revoked": name in revoked}
        for name, number in (("a", 5), ("gone", 7), ("b", 6))
    ]
    nodes[1]["revoked"] = True
    nodes[0].update(changes)
    path.write_text(json.dumps({"nodes": nodes}))
    return path


def test_nodes_in_the_order_of_their_admission(tmp_path: Path) -> None:
    """Clients are 0 to n-1 whoever was revoked in between."""
    path = listed(tmp_path / "nodes.json")
    assert chosen_nodes(path, (), 2) == {0: A, 1: B}
    assert chosen_nodes(path, ("b",), 1) == {0: B}


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_nodes(tmp_path: Path, count: int) -> None:
    """The error names those that are admitted, and each remedy that it names works."""
    path = listed(tmp_path / "nodes.json")
    with pytest.raises(FederationError, match=r"2 nodes would take part \(a, b\)") as error:
        chosen_nodes(path, (), count)
    assert "--set federation.num_clients=2" in str(error.value)
    assert len(chosen_nodes(path, (), 2)) == 2
    with pytest.raises(FederationError, match="'gone' is not admitted; admitted: a, b"):
        chosen_nodes(path, ("gone",), 1)


@pytest.mark.parametrize("changes", [{"ledger_key": None, "node_id": "x"}, {"node_id": None}])
def test_a_damaged_list(tmp_path: Path, changes: dict[str, Any]) -> None:
    """A list that cannot be read is no list."""
    with pytest.raises(FederationError, match="not a list of admitted nodes"):
        chosen_nodes(listed(tmp_path / "nodes.json", **changes), (), 2)


def test_a_run_keeps_its_nodes(tmp_path: Path) -> None:
    """Revoked, replaced and admitted nodes change nothing of a run that has begun."""
    run = tmp_path / "run"
    run.mkdir()
    path = listed(tmp_path / "nodes.json")
    began = roster_of(run, path, names=(), num_clients=2)
    assert began == {0: A, 1: B}
    listed(path, "a")
    assert roster_of(run, path, names=(), num_clients=2) == began
    assert revoked_keys(path, began) == {"0a"}
    assert clients_of(run) == {"0a": 0, "0b": 1}
    assert clients_of(tmp_path) == {}


def test_a_node_with_another_key_is_not_the_one_that_was_named(tmp_path: Path) -> None:
    """Whoever is admitted under a revoked node's name, or number, does not take its place in a run."""
    path = listed(tmp_path / "nodes.json")
    began = chosen_nodes(path, (), 2)
    listed(path, ledger_key="ff")
    assert revoked_keys(path, began) == {"0a"}


@pytest.mark.parametrize("content", ["", "[]", '{"0": {}}', '{"x": {"name": "a"}}', "\x00"])
def test_a_damaged_roster(tmp_path: Path, content: str) -> None:
    """A run whose roster cannot be read does not guess its nodes."""
    (tmp_path / ROSTER).write_text(content)
    with pytest.raises(FederationError, match="start a new run"):
        roster_of(tmp_path, listed(tmp_path / "nodes.json"), names=(), num_clients=2)
