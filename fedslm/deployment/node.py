"""A node at work: its records imported, its worker warm, its link to the server open."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from flwr.app import Context, Message, RecordDict

from fedslm.data import shards
from fedslm.data.sources import load
from fedslm.deployment.bundle import bundle, sha256_of
from fedslm.deployment.conditions import Attendance
from fedslm.deployment.enrolment import ADMISSION, Admission, node_key, read_admission
from fedslm.deployment.journal import keep_small
from fedslm.deployment.link import Link, connected, is_there, step_in
from fedslm.deployment.metrics import NodeCounts, node_figures, served
from fedslm.deployment.settings import NodeFile, read_node
from fedslm.errors import DataError, RunError
from fedslm.federation.local_grid import handle, wait_for
from fedslm.federation.node import deployed_config
from fedslm.federation.workers import WorkerPool

logger = logging.getLogger(__name__)
_DATA, _LOG = "data", "node.log"
_AGAIN_SECONDS = 2.0


@dataclass(frozen=True)
class Ready:
    """A node that can start.

    Attributes:
        directory: Its own directory, absolute.
        file: Its operator's settings.
        admission: What the server's operator said.
    """

    directory: Path
    file: NodeFile
    admission: Admission

    @property
    def approved(self) -> frozenset[str]:
        """Hashes of the application bundles that may run: this version's, and the operator's list."""
        return frozenset({sha256_of(bundle()), *self.file.approved_bundles})

    def context(self, node_id: int, run_id: int) -> Context:
        """What a message is answered with: nothing of it comes from the server."""
        config = deployed_config(self.directory, self.directory / _DATA, self.admission.client)
        return Context(run_id, node_id, config, RecordDict(), {})


def open_node(directory: Path, profile: str | None = None) -> Ready:
    """Reads what a node was given.

    Args:
        directory: The node's own.
        profile: In place of the one in its ``node.toml``.

    Raises:
        ConfigError: ``node.toml`` is wrong.
        RunError: The node was not admitted yet.
    """
    directory = directory.expanduser().absolute()
    file = read_node(directory, profile)
    if not (directory / ADMISSION).exists():
        raise RunError(
            f"{directory.name} was not admitted yet: `fedslm node enroll`, send the request to the "
            f"server's operator, and `fedslm node accept` what comes back"
        )
    return Ready(directory, file, read_admission(directory / ADMISSION))


def import_records(ready: Ready) -> int:
    """Copies the node's records to where training reads them; gives their number.

    They are copied at every start: a run keeps to the data that it began with, by their commitment.

    Raises:
        DataError: They cannot be read.
    """
    file = ready.file
    rows = load(file.source, file.split, file.query or None, scratch=ready.directory)
    missing = sorted(set(file.columns) - set(rows.column_names))
    if missing:
        there = ", ".join(rows.column_names)
        raise DataError(f"columns={missing} of node.toml are not in the records; there are {there}")
    shards.write_own(ready.directory / _DATA, rows, ready.admission.client, file.columns)
    return len(rows)


def run_node(ready: Ready, stop: threading.Event) -> None:
    """Answers the server until it is told to stop.

    Formal guarantees:
        * Outside its conditions a node has no connection: the server sees it offline. Nothing is
          computed either, and the worker is gone. A message under way when they end is finished, its
          reply is sent, and the connection stays for the few seconds in which the server fetches it.

    Raises:
        RunError: The node's key cannot be read, or another process runs this node.
    """
    counts = NodeCounts()
    attendance = Attendance(ready.file.conditions, ready.directory)

    def goes_on(seconds: float) -> bool:
        keep_small(ready.directory / _LOG)
        return not stop.wait(seconds) and attendance.takes_part()

    was_there = True
    with (
        _alone(ready.directory),
        served(ready.file.metrics_port, lambda: node_figures(ready.directory, counts)),
    ):
        while not stop.is_set():
            if not attendance.takes_part():
                stop.wait(attendance.check_seconds)
                continue
            found = is_there(ready.admission.address, ready.admission.authority)
            if found:
                _take_part(ready, counts, goes_on)
            elif was_there:
                logger.warning("%s cannot be reached; tried again", ready.admission.address)
            was_there = found
            stop.wait(_AGAIN_SECONDS)


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Keeps a second process of this node out."""
    lock = FileLock(directory / "node.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise RunError(f"another process runs the node in {directory}") from None
    try:
        yield
    finally:
        lock.release()


def _take_part(ready: Ready, counts: NodeCounts, goes_on: Callable[[float], bool]) -> None:
    """Connects, answers as long as it goes on, and disconnects."""
    address, authority = ready.admission.address, ready.admission.authority.encode()
    key = node_key(ready.directory)
    step_in(address, authority, key, ready.admission.node_id)
    with workers(ready) as next_worker, connected(address, authority, key) as found:
        link = Link(*found, ready.approved, ready.file.message_mb << 20)
        logger.info("connected to %s as node %d", address, link.node_id)

        def answer(message: Message, run_id: int) -> Message:
            with next_worker() as pool:
                job = pool.submit(handle, message, ready.context(link.node_id, run_id))
                reply = wait_for(pool, job, message, message.metadata.ttl)
            counts.count(reply)
            return reply

        with counts.connected():
            link.serve(answer, goes_on, ready.file.poll_seconds)
    logger.info("disconnected from %s", address)


@contextmanager
def workers(ready: Ready) -> Iterator[Callable[[], AbstractContextManager[WorkerPool]]]:
    """Gives the worker for each message: one that stays, or (``warm = false``) a new one every time."""
    if not ready.file.warm:
        yield lambda: worker(ready)
        return
    with worker(ready) as pool:
        yield lambda: nullcontext(pool)


@contextmanager
def worker(ready: Ready) -> Iterator[WorkerPool]:
    """One worker, which keeps its base model from message to message; a dead one is replaced.

    On a phone, and where it is to leave no memory taken, it imports for itself: a template to fork from
    would stay.
    """
    pool = WorkerPool(
        1,
        threads=ready.file.threads,
        log=ready.directory / _LOG,
        memory_mb=ready.file.memory_mb,
        is_forked=ready.file.warm and ready.file.profile != "phone",
    )
    try:
        yield pool
    finally:
        pool.close()
