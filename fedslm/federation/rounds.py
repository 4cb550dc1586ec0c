"""The round loop, written like the paper's algorithm, on any Flower ``Grid``."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from flwr.serverapp import Grid

import fedslm
from fedslm.aggregation.server import Aggregation, ServerState
from fedslm.aggregation.summed import Summing
from fedslm.config import Config
from fedslm.data.poison import hostile_clients
from fedslm.data.store import client_names
from fedslm.errors import ModelError, plural
from fedslm.federation import public_model
from fedslm.federation.attacks import attacked
from fedslm.federation.checkpoint import Checkpoint, RunDirectory
from fedslm.federation.combining import combining, finished, finite, take
from fedslm.federation.evaluations import Evaluations
from fedslm.federation.exchange import Exchange
from fedslm.federation.observers import Observer
from fedslm.federation.participation import came_to_nothing
from fedslm.federation.population import choose_cohort, choose_measured, gather, join
from fedslm.federation.replies import checked, continued, expected_shapes
from fedslm.federation.roster import Registered, roster_of
from fedslm.federation.tally import Tally
from fedslm.federation.trust import Trust
from fedslm.privacy import accounting
from fedslm.privacy.plan import PrivatePlan, RunPlan
from fedslm.privacy.statement import Statement
from fedslm.protocol.messages import MEASURE, TRAIN, Reply, Request
from fedslm.protocol.metrics import ClientMetrics, read_metrics
from fedslm.protocol.setup import Setup
from fedslm.recipes import expected
from fedslm.records import AdapterState
from fedslm.storage import load_adapter, save_adapter
from fedslm.workers import Pool

logger = logging.getLogger(__name__)
Follow = Callable[[int, Setup, AdapterState, frozenset[str]], AdapterState | None]


@dataclass(frozen=True)
class Outcome:
    """The result of a run.

    Attributes:
        setup: The setup that clients received.
        frozen: Tensors that no round changed.
        checkpoint: The last state.
        dtype: Precision in which the base computed at the server.
        stopped: Why the run stopped before its last round; empty if it did not.
        measured: Client to its metrics on its held-out records; empty if no client was asked.
    """

    setup: Setup
    frozen: AdapterState
    checkpoint: Checkpoint
    dtype: str
    stopped: str
    measured: Mapping[int, ClientMetrics] = field(default_factory=dict)

    @property
    def adapter(self) -> AdapterState:
        """The whole adapter."""
        return self.frozen.merged(self.checkpoint.server.moving)


@dataclass(frozen=True)
class RunConstants:
    """The constants of a run.

    Attributes:
        setup: The setup that clients receive.
        frozen: Tensors that no round changes at the server.
        aggregation: The aggregation method.
        names: Display names of the clients, by index.
        dtype: Precision in which the base computes at the server.
        summing: How a step is made of a sum, if clients share the noise; else None.
    """

    setup: Setup
    frozen: AdapterState
    aggregation: Aggregation
    names: Mapping[int, str]
    dtype: str
    summing: Summing | None = None


@dataclass(frozen=True)
class Federation:
    """Everything that the round loop works with.

    Attributes:
        config: The resolved config.
        grid: The grid that connects the clients.
        pool: The workers, or this process, in which the server's own model work runs.
        directory: The directory in which the run is recorded.
        observers: Observers of the run's progress.
        follow: Receives each round's whole adapter (with its number and the keys that rounds change)
            before it is evaluated and stored, and may return another; it may use only public data.
    """

    config: Config
    grid: Grid
    pool: Pool
    directory: RunDirectory
    observers: Sequence[Observer] = ()
    follow: Follow | None = None

    def run(self, plan: RunPlan, labels: tuple[str, ...]) -> Outcome:
        """Runs all remaining rounds.

        Args:
            plan: The calibrated plan.
            labels: Class names, which are public.

        Returns:
            The adapter and the run's result.

        Raises:
            FederationError: The population was never complete.
            ModelError: The loss of the base is not finite before the first round.
            RunError: A checkpoint could not be written; the previous one stays valid.
        """
        run, state = self._begin(plan, labels)
        exchange, federation = self._exchange(run), self.config.federation
        for observer in self.observers:
            observer.on_start(self.config, state)
        stopped, evaluations = "", Evaluations(federation, self.directory.records())
        while state.round < federation.rounds:
            if exchange.trust is not None:
                exchange.trust.needed(federation.min_clients)
            state = self._round(run, state, exchange, evaluations)
            if state.failed_in_row >= federation.max_failed_rounds:
                stopped = f"{plural(state.failed_in_row, 'round')} in a row moved nothing"
                break
        state = self._evaluated_at_end(run, state)
        stopped = "; ".join(filter(None, [stopped, came_to_nothing(self.directory.records())]))
        measured = self._measured(run, state, exchange)
        return Outcome(run.setup, run.frozen, state, run.dtype, stopped, measured)

    def _exchange(self, run: RunConstants) -> Exchange:
        """Waits for the population: exactly the simulated clients, or enough of the admitted nodes."""
        federation, listed = self.config.federation, self.config.engine.nodes
        wait, deadline = federation.join_deadline_seconds, federation.round_deadline_seconds
        if listed is None:
            return Exchange(self.grid, join(self.grid, federation.num_clients, wait), deadline)
        roster = self._roster()
        trust = Trust(roster, Path(listed), self.directory.path)
        nodes = {client: node.node_id for client, node in roster.items()}
        there = gather(self.grid, trust.active(), trust.needed(federation.min_clients), wait)
        away = frozenset(nodes.values()) - there
        return Exchange(self.grid, nodes, deadline, run.frozen, trust, away)

    def _measured(
        self, run: RunConstants, state: Checkpoint, exchange: Exchange
    ) -> dict[int, ClientMetrics]:
        """What clients measure on their held-out records after the last round, if they may send it."""
        config = self.config
        personalised = config.personalization.method != "none"
        if config.data.validation_fraction == 0 or not (personalised or config.privacy.unit == "none"):
            return {}
        server = state.server
        number = config.federation.rounds + 1
        request = Request(run.setup, number, server.moving, server.turn, server.control)
        measured = {}
        asked = sorted(exchange.nodes)  # each may keep an adapter of its own
        if not personalised:
            asked = choose_measured(asked, config.run.seed)
        for client, reply in exchange.replies(request, asked, MEASURE):
            found = (
                "late" if reply is None else reply if isinstance(reply, str) else read_metrics(reply)
            )
            if isinstance(found, ClientMetrics):
                measured[client] = found
            elif found is not None:
                logger.warning("client %d could not be measured: %r", client, found)
        return measured

    def _begin(self, plan: RunPlan, labels: tuple[str, ...]) -> tuple[RunConstants, Checkpoint]:
        """Creates or loads the initial state."""
        config = self.config
        setup = _setup(config, plan, labels, self.directory)
        description = self.pool.call(public_model.describe, setup)
        if description.warning:
            logger.warning("%s", description.warning)
        state = self.directory.load()
        if state is None:
            save_adapter(self.directory.frozen, description.frozen)
        frozen = load_adapter(self.directory.frozen)
        setup = replace(setup, base_sha256=description.base_sha256, frozen_sha256=frozen.sha256())
        aggregation = Aggregation(
            setup.aggregation,
            config.lora,
            config.federation.num_clients,
            fixed_denominator=config.privacy.unit != "none",
            fresh=description.moving,
            local_reach=plan.steps_per_round * config.training.learning_rate,
        )
        if state is None:
            metrics = public_model.evaluate(self.pool, setup, frozen.merged(description.moving))
            _check_base(config, metrics)
            outlook = expected(config, description.moving.num_parameters)
            if outlook is not None and not outlook.learns:
                logger.warning("%s", outlook.text)
            self._say_what_is_cut(setup)
            control = AdapterState({})
            if config.training.drift == "scaffold":
                control = description.moving.minus(description.moving)
            server = ServerState(description.moving, control=control)
            state = Checkpoint(0, server, metrics, metrics)
            self.directory.save(state)
        summing = None
        if isinstance(plan, PrivatePlan) and plan.shares is not None:
            summing = Summing(plan, config.training.learning_rate)
        names, dtype = self._names(), description.dtype
        return RunConstants(setup, frozen, aggregation, names, dtype, summing), state

    def _names(self) -> dict[int, str]:
        """Display names of the clients: those of admitted nodes, or those from the data."""
        if self.config.engine.nodes is None:
            return dict(enumerate(client_names(self.directory.data)))
        return {client: node.name for client, node in self._roster().items()}

    def _roster(self) -> dict[int, Registered]:
        """The real nodes of the run."""
        federation, listed = self.config.federation, Path(str(self.config.engine.nodes))
        return roster_of(
            self.directory.path, listed, names=federation.nodes, num_clients=federation.num_clients
        )

    def _say_what_is_cut(self, setup: Setup) -> None:
        """Warns about long public records: the private ones are likely to be as long."""
        cut, records = self.pool.call(public_model.truncated, setup)
        if cut:
            text = (
                "%d of %d public records are longer than task.max_length=%d (or the target) and are cut"
            )
            logger.warning(text, cut, records, setup.task.max_length)

    def _round(
        self, run: RunConstants, state: Checkpoint, exchange: Exchange, evaluations: Evaluations
    ) -> Checkpoint:
        """Runs the next round: push, stream replies, aggregate, evaluate, record, checkpoint."""
        began, config, number = time.monotonic(), self.config, state.round + 1
        cohort = choose_cohort(config.federation, config.run.seed, number)
        server, statements = state.server, dict(state.statements)
        request = Request(run.setup, number, server.moving, server.turn, server.control)
        tally, sent_before = Tally(len(cohort), run.names), exchange.bytes_down
        waiting = self.directory.path / "updates"
        how = (run.aggregation, run.summing)
        with closing(combining(how, server, cohort, waiting)) as aggregate:
            for client, answer in self._answers(exchange, request, cohort):
                if isinstance(answer, Reply) and answer.statement:
                    answer = continued(answer, statements, client)
                tally.count(client, answer)
                take(aggregate, client, answer)
                for observer in self.observers:
                    observer.on_client(number, tally.done, len(cohort))
            exchange.save()  # spends are on disk before the round counts
            tally.bytes_down = exchange.bytes_down - sent_before
            moved = finished(aggregate, config.federation.min_replies, tally=tally)
            moved = self._followed(run, number, moved)
            signal_to_noise = finite(aggregate.signal_to_noise())
        is_due = evaluations.is_due(number, time.monotonic() - began)
        metrics, evaluated = self._evaluated(run, moved if is_due else None)
        record = tally.record(
            number,
            kept=moved is None,
            epsilon=_network_epsilon(config, statements),
            metrics=metrics,
            signal_to_noise=signal_to_noise,
            seconds=time.monotonic() - began,
            evaluation_seconds=evaluated,
        )
        evaluations.count(record)
        failed = 0 if moved is not None else state.failed_in_row + 1
        changes = {"statements": statements, "epsilons": _epsilons(config, statements)}
        state = state.after(record, server=moved or server, failed_in_row=failed, **changes)
        self.directory.save(state, record)
        for observer in self.observers:
            observer.on_round(record)
        return state

    def _evaluated(
        self, run: RunConstants, server: ServerState | None
    ) -> tuple[dict[str, float], float]:
        """Metrics on the public split, and the seconds that they took; none of nothing."""
        if server is None:
            return {}, 0.0
        began = time.monotonic()
        metrics = public_model.evaluate(self.pool, run.setup, run.frozen.merged(server.moving))
        return metrics, time.monotonic() - began

    def _evaluated_at_end(self, run: RunConstants, state: Checkpoint) -> Checkpoint:
        """The last state with its own metrics, also if the run stopped after a round without any."""
        moved = [record for record in self.directory.records() if not record.kept]
        if not moved or moved[-1].metrics:
            return state
        state = replace(state, metrics=self._evaluated(run, state.server)[0])
        self.directory.save(state)
        return state

    def _followed(
        self, run: RunConstants, number: int, moved: ServerState | None
    ) -> ServerState | None:
        """The state after a round, possibly replaced by ``follow``."""
        if moved is None or self.follow is None:
            return moved
        keys = frozenset(moved.moving)
        given = self.follow(number, run.setup, run.frozen.merged(moved.moving), keys)
        return moved if given is None else replace(moved, moving=given.select(keys))

    def _answers(
        self, exchange: Exchange, request: Request, cohort: list[int]
    ) -> Iterator[tuple[int, Reply | str]]:
        """Asks a cohort and yields each reply, or the reason why there is none."""
        attack, population = self.config.attack, self.config.federation.num_clients
        hostile = hostile_clients(attack, population, self.config.run.seed)
        for client, reply in exchange.replies(request, cohort, TRAIN):
            if reply is None or isinstance(reply, str):
                answer: Reply | str = "late" if reply is None else reply
            else:
                if client in hostile:
                    reply = attacked(reply, request, attack, expected_shapes(request, client))
                answer = checked(reply, request, client)
            exchange.heard(client, answer)
            yield client, answer


def _setup(config: Config, plan: RunPlan, labels: tuple[str, ...], directory: RunDirectory) -> Setup:
    """The setup that clients receive in every round."""
    resolved = config.resolved()
    return Setup(
        run_id=directory.run_id,
        seed=config.run.seed,
        directory=str(directory.path),
        version=fedslm.__version__,
        model=resolved.model,
        lora=resolved.lora,
        data=config.data,
        task=config.task,
        training=config.training,
        aggregation=resolved.aggregation,
        compression=config.compression,
        personalization=config.personalization,
        labels=labels,
        plan=plan,
        config_sha256=config.sha256(),
    )


def _network_epsilon(config: Config, statements: dict[int, Statement]) -> float:
    """Epsilon of the network so far, from the clients' statements; infinite without privacy."""
    privacy = config.privacy
    if privacy.unit == "none" or privacy.delta is None:
        return math.inf
    clients = [statement.events for statement in statements.values()]
    return accounting.network_epsilon(clients, privacy.delta, overlapping=privacy.overlapping)


def _epsilons(config: Config, statements: dict[int, Statement]) -> dict[int, float]:
    """Epsilon of each client so far, from its statement; empty without privacy."""
    privacy = config.privacy
    if privacy.unit == "none" or privacy.delta is None:
        return {}
    return {k: accounting.epsilon(v.events, privacy.delta) for k, v in statements.items()}


def _check_base(config: Config, metrics: Mapping[str, float]) -> None:
    """Refuses a base without finite metrics: nothing trained on it could be evaluated."""
    wrong = {name: value for name, value in metrics.items() if not math.isfinite(value)}
    if wrong:
        figures = ", ".join(f"{name}={value}" for name, value in wrong.items())
        raise ModelError(
            f"model.base={config.model.base!r} gives {figures} on the public split before the first "
            f"round; it must be finite: weights hold NaN or infinity, or overflow; give another base"
        )
