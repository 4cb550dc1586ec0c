"""What the server's operator is told, from files of a real run."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.tiny import PRIVATE

from fedslm import layout, simulation
from fedslm.config import Config
from fedslm.deployment.admission import NODES
from fedslm.deployment.control import SeenNode
from fedslm.deployment.metrics import NodeCounts, node_figures
from fedslm.deployment.status import status_of
from fedslm.errors import RunError
from fedslm.federation.checkpoint import RunDirectory
from fedslm.federation.roster import roster_of
from fedslm.federation.spends import SPENDS, Spends
from fedslm.flower import _told
from fedslm.privacy import accounting
from fedslm.privacy.keys import PUBLIC_KEY, public_hex, read_public_key, signing_key
from fedslm.privacy.ledger import Ledger
from fedslm.privacy.limits import Limits
from fedslm.privacy.lines import ADAPTER, Unprotected

EVENTS_TWICE = 2


@pytest.fixture(scope="module")
def server(config_in: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A server's directory with a list of three nodes and one finished run."""
    root = tmp_path_factory.mktemp("server")
    config = config_in(root / "runs" / "first", privacy=PRIVATE, federation={"rounds": EVENTS_TWICE})
    simulation.simulate(config.resolved())
    fields = {"node_key": "k", "admitted_at": "now", "revoked": False}
    keys = [read_public_key(root / f"runs/first/nodes/client-0000{i}" / PUBLIC_KEY) for i in range(3)]
    nodes = [
        {"name": f"n{i}", "node_id": 70 + i, "ledger_key": public_hex(key), **fields}
        for i, key in enumerate(keys)
    ]
    nodes.append({**nodes[0], "name": "gone", "revoked": True})
    (root / NODES).write_text(json.dumps({"nodes": nodes}))
    roster_of(root / "runs" / "first", root / NODES, names=(), num_clients=3)
    return root


def test_nodes_and_what_they_have_left(server: Path) -> None:
    """Every admitted node is listed; what is left is the run's budget less what the node signed for."""
    status = status_of(server, [SeenNode(71, "online", "today")])
    assert [(node.name, node.status) for node in status.nodes] == [
        ("n0", "unknown"),
        ("n1", "online"),
        ("n2", "unknown"),
    ]
    directory, config = RunDirectory.open(server / "runs" / "first")
    for node in status.nodes:
        statement = [each for client, each in directory.statements() if client == node.client][-1]
        spent = accounting.epsilon(statement.events, config.privacy.delta or 0)
        assert node.epsilon_spent == pytest.approx(spent)
        assert node.epsilon_left == pytest.approx(PRIVATE["epsilon"] - spent)


def test_a_node_in_anothers_place_has_spent_nothing(server: Path, tmp_path: Path) -> None:
    """What a node signed is its own, whatever its index: a new node with a freed index owes nothing."""
    shutil.copytree(server, tmp_path / "s")
    path = tmp_path / "s" / NODES
    nodes = json.loads(path.read_text())["nodes"]
    nodes[1]["ledger_key"] = "f" * 64
    path.write_text(json.dumps({"nodes": nodes}))
    spent = [node.epsilon_spent for node in status_of(tmp_path / "s", []).nodes]
    assert spent[1] is None
    assert None not in (spent[0], spent[2])


def test_runs_by_their_state(server: Path, tmp_path: Path) -> None:
    """A run with a report is finished; without one it is interrupted, or running while it is locked."""
    shutil.copytree(server, tmp_path / "s")
    run = tmp_path / "s" / "runs" / "first"
    (found,) = status_of(tmp_path / "s", []).runs
    assert (found.state, found.round, found.rounds, found.completed) == ("finished", 2, 2, 3)
    (run / "report.json").unlink()
    assert status_of(tmp_path / "s", []).runs[0].state == "interrupted"
    with RunDirectory.open(run)[0].locked():
        assert status_of(tmp_path / "s", []).runs[0].state == "running"


def test_a_run_in_which_nobody_took_part_has_failed(server: Path, tmp_path: Path) -> None:
    """A run that stopped early ended early if somebody took part in it; else it failed."""
    shutil.copytree(server, tmp_path / "s")
    run = tmp_path / "s" / "runs" / "first"
    (run / "report.json").write_text(json.dumps({"stopped": "too few"}))
    assert status_of(tmp_path / "s", []).runs[0].state == "ended early"
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    text = "".join(json.dumps({**line, "completed": 0, "kept": True}) + "\n" for line in lines)
    (run / "rounds.jsonl").write_text(text)
    assert status_of(tmp_path / "s", []).runs[0].state == "failed"


def test_an_old_error_names_no_state(server: Path, tmp_path: Path) -> None:
    """A run that failed, was continued and killed is interrupted: each attempt removes the last one's error."""
    shutil.copytree(server, tmp_path / "s")
    run, _ = RunDirectory.open(tmp_path / "s" / "runs" / "first")
    (run.path / "report.json").unlink()
    with pytest.raises(RunError), _told(run):
        raise RunError("boom")
    assert "boom" in (run.path / layout.ERROR).read_text()
    assert status_of(tmp_path / "s", []).runs[0].state == "failed"
    with pytest.raises(KeyboardInterrupt), _told(run):
        raise KeyboardInterrupt
    assert status_of(tmp_path / "s", []).runs[0].state == "interrupted"


def test_status_reads_last_statements_alone(server: Path, tmp_path: Path) -> None:
    """What every node has left is said without the file of all statements: it may be large, or damaged."""
    shutil.copytree(server, tmp_path / "s")
    (tmp_path / "s" / "runs" / "first" / "statements.jsonl").write_text("damaged\n")
    assert status_of(tmp_path / "s", []).nodes == status_of(server, []).nodes
    assert None not in [node.epsilon_left for node in status_of(tmp_path / "s", []).nodes]


def test_the_last_reason_of_a_node(server: Path, tmp_path: Path) -> None:
    """A node's reason is the last one that names it, and a damaged run breaks nothing."""
    shutil.copytree(server, tmp_path / "s")
    path = tmp_path / "s" / "runs" / "first" / "rounds.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["reasons"] = ["client 1: refused by the node's policy: epsilon", "client 2: late"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    reasons = [node.reason for node in status_of(tmp_path / "s", []).nodes]
    assert reasons == ["", "round 1: refused by the node's policy: epsilon", "round 1: late"]
    path.write_text("{}\n")
    assert [node.reason for node in status_of(tmp_path / "s", []).nodes] == ["", "", ""]


def test_a_reason_that_names_the_node(server: Path, tmp_path: Path) -> None:
    """A line that begins with a name belongs to the client beside it, whatever the name looks like."""
    shutil.copytree(server, tmp_path / "s")
    path = tmp_path / "s" / "runs" / "first" / "rounds.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0] |= {"reasons": ["client 1: late", "n1: error 2: gone"], "left_out": [2, 1]}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    reasons = [node.reason for node in status_of(tmp_path / "s", []).nodes]
    assert reasons == ["", "round 1: error 2: gone", "round 1: late"]


def test_without_a_list_of_nodes_that_can_be_read(tmp_path: Path) -> None:
    """A damaged list of nodes is said to be so."""
    (tmp_path / NODES).write_text("[]")
    with pytest.raises(RunError, match="not a list of nodes"):
        status_of(tmp_path, [])


def test_a_nodes_own_figures(server: Path, tmp_path: Path) -> None:
    """A node's figures are its ledger's and its policy's: charges, epsilon spent and left over all runs."""
    node = tmp_path / "node"
    shutil.copytree(server / "runs" / "first" / "nodes" / "client-00000", node)
    (node / "policy.toml").write_text(
        'unit = "record"\nepsilon = 20.0\ndelta = 1e-5\nmin_noise_multiplier = 0.1\n'
        'max_steps_per_round = 9\nmax_rounds_per_day = 9\nbase_models = ["any"]\ntasks = ["any"]\n'
    )
    figures = {
        each.name: each.samples[0].value for each in node_figures(node, NodeCounts()) if each.samples
    }
    spent = status_of(server, []).nodes[0].epsilon_spent
    assert figures["fedslm_node_rounds_charged"] == EVENTS_TWICE
    assert figures["fedslm_node_epsilon_spent"] == pytest.approx(spent)
    assert figures["fedslm_node_epsilon_left"] == pytest.approx(20.0 - (spent or 0))


def test_after_a_release_without_privacy_figures_are_infinite(server: Path, tmp_path: Path) -> None:
    """The node's gauge, and the server's of its lifetime; JSON says the word, and nothing is left."""
    node = tmp_path / "node"
    shutil.copytree(server / "runs" / "first" / "nodes" / "client-00000", node)
    (node / "policy.toml").write_text(
        'unit = "none"\nepsilon = 20.0\ndelta = 1e-5\nmin_noise_multiplier = 0.1\n'
        'max_steps_per_round = 9\nmax_rounds_per_day = 9\nbase_models = ["any"]\ntasks = ["any"]\n'
    )
    ledger = Ledger(node / "ledger.jsonl", signing_key(node))
    ledger.release_unprotected(Unprotected("open", 1, ADAPTER, "release"), Limits((8.0, 1e-5)))
    figures = {
        each.name: each.samples[0].value for each in node_figures(node, NodeCounts()) if each.samples
    }
    assert figures["fedslm_node_epsilon_spent"] == math.inf
    assert figures["fedslm_node_epsilon_left"] == 0.0
    assert figures["fedslm_node_unprotected_releases"] == 1.0
    shutil.copytree(server, tmp_path / "s")
    spends = Spends(tmp_path / "s" / SPENDS)
    assert spends.believe(ledger.statement("open", 1, "release"), (), []) is None
    spends.save()
    status = status_of(tmp_path / "s", [])
    assert status.nodes[0].lifetime_epsilon == math.inf
    text = json.dumps(status.as_json())
    assert json.loads(text, parse_constant=pytest.fail)["nodes"][0]["lifetime_epsilon"] == "infinite"
    (run, *_) = status.runs
    plain = replace(status, runs=(replace(run, epsilon=math.inf),))
    assert json.loads(json.dumps(plain.as_json()))["runs"][0]["epsilon"] == "infinite"
