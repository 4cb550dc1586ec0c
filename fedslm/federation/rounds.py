"""The round loop, written like the paper's algorithm, on any Flower ``Grid``."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from flwr.serverapp import Grid

from fedslm.aggregation.server import Aggregation, ServerState
from fedslm.aggregation.summed import Summing, num_values, summed_shapes
from fedslm.config import Config
from fedslm.data.poison import hostile_clients
from fedslm.data.store import client_names
from fedslm.errors import FederationError, plural
from fedslm.federation import epsilons, public_model
from fedslm.federation.attacks import attacked
from fedslm.federation.checkpoint import Checkpoint, RunDirectory
from fedslm.federation.combining import combining, finished, finite, take
from fedslm.federation.evaluations import Evaluations
from fedslm.federation.exchange import Exchange
from fedslm.federation.masked import Begun, MaskedSum, Members, admitted_members, simulated_members
from fedslm.federation.observers import Observer
from fedslm.federation.participation import came_to_nothing
from fedslm.federation.population import choose_cohort, choose_measured, gather, join
from fedslm.federation.replies import checked, continued, expected_shapes
from fedslm.federation.roster import Registered, roster_of
from fedslm.federation.start import RunConstants, check_base, setup_of
from fedslm.federation.tally import Tally
from fedslm.federation.trust import Trust
from fedslm.privacy.plan import PrivatePlan, RunPlan
from fedslm.privacy.statement import Statement
from fedslm.protocol.bounds import cut
from fedslm.protocol.legs import Leg
from fedslm.protocol.messages import MEASURE, TRAIN, Reply, Request
from fedslm.protocol.metrics import ClientMetrics, read_metrics
from fedslm.protocol.setup import Setup
from fedslm.recipes import expected
from fedslm.records import AdapterState, RoundRecord
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
            if run.members is not None and Begun(self.directory.path).has(state.round + 1):
                state = self._lost(run, state)
            else:
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
        legs = self.config.secure_aggregation.leg_deadline_seconds
        if listed is None:
            nodes = join(self.grid, federation.num_clients, wait)
            return Exchange(self.grid, nodes, deadline, leg_seconds=legs)
        roster = self._roster()
        trust = Trust(roster, Path(listed), self.directory.path)
        nodes = {client: node.node_id for client, node in roster.items()}
        there = gather(self.grid, trust.active(), trust.needed(federation.min_clients), wait)
        away = frozenset(nodes.values()) - there
        return Exchange(self.grid, nodes, deadline, run.frozen, trust, away, leg_seconds=legs)

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
        setup = setup_of(config, plan, labels, self.directory)
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
            check_base(config, metrics)
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
        names, dtype, members = self._names(), description.dtype, self._members(summing)
        return RunConstants(setup, frozen, aggregation, names, dtype, summing, members), state

    def _members(self, summing: Summing | None) -> Members | None:
        """Whom the authority admitted; None if no protocol forms the sum."""
        if summing is None or summing.shares.protocol != "masked":
            return None
        if self.config.engine.nodes is None:
            return simulated_members(self.directory.nodes, self.config.federation.num_clients)
        return admitted_members(Path(self.config.engine.nodes).parent, self._roster())

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
        masked = self._masked(run, request, cohort, exchange)
        how = (run.aggregation, run.summing)
        with closing(combining(how, server, cohort, waiting, masked)) as aggregate:
            for client, answer in self._answers(exchange, request, cohort, masked):
                if isinstance(answer, Reply) and answer.statement:
                    answer = continued(answer, statements, client)
                tally.count(client, answer)
                take(aggregate, client, answer)
                for observer in self.observers:
                    observer.on_client(number, tally.done, len(cohort))
            exchange.save()  # spends are on disk before the round counts
            tally.add_remarks([] if masked is None else masked.remarks)
            tally.bytes_down = exchange.bytes_down - sent_before
            moved = finished(aggregate, config.federation.min_replies, tally=tally)
            moved = self._followed(run, number, moved)
            signal_to_noise = finite(aggregate.signal_to_noise())
        is_due = evaluations.is_due(number, time.monotonic() - began)
        metrics, evaluated = self._evaluated(run, moved if is_due else None)
        record = tally.record(
            number,
            kept=moved is None,
            epsilon=epsilons.of_network(config.privacy, statements),
            metrics=metrics,
            signal_to_noise=signal_to_noise,
            seconds=time.monotonic() - began,
            evaluation_seconds=evaluated,
        )
        evaluations.count(record)
        return self._recorded(state, record, statements, moved)

    def _recorded(
        self,
        state: Checkpoint,
        record: RoundRecord,
        statements: dict[int, Statement],
        moved: ServerState | None,
    ) -> Checkpoint:
        """The state after a round, which is on disk with its record on return."""
        state = state.after(
            record,
            server=moved or state.server,
            failed_in_row=0 if moved is not None else state.failed_in_row + 1,
            statements=statements,
            epsilons=epsilons.of_clients(self.config.privacy, statements),
        )
        self.directory.save(state, record)
        for observer in self.observers:
            observer.on_round(record)
        return state

    def _masked(
        self, run: RunConstants, request: Request, cohort: list[int], exchange: Exchange
    ) -> MaskedSum | None:
        """The sum that a protocol forms in a round, which is noted as begun; None if none does."""
        if run.members is None:
            return None
        shapes = summed_shapes(run.aggregation, ServerState(request.adapter, turn=request.turn))
        Begun(self.directory.path).note(request.round)
        size = num_values(shapes)
        return MaskedSum(exchange, run.members, request, cohort=cohort, num_values=size)

    def _lost(self, run: RunConstants, state: Checkpoint) -> Checkpoint:
        """Records a round that the server began and did not finish: its sum cannot be formed again."""
        number, statements = state.round + 1, dict(state.statements)
        cohort = choose_cohort(self.config.federation, self.config.run.seed, number)
        epsilon = epsilons.of_network(self.config.privacy, statements)
        record = Tally(len(cohort), run.names).lost(number, epsilon, cohort)
        return self._recorded(state, record, statements, None)

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
        self, exchange: Exchange, request: Request, cohort: list[int], masked: MaskedSum | None
    ) -> Iterator[tuple[int, Reply | str]]:
        """Asks a cohort and yields each reply, or the reason why there is none."""
        if masked is None:
            yield from self._trained(exchange, request, cohort)
            return
        yield from masked.opened()
        for client, answer in self._trained(exchange, request, sorted(masked.legs), masked.legs):
            if isinstance(answer, Reply) and answer.words is not None:
                try:
                    masked.add(client, answer.words, answer.body)
                except FederationError as error:
                    answer = cut(error)
            yield client, answer
        masked.close()

    def _trained(
        self,
        exchange: Exchange,
        request: Request,
        cohort: list[int],
        legs: Mapping[int, Leg] | None = None,
    ) -> Iterator[tuple[int, Reply | str]]:
        """Asks a cohort to train, each client with its leg if a protocol forms the sum."""
        attack, population = self.config.attack, self.config.federation.num_clients
        hostile = hostile_clients(attack, population, self.config.run.seed)
        for client, reply in exchange.replies(request, cohort, TRAIN, legs):
            if reply is None or isinstance(reply, str):
                answer: Reply | str = "late" if reply is None else reply
            else:
                if client in hostile:
                    reply = attacked(reply, request, attack, expected_shapes(request, client))
                answer = checked(reply, request, client)
            exchange.heard(client, answer)
            yield client, answer
