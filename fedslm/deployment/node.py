"""A node at work: its records imported, its worker warm, its link to the server open."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context, Message, RecordDict

from fedslm.data import shards
from fedslm.data.sources import load
from fedslm.deployment.bundle import bundle, sha256_of
from fedslm.deployment.enrolment import ADMISSION, Admission, node_key, read_admission
from fedslm.deployment.link import connected
from fedslm.deployment.settings import NodeFile, read_node
from fedslm.federation.local_grid import handle, wait_for
from fedslm.federation.node import deployed_config
from fedslm.federation.workers import WorkerPool

logger = logging.getLogger(__name__)
_DATA, _LOG = "data", "node.log"


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


def open_node(directory: Path) -> Ready:
    """Reads what a node was given.

    Raises:
        ConfigError: ``node.toml`` is wrong.
        RunError: The node was not admitted yet.
    """
    directory = directory.expanduser().absolute()
    return Ready(directory, read_node(directory), read_admission(directory / ADMISSION))


def import_records(ready: Ready) -> int:
    """Copies the node's records to where training reads them; gives their number.

    They are copied at every start: a run keeps to the data that it began with, by their commitment.

    Raises:
        DataError: They cannot be read.
    """
    file = ready.file
    rows = load(file.source, file.split, file.query or None, scratch=ready.directory)
    shards.write_own(ready.directory / _DATA, rows, ready.admission.client)
    return len(rows)


def run_node(ready: Ready, stop: threading.Event) -> None:
    """Answers the server until it is told to stop.

    Raises:
        RunError: The node's key cannot be read.
    """
    key, authority = node_key(ready.directory), ready.admission.authority.encode()
    with (
        _worker(ready) as pool,
        connected(ready.admission.address, authority, key, ready.approved) as link,
    ):
        logger.info("connected to %s as node %d", ready.admission.address, link.node_id)

        def answer(message: Message, run_id: int) -> Message:
            job = pool.submit(handle, message, ready.context(link.node_id, run_id))
            return wait_for(pool, job, message, message.metadata.ttl)

        link.serve(answer, stop, ready.file.poll_seconds)


@contextmanager
def _worker(ready: Ready) -> Iterator[WorkerPool]:
    """One worker, which keeps its base model from message to message; a dead one is replaced."""
    pool = WorkerPool(1, threads=ready.file.threads, log=ready.directory / _LOG)
    try:
        yield pool
    finally:
        pool.close()
