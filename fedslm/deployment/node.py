"""A running node: its imported records, its worker, and its connection to the server."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict

from fedslm import layout
from fedslm.attestations import places_of_node
from fedslm.client.handlers import refusal
from fedslm.client.kept_runs import remove_old
from fedslm.client.node import OWN_SHARD, deployed_config
from fedslm.client.pace import Pace, period_of
from fedslm.client.self_test_gate import is_attested
from fedslm.data import store
from fedslm.data.columns import Wanted
from fedslm.data.owners import refuse_unfit
from fedslm.data.sources import load
from fedslm.deployment.admission import ADMISSION, Admission, read_admission
from fedslm.deployment.authority import public_key_of
from fedslm.deployment.bundle import bundle, sha256_of
from fedslm.deployment.conditions import Attendance
from fedslm.deployment.enrolment import node_key
from fedslm.deployment.fleet import connected, step_in
from fedslm.deployment.instructions import Instructions
from fedslm.deployment.journal import keep_small
from fedslm.deployment.link import Link, is_there
from fedslm.deployment.metrics import NodeCounts, node_figures, served
from fedslm.deployment.settings import NodeFile, read_node
from fedslm.engines.local import handle, wait_for
from fedslm.errors import DataError, FederationError, PolicyRefused, RunError, Unusable
from fedslm.privacy.policy import read_policy
from fedslm.protocol.envelopes import Envelope
from fedslm.protocol.legs import SECAGG
from fedslm.protocol.lifetime import work_seconds
from fedslm.secagg.membership import begin_session
from fedslm.storage import locked
from fedslm.workers import WorkerPool, preload

logger = logging.getLogger(__name__)
_DATA, _LOG = "data", "node.log"
_AGAIN_SECONDS = 2.0
_NOT_BELIEVED = 6  # an error code that Flower does not use


@dataclass(frozen=True)
class Ready:
    """A node that can start.

    Attributes:
        directory: Its own directory, absolute.
        file: Its operator's settings.
        admission: The admission from the server's operator.
    """

    directory: Path
    file: NodeFile
    admission: Admission

    @property
    def approved(self) -> frozenset[str]:
        """Hashes of the approved application bundles: this version's, and the operator's list."""
        return frozenset({sha256_of(bundle()), *self.file.approved_bundles})

    def context(self, node_id: int, run_id: int, client: int) -> Context:
        """The context for answering a message; the server sets only the node's index in the run."""
        config = deployed_config(self.directory, self.directory / _DATA, client)
        return Context(run_id, node_id, config, RecordDict(), {})


def open_node(directory: Path, profile: str | None = None) -> Ready:
    """Reads a node's settings and admission.

    Args:
        directory: The node's own directory.
        profile: Replaces the profile in its ``node.toml``.

    Raises:
        ConfigError: ``node.toml`` is invalid.
        RunError: The node has not been admitted yet.
    """
    directory = directory.expanduser().absolute()
    file = read_node(directory, profile)
    if not (directory / ADMISSION).exists():
        raise RunError(
            f"{directory.name} is not admitted yet: run `fedslm node enroll`, send the request to the "
            f"server's operator, and run `fedslm node accept` on the admission"
        )
    return Ready(directory, file, read_admission(directory / ADMISSION))


def import_records(ready: Ready) -> int:
    """Copies the node's records to where training reads them; returns their number.

    They are copied at every start, for runs that begin from then on; a run in progress keeps those that
    it began with (:mod:`fedslm.client.kept_runs`). If columns are declared, no others are read.

    Raises:
        DataError: They cannot be read.
    """
    file = ready.file
    wanted = Wanted({}, frozenset(file.columns)) if file.columns else Wanted()
    rows = load(file.source, file.split, file.query or None, scratch=ready.directory, wanted=wanted)
    missing = sorted(set(file.columns) - wanted.there.keys())
    if missing:
        there = ", ".join(wanted.there)
        raise DataError(f"columns={missing} of node.toml are not in the records; there are {there}")
    unit = _unit_column(ready.directory)
    if unit in rows.column_names:
        refuse_unfit(rows, str(unit), f"unit_column of {layout.POLICY}")
    store.write_own(ready.directory / _DATA, rows, OWN_SHARD, file.columns)
    remove_old(ready.directory)
    return len(rows)


def _unit_column(directory: Path) -> str | None:
    """The column with the owner of a record; None if the policy names none, or cannot be read."""
    try:
        return read_policy(directory / layout.POLICY).unit_column
    except PolicyRefused:  # every request is refused, and `fedslm node check` shows why
        return None


def alone(ready: Ready) -> AbstractContextManager[None]:
    """Makes sure that only one process runs a node.

    Raises:
        RunError: Another process runs it.
    """
    problem = f"another process runs the node in {ready.directory}"
    return locked(ready.directory / "node.lock", 0.0, problem)


def run_node(ready: Ready, stop: threading.Event) -> None:
    """Answers the server until it is stopped.

    Formal guarantees:
        * Outside its conditions a node has no connection: the server sees it offline. Nothing is
          computed either, and the worker has exited. A message in progress when they end is finished,
          its reply is sent, and the connection stays for the few seconds in which the server fetches
          it.
        * Replies leave at public times if the policy says so (:mod:`fedslm.client.pace`), over all
          connections of this process. A stopped node then sends nothing before its time.

    Raises:
        RunError: The node's key cannot be read, or another process runs this node.
        NotKnown: The server does not know this node's key.
        FederationError: The server refuses the node, or has another certificate.
    """
    running = _Running(ready, NodeCounts(), Pace(), stop)
    attendance = Attendance(ready.file.conditions, ready.directory)

    def goes_on(seconds: float) -> bool:
        keep_small(ready.directory / _LOG)
        return not stop.wait(seconds) and attendance.takes_part()

    was_there, has_met = True, False
    with (
        alone(ready),
        served(ready.file.metrics_port, lambda: node_figures(ready.directory, running.counts)),
    ):
        _begin_session(ready)  # not before: a start that is refused must not end the session of another
        while not stop.is_set():
            if not attendance.takes_part():
                stop.wait(attendance.check_seconds)
                continue
            found = is_there(ready.admission.address, ready.admission.authority)
            if found:
                has_met = True
                found = _took_part(running, goes_on)
            elif was_there:  # at the start it may still be starting
                level = logging.WARNING if has_met else logging.INFO
                logger.log(level, "%s cannot be reached; retrying", ready.admission.address)
            was_there = found
            stop.wait(_AGAIN_SECONDS)


def _begin_session(ready: Ready) -> None:
    """Notes that this process starts: a round of secure aggregation before it is not continued."""
    try:
        authority = public_key_of(ready.admission.authority.encode())
    except ValueError as error:
        raise Unusable(
            f"{ready.directory / ADMISSION}: the authority's certificate: {error}"
        ) from error
    begin_session(ready.directory, authority)


@dataclass(frozen=True)
class _Running:
    """A node's process, over all its connections."""

    ready: Ready
    counts: NodeCounts
    pace: Pace
    stop: threading.Event

    def reply(
        self,
        message: Message,
        context: Context,
        workers: Callable[[], AbstractContextManager[WorkerPool]],
    ) -> Message:
        """The reply of a worker, or a refusal that needs none; starts the time of the request."""
        reads_none = message.metadata.message_type == SECAGG  # so its time reveals nothing
        try:
            period = None if reads_none else period_of(context)
            self.pace.begin(period, work_seconds(message.metadata.ttl))
        except (FederationError, PolicyRefused) as error:
            return refusal(message, error)
        with workers() as pool:
            job = pool.submit(handle, message, context)
            return wait_for(pool, job, message, self.pace.left(), self._works)

    def leaves(self) -> bool:
        """Waits until the reply may leave; False if the node stops before."""
        return self.pace.wait(self.stop.wait)

    def _works(self) -> bool:
        """Whether work goes on: its end must not show if its reply could not leave."""
        return not (self.pace.holds and self.stop.is_set())


def _took_part(running: _Running, goes_on: Callable[[float], bool]) -> bool:
    """Connects and answers; False if the connection could not be made."""
    import httpx

    try:
        _take_part(running, goes_on)
    except httpx.TransportError as error:
        logger.warning("%s does not answer: %s; retrying", running.ready.admission.address, error)
        return False
    return True


def _take_part(running: _Running, goes_on: Callable[[float], bool]) -> None:
    """Connects, answers until it must stop, and disconnects."""
    ready, counts = running.ready, running.counts
    address, authority = ready.admission.address, ready.admission.authority.encode()
    key, instructions = node_key(ready.directory), Instructions(ready.directory, ready.admission)
    step_in(address, authority, key, ready.admission.node_id)
    _say_what_comes(ready)
    with workers(ready) as next_worker, connected(address, authority, key) as found:
        link = Link(*found, ready.approved, ready.file.message_mb << 20)
        logger.info("connected to %s as node %d", address, link.node_id)

        def answer(message: Message, run_id: int) -> Message:
            try:
                believed = instructions.believed(message, run_id)
            except FederationError as error:
                logger.error("run %d: an instruction is refused: %s", run_id, error)
                counts.count_unbelieved()
                return Message(Error(code=_NOT_BELIEVED, reason=str(error)), reply_to=message)
            context = ready.context(link.node_id, run_id, believed.envelope.client)
            reply = running.reply(message, context, next_worker)
            counts.count(reply)
            _say_what_was_done(believed.envelope, reply)
            return instructions.signed(reply, message, believed)

        with counts.connected():
            link.serve(answer, goes_on, ready.file.poll_seconds, running.leaves)
    logger.info("disconnected from %s", address)


def _say_what_was_done(envelope: Envelope, reply: Message) -> None:
    """Logs for this node's operator what the server requested, and the result."""
    if reply.has_error():
        done, reason = "error", str(reply.error.reason)
    else:
        values = reply.content.config_records.get("reply", ConfigRecord())
        done, reason = str(values.get("status", "answered")), str(values.get("reason", ""))
    text = f"{done}: {reason}" if reason else done
    level = logging.WARNING if reason else logging.INFO
    logger.log(level, "run %s, round %d, %s: %s", envelope.run, envelope.round, envelope.kind, text)


def _say_what_comes(ready: Ready) -> None:
    """Logs that the next steps take a while."""
    logger.info("starting the worker")
    if not is_attested(places_of_node(ready.directory)):
        logger.info(
            "this code has not passed its self-test in %s yet: it runs before the first private round, "
            "and takes some ten seconds (`fedslm node check` runs it beforehand)",
            ready.directory,
        )


@contextmanager
def workers(ready: Ready) -> Iterator[Callable[[], AbstractContextManager[WorkerPool]]]:
    """Yields the worker for each message: a persistent one or, if ``warm = false``, a new one."""
    if not ready.file.warm:
        yield lambda: worker(ready)
        return
    with worker(ready) as pool:
        yield lambda: nullcontext(pool)


@contextmanager
def worker(ready: Ready) -> Iterator[WorkerPool]:
    """One worker, which keeps its base model from message to message; a dead one is replaced.

    On a phone, and if no memory may stay in use, the worker imports its modules itself: a template
    process to fork from would stay in memory.
    """
    is_forked = ready.file.warm and ready.file.profile != "phone"
    if is_forked:
        preload(private=True)
    pool = WorkerPool(
        1,
        threads=ready.file.threads,
        log=ready.directory / _LOG,
        log_level=logging.INFO,
        memory_mb=ready.file.memory_mb,
        is_forked=is_forked,
    )
    try:
        yield pool
    finally:
        pool.close()
