"""The round loop, as the paper would write it, on any Flower ``Grid``."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

import fedslm
from fedslm.aggregation.mean import WeightedMean
from fedslm.config import Config
from fedslm.errors import FederationError
from fedslm.federation import public_model
from fedslm.federation.checkpoint import Checkpoint, RunDirectory
from fedslm.federation.replies import checked, continued
from fedslm.federation.wire import HELLO, TRAIN, Reply, Request, Setup
from fedslm.federation.workers import Pool
from fedslm.privacy import accounting
from fedslm.privacy.plan import Plan
from fedslm.privacy.statement import Statement
from fedslm.records import AdapterState, ClientUpdate, RoundRecord
from fedslm.rng import stream
from fedslm.storage import load_adapter, save_adapter

logger = logging.getLogger(__name__)
_POLL_SECONDS = 0.05
_LONGEST_REASON = 300


class Observer(Protocol):
    """Is told how the run goes."""

    def on_start(self, config: Config, done: Checkpoint) -> None:
        """The run starts or goes on after ``done``."""

    def on_client(self, round: int, done: int, cohort: int) -> None:
        """One more client of the round has answered, failed or come late."""

    def on_round(self, record: RoundRecord) -> None:
        """A round is over and on disk."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        setup: What clients were told.
        frozen: Tensors that no round changed.
        checkpoint: The last state.
        stopped: Why the run stopped before its last round; empty if it did not.
    """

    setup: Setup
    frozen: AdapterState
    checkpoint: Checkpoint
    stopped: str

    @property
    def adapter(self) -> AdapterState:
        """The whole adapter."""
        return self.frozen.merged(self.checkpoint.trained)


@dataclass(frozen=True)
class Federation:
    """What the loop works with.

    Attributes:
        grid: Where clients are reached.
        pool: Where the server's own model work runs: here or in workers.
        directory: Where the run is recorded.
        observer: Is told how the run goes.
    """

    grid: Grid
    pool: Pool
    directory: RunDirectory
    observer: Observer

    def run(self, config: Config, plan: Plan, labels: tuple[str, ...]) -> Outcome:
        """Runs all rounds that are still to run.

        Args:
            config: The resolved config.
            plan: The calibrated plan.
            labels: Class names: public.

        Returns:
            The adapter and how the run ended.

        Raises:
            FederationError: The population never came together.
            RunError: A checkpoint could not be written; the previous one stays valid.
        """
        setup, frozen, state = self._begin(config, plan, labels)
        nodes = join(self.grid, config.federation.num_clients, config)
        self.observer.on_start(config, state)
        stopped = ""
        for number in range(state.round + 1, config.federation.rounds + 1):
            state = self._round(config, setup, frozen, state, nodes=nodes, number=number)
            if state.failed_in_row >= config.federation.max_failed_rounds:
                stopped = f"{state.failed_in_row} rounds in a row had too few replies"
                break
        return Outcome(setup, frozen, state, stopped)

    def _begin(
        self, config: Config, plan: Plan, labels: tuple[str, ...]
    ) -> tuple[Setup, AdapterState, Checkpoint]:
        """Makes or finds the initial state."""
        setup = _setup(config, plan, labels, self.directory)
        description = self.pool.call(public_model.describe, setup)
        state = self.directory.load()
        if state is None:
            save_adapter(self.directory.frozen, description.frozen)
        frozen = load_adapter(self.directory.frozen)
        setup = replace(setup, base_sha256=description.base_sha256, frozen_sha256=frozen.sha256())
        if state is None:
            whole = frozen.merged(description.trained)
            metrics = public_model.evaluate(self.pool, setup, whole)
            self._say_what_is_cut(setup)
            state = Checkpoint(0, description.trained, metrics, metrics)
            self.directory.save(state)
        return setup, frozen, state

    def _say_what_is_cut(self, setup: Setup) -> None:
        """Warns of long public records: the private ones are likely to be as long."""
        cut, records = self.pool.call(public_model.truncated, setup)
        if cut:
            text = (
                "%d of %d public records are longer than task.max_length=%d (or the target) and are cut"
            )
            logger.warning(text, cut, records, setup.task.max_length)

    def _round(
        self,
        config: Config,
        setup: Setup,
        frozen: AdapterState,
        state: Checkpoint,
        *,
        nodes: dict[int, int],
        number: int,
    ) -> Checkpoint:
        """One round: push, stream replies into the mean, evaluate, record, checkpoint."""
        began = time.monotonic()
        cohort = choose_cohort(config, number)
        tally = Tally(cohort=len(cohort), bytes_down=len(cohort) * state.trained.num_bytes)
        mean, statements = WeightedMean(state.trained), dict(state.statements)
        request = Request(setup, number, state.trained)
        for client, answer in self._exchange(config, request, cohort, nodes):
            if isinstance(answer, Reply) and answer.statement:
                answer = continued(answer, statements, client)
            tally.count(client, answer)
            if isinstance(answer, Reply) and answer.adapter is not None:
                mean.add(ClientUpdate(client, answer.adapter, answer.weight))
            self.observer.on_client(number, tally.done, len(cohort))
        enough = mean.count >= config.federation.min_replies and mean.result().is_finite()
        trained = mean.result() if enough else state.trained
        due = number % config.federation.evaluate_every == 0 or number == config.federation.rounds
        metrics: dict[str, float] = {}
        if not enough:
            metrics = dict(state.metrics)
        elif due:
            metrics = public_model.evaluate(self.pool, setup, frozen.merged(trained))
        record = tally.record(
            number,
            kept=not enough,
            epsilon=_network_epsilon(config, statements),
            metrics=metrics,
            signal_to_noise=_finite(mean.signal_to_noise()),
            seconds=time.monotonic() - began,
        )
        failed = 0 if enough else state.failed_in_row + 1
        state = state.after(record, trained=trained, failed_in_row=failed, statements=statements)
        self.directory.save(state, record)
        self.observer.on_round(record)
        return state

    def _exchange(
        self, config: Config, request: Request, cohort: list[int], nodes: dict[int, int]
    ) -> Iterator[tuple[int, Reply | str]]:
        """Sends a request to a cohort and yields each answer in cohort order, or why there is none.

        A fixed order makes the sum reproducible; replies that came earlier wait at the grid.
        """
        seconds = config.federation.round_deadline_seconds
        deadline = time.monotonic() + seconds
        content, group = request.to_records(), str(request.round)
        messages = [
            Message(content, nodes[client], TRAIN, ttl=seconds, group_id=group) for client in cohort
        ]
        identifiers = list(self.grid.push_messages(messages))
        for client, identifier in zip(cohort, identifiers, strict=True):
            reply = pull(self.grid, identifier, deadline)
            yield client, "late" if reply is None else checked(reply, request)


@dataclass
class Tally:
    """Counts one round's answers."""

    cohort: int
    bytes_down: int
    bytes_up: int = 0

    def __post_init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._reasons: list[str] = []
        self._scores, self._units = 0.0, 0.0

    @property
    def done(self) -> int:
        """Clients that answered, failed or came late."""
        return self._counts.total()

    def count(self, client: int, answer: Reply | str) -> None:
        """Counts one answer."""
        if isinstance(answer, Reply):
            self._counts[answer.status] += 1
            self.bytes_up += answer.adapter.num_bytes if answer.adapter is not None else 0
            reason = answer.reason
            if answer.metric is not None:
                self._scores, self._units = (
                    self._scores + answer.metric[0],
                    self._units + answer.metric[1],
                )
        else:
            self._counts["late" if answer == "late" else "failed"] += 1
            reason = answer
        if reason:
            reason = reason[:_LONGEST_REASON]
            self._reasons.append(f"client {client}: {reason}")
            logger.warning("client %d: %s", client, reason)

    def record(self, number: int, **values: Any) -> RoundRecord:
        """The round's line."""
        return RoundRecord(
            round=number,
            cohort=self.cohort,
            completed=self._counts["ok"],
            failed=self._counts["failed"],
            late=self._counts["late"],
            refused=self._counts["refused"],
            bytes_down=self.bytes_down,
            bytes_up=self.bytes_up,
            reasons=tuple(self._reasons),
            private_metric=self._scores / self._units if self._units >= 1 else None,
            **values,
        )


def choose_cohort(config: Config, round: int) -> list[int]:
    """The clients of a round: a function of seed and round, so that a resumed run needs no replay."""
    population = config.federation.num_clients
    size = config.federation.clients_per_round or population
    generator = stream(config.run.seed, "cohort", round)
    return sorted(int(index) for index in generator.choice(population, size, replace=False))


def join(grid: Grid, num_clients: int, config: Config) -> dict[int, int]:
    """Waits for the exact population and asks who is who.

    Returns:
        Client index to node id.

    Raises:
        FederationError: Nodes are missing, answer nothing, or run another version.
    """
    deadline = time.monotonic() + config.federation.join_deadline_seconds
    while len(found := list(grid.get_node_ids())) < num_clients:
        if time.monotonic() > deadline:
            raise FederationError(
                f"{len(found)} of federation.num_clients={num_clients} nodes joined within "
                f"federation.join_deadline_seconds={config.federation.join_deadline_seconds:g}"
            )
        time.sleep(_POLL_SECONDS)
    if len(found) > num_clients:
        raise FederationError(
            f"{len(found)} nodes are there, more than federation.num_clients={num_clients}"
        )
    question = RecordDict({"hello": ConfigRecord({"version": fedslm.__version__})})
    seconds = config.federation.join_deadline_seconds
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


def pull(grid: Grid, identifier: str, deadline: float) -> Message | None:
    """Waits for one reply; None when the deadline has passed."""
    while True:
        for reply in grid.pull_messages([identifier]):
            return reply
        if time.monotonic() > deadline:
            forget = getattr(grid, "forget", None)
            if forget is not None:
                forget([identifier])
            return None
        time.sleep(_POLL_SECONDS)


def _setup(config: Config, plan: Plan, labels: tuple[str, ...], directory: RunDirectory) -> Setup:
    """What clients are told in every round."""
    return Setup(
        run_id=directory.run_id,
        seed=config.run.seed,
        directory=str(directory.path),
        version=fedslm.__version__,
        model=config.model,
        lora=config.lora,
        data=config.data,
        task=config.task,
        training=config.training,
        method=config.resolved().aggregation.method,
        weights=config.aggregation.weights,
        labels=labels,
        plan=plan.to_json(),
        config_sha256=config.sha256(),
    )


def _network_epsilon(config: Config, statements: dict[int, Statement]) -> float | None:
    """Epsilon of the network so far, by what the clients stated; None without privacy."""
    privacy = config.privacy
    if privacy.unit == "none" or privacy.delta is None:
        return None
    clients = [statement.events for statement in statements.values()]
    return accounting.network_epsilon(clients, privacy.delta, overlapping=privacy.overlapping)


def _finite(value: float | None) -> float | None:
    """JSON has no infinity."""
    return value if value is not None and math.isfinite(value) else None
