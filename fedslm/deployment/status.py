"""How a federation is: its nodes, its runs, what was refused, and the budget that is left."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedslm.config import Config
from fedslm.deployment.control import SeenNode
from fedslm.deployment.enrolment import Admitted, admitted_nodes
from fedslm.errors import FedslmError
from fedslm.federation.checkpoint import ERROR, RunDirectory
from fedslm.privacy import accounting
from fedslm.privacy.statement import Statement
from fedslm.records import RoundRecord

RUNS = "runs"
_OF_CLIENT = re.compile(r"client (\d+): (.*)", re.DOTALL)


@dataclass(frozen=True)
class NodeStatus:
    """One admitted node.

    Attributes:
        name: Its name.
        client: Its index in the population.
        status: online, offline, registered (never came) or unknown (to this SuperLink).
        last_seen: When it came or went last, as the SuperLink wrote it.
        epsilon_spent: Of the latest run, by what the node signed; None if it signed nothing.
        epsilon_left: Of the latest run's budget; None if it signed nothing.
        reason: Why it was not in the aggregate, the last time that it was not in the latest run.
    """

    name: str
    client: int
    status: str
    last_seen: str
    epsilon_spent: float | None = None
    epsilon_left: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class RunStatus:
    """One run.

    Attributes:
        name: Name of its directory.
        state: finished, ended early (too few replies), running, failed, or interrupted (for --resume).
        round: Last finished round.
        rounds: Rounds asked for.
        completed: Updates in the last round's aggregate.
        cohort: Nodes asked in the last round.
        refused: Refusals over all rounds.
        failed: Failures over all rounds.
        late: Late or absent nodes over all rounds.
        epsilon: Of the network so far; None without privacy.
    """

    name: str
    state: str
    round: int
    rounds: int
    completed: int
    cohort: int
    refused: int
    failed: int
    late: int
    epsilon: float | None


@dataclass(frozen=True)
class FederationStatus:
    """A server's nodes and runs, the latest run first."""

    nodes: tuple[NodeStatus, ...]
    runs: tuple[RunStatus, ...]


def status_of(server: Path, seen: Sequence[SeenNode]) -> FederationStatus:
    """Reads what is on the server's disk beside what the SuperLink says.

    Args:
        server: The server's directory.
        seen: The nodes that the SuperLink knows.

    Raises:
        RunError: The list of nodes cannot be read.
    """
    directories = run_directories(server)
    known = {node.node_id: node for node in seen}
    begun = [path for path in directories if (path / "rounds.jsonl").exists()]
    latest = _opened(begun[0]) if begun else None
    nodes = [_node(node, known, latest) for node in admitted_nodes(server) if not node.revoked]
    runs = [_run(path) for path in directories]
    return FederationStatus(tuple(nodes), tuple(run for run in runs if run is not None))


def run_directories(server: Path) -> list[Path]:
    """Directories of a server's runs, the latest first."""
    found = [path.parent for path in (server / RUNS).glob("*/config.json")]
    return sorted(found, key=lambda path: (path / "config.json").stat().st_mtime, reverse=True)


def _opened(path: Path) -> tuple[RunDirectory, Config] | None:
    """A run's directory; None if it is damaged."""
    try:
        return RunDirectory.open(path)
    except FedslmError:
        return None


def _node(
    node: Admitted, known: dict[int, SeenNode], latest: tuple[RunDirectory, Config] | None
) -> NodeStatus:
    """One node, with what it signed and was refused for in the latest run."""
    seen = known.get(node.node_id, SeenNode(node.node_id, "unknown", ""))
    found = NodeStatus(node.name, node.client, seen.status, seen.last_seen)
    if latest is None:
        return found
    directory, config = latest
    try:
        signed = [each for _, each in directory.statements() if each.public_key == node.ledger_key]
        reason = _reason(directory.records(), node.client)
    except FedslmError:
        return found
    spent, left = _budget(config, signed)
    return NodeStatus(node.name, node.client, seen.status, seen.last_seen, spent, left, reason)


def _budget(config: Config, statements: list[Statement]) -> tuple[float | None, float | None]:
    """Epsilon spent and left of a run, by a node's last statement."""
    privacy = config.privacy
    if not statements or privacy.delta is None or privacy.epsilon is None:
        return None, None
    spent = accounting.epsilon(statements[-1].events, privacy.delta)
    return spent, max(0.0, privacy.epsilon - spent)


def _reason(records: list[RoundRecord], client: int) -> str:
    """Why a client was left out, the last time."""
    for record in reversed(records):
        for text in record.reasons:
            found = _OF_CLIENT.fullmatch(text)
            if found is not None and int(found[1]) == client:
                return f"round {record.round}: {found[2]}"
    return ""


def _run(path: Path) -> RunStatus | None:
    """One run; None if it is damaged."""
    opened = _opened(path)
    if opened is None:
        return None
    directory, config = opened
    try:
        records = directory.records()
    except FedslmError:
        return None
    last = records[-1] if records else None
    return RunStatus(
        name=path.name,
        state=_state(directory),
        round=last.round if last else 0,
        rounds=config.federation.rounds,
        completed=last.completed if last else 0,
        cohort=last.cohort if last else 0,
        refused=sum(record.refused for record in records),
        failed=sum(record.failed for record in records),
        late=sum(record.late for record in records),
        epsilon=last.epsilon if last else None,
    )


def _state(directory: RunDirectory) -> str:
    """What a run does."""
    try:
        report = json.loads((directory.path / "report.json").read_text(encoding="utf-8"))
        return "ended early" if report.get("stopped") else "finished"
    except (OSError, ValueError, AttributeError):
        pass
    try:
        with directory.locked():
            return "failed" if (directory.path / ERROR).exists() else "interrupted"
    except FedslmError:
        return "running"
