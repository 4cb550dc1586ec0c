"""Status of a federation: its nodes, its runs, refusals, and the remaining budgets."""

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
        client: Its index in the latest run; None if it does not take part in it.
        status: online, offline, registered (never connected) or unknown (to this SuperLink).
        last_seen: When it last connected or disconnected, from the SuperLink.
        epsilon_spent: Spend in the latest run, from the node's statement; None without a statement.
        epsilon_left: Rest of the latest run's budget; None without a statement.
        reason: Why it was left out of the aggregate, the last time this happened in the latest run.
        lifetime_epsilon: Epsilon of its whole ledger, over all runs, as last stated; infinite after a
            release without privacy; None if it never stated any.
        lifetime_delta: The delta of that epsilon.
        out: Since when and why it is excluded, until it is readmitted; empty if it is not.
        readmissions: Number of its readmissions.
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
        rounds: Number of requested rounds.
        completed: Updates in the last round's aggregate.
        cohort: Nodes asked in the last round.
        refused: Refusals over all rounds.
        failed: Failures over all rounds.
        late: Late or absent nodes over all rounds.
        epsilon: Epsilon of the network so far; infinite without privacy, None before the first round.
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
    """Combines the data on the server's disk with those of the SuperLink.

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
    found = [path.parent for path in (server / RUNS).glob(f"*/{layout.CONFIG_JSON}")]
    return sorted(found, key=lambda path: (path / layout.CONFIG_JSON).stat().st_mtime, reverse=True)


@dataclass(frozen=True)
class _Read:
    """The contents of a run's directory, read once for one answer."""

    directory: RunDirectory
    config: Config
    records: list[RoundRecord]


@dataclass(frozen=True)
class _Left:
    """A run's budgets and clients by ledger key, and the last reasons why clients were left out."""

    budgets: dict[str, tuple[float, float]]
    reasons: dict[int, str]
    clients: dict[str, int]

    @classmethod
    def of(cls, run: _Read) -> _Left:
        """Reads one run: of each node only the last statement."""
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
    """Reads a run's directory; None if it is damaged."""
    try:
        directory, config = RunDirectory.open(path)
        return _Read(directory, config, directory.records())
    except FedslmError:
        return None


def _node(node: Admitted, known: dict[int, SeenNode], left: _Left) -> NodeStatus:
    """One node's status, with its statement and refusals in the latest run."""
    seen = known.get(node.node_id, SeenNode(node.node_id, "unknown", ""))
    spent, rest = left.budgets.get(node.ledger_key, (None, None))
    client = left.clients.get(node.ledger_key)
    reason = "" if client is None else left.reasons.get(client, "")
    return NodeStatus(node.name, client, seen.status, seen.last_seen, spent, rest, reason)


def _with_standing(node: NodeStatus, standing: Standing) -> NodeStatus:
    """Adds the server's record of a node's ledger over all runs."""
    return replace(
        node,
        lifetime_epsilon=standing.epsilon if standing.charges else None,
        lifetime_delta=standing.delta if standing.charges else None,
        out=f"since {standing.since}: {standing.out}" if standing.out else "",
        readmissions=len(standing.readmissions),
    )


def _run(run: _Read) -> RunStatus:
    """One run's status."""
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
    """State of a run; error.txt is from its latest attempt, since each attempt first removes it."""
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
