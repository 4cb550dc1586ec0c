"""Metrics for Prometheus, only on loopback: at the server, and at a node for its own operator.

They are read from disk at each request. Names start with ``fedslm_``.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import Message

from fedslm import layout
from fedslm.deployment.authority import SERVER, expires
from fedslm.deployment.control import connected
from fedslm.deployment.status import FederationStatus, status_of
from fedslm.errors import FedslmError, RunError
from fedslm.privacy.chain import GENESIS, Chain, read_chain
from fedslm.privacy.keys import PUBLIC_KEY, read_public_key
from fedslm.privacy.policy import read_policy
from fedslm.protocol.messages import status_of_reply

if TYPE_CHECKING:
    from prometheus_client import Metric

logger = logging.getLogger(__name__)
LOOPBACK = "127.0.0.1"
Collect = Callable[[], Iterator["Metric"]]


@dataclass
class NodeCounts:
    """Counts of a node's work since it started.

    Attributes:
        answers: Number of answers by kind (ok, refused, failed, error, not-believed).
        is_connected: Whether it is connected now.
        last_message: Unix time of the last message; 0 if there was none.
    """

    answers: Counter[str] = field(default_factory=Counter)
    is_connected: bool = False
    last_message: float = 0.0

    def count(self, reply: Message) -> None:
        """Counts one answer."""
        self.last_message = time.time()
        self.answers["error" if reply.has_error() else status_of_reply(reply.content)] += 1

    def count_unbelieved(self) -> None:
        """Counts an instruction that was not signed by the operator."""
        self.last_message = time.time()
        self.answers["not-believed"] += 1

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Marks the node as connected within the context."""
        self.is_connected = True
        try:
            yield
        finally:
            self.is_connected = False


@contextmanager
def served(port: int | None, collect: Collect) -> Iterator[None]:
    """Serves /metrics on a loopback port; does nothing if the port is None.

    Raises:
        RunError: The port is taken.
    """
    if port is None:
        yield
        return
    from prometheus_client import CollectorRegistry, start_http_server

    registry = CollectorRegistry()
    registry.register(_Collector(collect))
    try:
        server, thread = start_http_server(port, LOOPBACK, registry)
    except OSError as error:
        text = f"cannot listen on metrics_port={port}: {error.strerror}"
        raise RunError(f"{text}; stop the program that has it, or set another port") from error
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Collector:
    """Collector for prometheus_client; metrics that cannot be read are omitted, which is logged."""

    def __init__(self, collect: Collect) -> None:
        self._collect = collect

    def describe(self) -> list[Metric]:
        """Returns nothing before the first request: a server may not be running yet."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The current metrics."""
        try:
            yield from self._collect()
        except FedslmError as error:
            logger.warning("metrics are left out: %s", error)


def server_figures(directory: Path) -> Iterator[Metric]:
    """Metrics of a server: certificate, nodes, latest run.

    Raises:
        FedslmError: A file cannot be read.
    """
    end = expires(directory / SERVER).timestamp()
    yield _gauge("certificate_expiry_seconds", "Unix time at which the certificate ends", {(): end})
    with connected(directory) as control:
        status = status_of(directory, control.nodes())
    yield from of_status(status)


def of_status(status: FederationStatus) -> Iterator[Metric]:
    """Metrics from the data of `fedslm server status`; reads nothing else."""
    yield from _of_nodes(status)
    yield from _of_latest_run(status)


def node_figures(directory: Path, counts: NodeCounts) -> Iterator[Metric]:
    """Metrics of a node, for its own operator: they contain charges, and nothing of its records.

    Raises:
        FedslmError: The policy or the ledger cannot be read.
    """
    yield _gauge("node_connected", "1 if connected to the server", {(): float(counts.is_connected)})
    last = {(): counts.last_message}
    yield _gauge("node_last_message_seconds", "Unix time of the last message", last)
    answers = {(kind,): float(number) for kind, number in counts.answers.items()}
    yield _gauge("node_answers", "Answers since the start, by kind", answers, ("kind",))
    policy, path = read_policy(directory / layout.POLICY), directory / layout.LEDGER
    none = Chain((), GENESIS, torn=False)
    chain = read_chain(path, read_public_key(directory / PUBLIC_KEY)) if path.exists() else none
    spent = chain.epsilon(policy.delta)
    yield _gauge("node_rounds_charged", "Charges in the ledger", {(): float(len(chain.charges))})
    text = "Releases without privacy in the ledger: with any, epsilon is infinite"
    yield _gauge("node_unprotected_releases", text, {(): float(len(chain.unprotected))})
    yield _gauge("node_epsilon_spent", "Epsilon over all runs", {(): spent})
    yield _gauge("node_epsilon_left", "Of the policy's budget", {(): max(0.0, policy.epsilon - spent)})


def _of_nodes(status: FederationStatus) -> Iterator[Metric]:
    """Which nodes are connected, and each node's remaining budget in the latest run."""
    online = {(node.name,): float(node.status == "online") for node in status.nodes}
    yield _gauge("node_online", "1 if the SuperLink sees the node", online, ("node",))
    left = {(n.name,): n.epsilon_left for n in status.nodes if n.epsilon_left is not None}
    yield _gauge("node_run_epsilon_left", "Of the latest run's budget, as signed", left, ("node",))
    spent = {(n.name,): n.lifetime_epsilon for n in status.nodes if n.lifetime_epsilon is not None}
    yield _gauge("node_lifetime_epsilon", "Over all runs, as signed last", spent, ("node",))
    out = {(node.name,): float(bool(node.out)) for node in status.nodes}
    yield _gauge("node_out", "1 if the node is excluded until it is readmitted", out, ("node",))


def _of_latest_run(status: FederationStatus) -> Iterator[Metric]:
    """Progress of the latest run."""
    if not status.runs:
        return
    run = status.runs[0]
    label, names = (run.name,), ("run",)
    yield _gauge("run_round", "Last finished round", {label: float(run.round)}, names)
    yield _gauge("run_rounds", "Rounds asked for", {label: float(run.rounds)}, names)
    yield _gauge("run_completed", "Updates in the last round", {label: float(run.completed)}, names)
    left_out = {"refused": run.refused, "failed": run.failed, "late": run.late}
    values = {(run.name, why): float(number) for why, number in left_out.items()}
    yield _gauge("run_left_out", "Answers that were not used, over all rounds", values, ("run", "why"))
    if run.epsilon is not None:
        yield _gauge("run_epsilon", "Epsilon of the network so far", {label: run.epsilon}, names)


def _gauge(name: str, text: str, values: Mapping[Any, float], labels: tuple[str, ...] = ()) -> Metric:
    """One metric with its labels."""
    from prometheus_client.core import GaugeMetricFamily

    family = GaugeMetricFamily(f"fedslm_{name}", text, labels=labels)
    for label, value in values.items():
        family.add_metric(list(label), value)
    return family
