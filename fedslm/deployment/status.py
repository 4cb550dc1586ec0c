"""How a federation is: its nodes, its runs, what was refused, and the budget that is left."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fedslm import layout
from fedslm.config import Config
from fedslm.deployment.admission import Admitted, admitted_nodes
from fedslm.deployment.control import SeenNode
from fedslm.errors import FedslmError
from fedslm.federation.checkpoint import RunDirectory
from fedslm.federation.participation import reasons_of
from fedslm.federation.roster import clients_of
from fedslm.federation.spends import SPENDS, read_standings
from fedslm.federation.standings import Standing
from fedslm.privacy import accounting
from fedslm.privacy.statement import Statement
from fedslm.records import RoundRecord, epsilon_as_json

RUNS = "runs"


@dataclass(frozen=True)
class NodeStatus:
    """One admitted node.

    Attributes:
        name: Its name.
        client: Its index in the latest run; None if it has no part in it.
        status: online, offline, registered (never came) or unknown (to this SuperLink).
        last_seen: When it came or went last, as the SuperLink wrote it.
        epsilon_spent: Of the latest run, by what the node signed; None if it signed nothing.
        epsilon_left: Of the latest run's budget; None if it signed nothing.
        reason: Why it was not in the aggregate, the last time that it was not in the latest run.
        lifetime_epsilon: Of its whole ledger, over all runs, as it last stated; infinite after a
            release without privacy; None if it never stated any.
        lifetime_delta: At this delta.
        out: Since when and why it is out, until it is readmitted; empty if it is not.
        readmissions: Times that it was readmitted.
    """

    name: str
    client: int | None
    status: str
    last_seen: str
    epsilon_spent: float | None = None
    epsilon_left: float | None = None
    reason: str = ""
    lifetime_epsilon: float | None = None
    lifetime_delta: float | None = None
    out: str = ""
    readmissions: int = 0


@dataclass(frozen=True)
class RunStatus:
    """One run.

    Attributes:
        name: Name of its directory.
        state: finished, ended early (too few replies), failed (an error, or no round moved the
            adapter), running, or interrupted (for --resume).
        round: Last finished round.
        rounds: Rounds asked for.
        completed: Updates in the last round's aggregate.
        cohort: Nodes asked in the last round.
        refused: Refusals over all rounds.
        failed: Failures over all rounds.
        late: Late or absent nodes over all rounds.
        epsilon: Of the network so far; infinite without privacy, None before the first round.
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

    def as_json(self) -> dict[str, object]:
        """JSON values: an infinite epsilon is the word "infinite"."""
        names = ("epsilon", "epsilon_spent", "lifetime_epsilon")

        def values(row: NodeStatus | RunStatus) -> dict[str, object]:
            found = asdict(row)
            told = {name: found[name] for name in names if found.get(name) is not None}
            return {**found, **{name: epsilon_as_json(each) for name, each in told.items()}}

        return {
            "nodes": [values(node) for node in self.nodes],
            "runs": [values(run) for run in self.runs],
        }


def status_of(server: Path, seen: Sequence[SeenNode]) -> FederationStatus:
    """Reads what is on the server's disk beside what the SuperLink says.

    Args:
        server: The server's directory.
        seen: The nodes that the SuperLink knows.

    Raises:
        RunError: The list of nodes cannot be read.
    """
    known = {node.node_id: node for node in seen}
    runs = [run for path in run_directories(server) if (run := _read(path)) is not None]
    latest = next((run for run in runs if run.records), None)
    left = _Left.of(latest) if latest is not None else _Left({}, {}, {})
    standings = read_standings(server / SPENDS)
    nodes = [
        _with_standing(_node(node, known, left), standings.get(node.ledger_key, Standing()))
        for node in admitted_nodes(server)
        if not node.revoked
    ]
    return FederationStatus(tuple(nodes), tuple(_run(run) for run in runs))


def run_directories(server: Path) -> list[Path]:
    """Directories of a server's runs, the latest first."""
    found = [path.parent for path in (server / RUNS).glob("*/config.json")]
    return sorted(found, key=lambda path: (path / layout.CONFIG_JSON).stat().st_mtime, reverse=True)


@dataclass(frozen=True)
class _Read:
    """A run's directory, read once for one answer."""

    directory: RunDirectory
    config: Config
    records: list[RoundRecord]


@dataclass(frozen=True)
class _Left:
    """A run's budgets and clients by ledger key, and why clients were left out the last time."""

    budgets: dict[str, tuple[float, float]]
    reasons: dict[int, str]
    clients: dict[str, int]

    @classmethod
    def of(cls, run: _Read) -> _Left:
        """Of one run: of each node the last statement alone is read."""
        privacy, budgets = run.config.privacy, {}
        if privacy.delta is not None and privacy.epsilon is not None:
            for statement, told in _last_statements(run.directory):
                spent = accounting.epsilon(statement.events, privacy.delta) if told is None else told
                budgets[statement.public_key] = spent, max(0.0, privacy.epsilon - spent)
        reasons = {
            client: f"round {record.round}: {reason}"
            for record in run.records
            for client, reason in reasons_of(record).items()
        }
        return cls(budgets, reasons, clients_of(run.directory.path))


def _last_statements(directory: RunDirectory) -> list[tuple[Statement, float | None]]:
    """Each node's last statement; none if the checkpoint is damaged."""
    try:
        return list(directory.last_statements().values())
    except FedslmError:
        return []


def _read(path: Path) -> _Read | None:
    """A run's directory; None if it is damaged."""
    try:
        directory, config = RunDirectory.open(path)
        return _Read(directory, config, directory.records())
    except FedslmError:
        return None


def _node(node: Admitted, known: dict[int, SeenNode], left: _Left) -> NodeStatus:
    """One node, with what it signed and was refused for in the latest run."""
    seen = known.get(node.node_id, SeenNode(node.node_id, "unknown", ""))
    spent, rest = left.budgets.get(node.ledger_key, (None, None))
    client = left.clients.get(node.ledger_key)
    reason = "" if client is None else left.reasons.get(client, "")
    return NodeStatus(node.name, client, seen.status, seen.last_seen, spent, rest, reason)


def _with_standing(node: NodeStatus, standing: Standing) -> NodeStatus:
    """Adds what the server knows of a node's ledger over all runs."""
    return replace(
        node,
        lifetime_epsilon=standing.epsilon if standing.charges else None,
        lifetime_delta=standing.delta if standing.charges else None,
        out=f"since {standing.since}: {standing.out}" if standing.out else "",
        readmissions=len(standing.readmissions),
    )


def _run(run: _Read) -> RunStatus:
    """One run."""
    records = run.records
    last = records[-1] if records else None
    return RunStatus(
        name=run.directory.path.name,
        state=_state(run),
        round=last.round if last else 0,
        rounds=run.config.federation.rounds,
        completed=last.completed if last else 0,
        cohort=last.cohort if last else 0,
        refused=sum(record.refused for record in records),
        failed=sum(record.failed for record in records),
        late=sum(record.late for record in records),
        epsilon=last.epsilon if last else None,
    )


def _state(run: _Read) -> str:
    """What a run does: error.txt is of its latest attempt, since each attempt begins by removing it."""
    directory = run.directory
    try:
        report = json.loads((directory.path / layout.REPORT).read_text(encoding="utf-8"))
        if not report.get("stopped"):
            return "finished"
        return "failed" if all(record.kept for record in run.records) else "ended early"
    except (OSError, ValueError, AttributeError):
        pass
    try:
        with directory.locked():
            return "failed" if (directory.path / layout.ERROR).exists() else "interrupted"
    except FedslmError:
        return "running"
