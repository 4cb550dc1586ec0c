"""Runs clients in actors of a Ray cluster: one that exists (``engine.address``), or one for the run.

A job whose node was lost is tried once more on another one. Without privacy nothing of it is lost. A
private client that had charged its ledger is charged again, as after any crash:
``privacy.spare_rounds`` pays for that; without spare rounds the client refuses its last round.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedslm.config import EngineConfig
from fedslm.engines.ray_cluster import (
    Needs,
    alive,
    capacity,
    check_nodes,
    connect,
    library,
    workers_on,
)
from fedslm.errors import FederationError
from fedslm.scheduling import Job, Worker, Workers
from fedslm.worker_process import Failure, begin, run

logger = logging.getLogger(__name__)
_START_SECONDS = 300.0
_ATTEMPTS = 2


@dataclass
class _Actor:
    """A worker in the cluster.

    Attributes:
        actor: Ray's handle.
        result: What is waited for: the end of its start, or of its job.
        has_begun: Whether its process runs, or failed to.
        is_lost: Whether it failed to.
        node: The node on which it runs.
    """

    actor: Any
    result: Any
    has_begun: bool = False
    is_lost: bool = False
    node: str = ""


class RayPool(Workers[_Actor]):
    """Runs functions in Ray actors (see :mod:`fedslm.scheduling`).

    An actor that is lost with its node is replaced if the cluster still has room for it; otherwise the
    others go on without it.

    Args:
        engine: Address, number of workers, and what each of them takes.
        needs: What they need.

    Raises:
        FederationError: Ray is not installed; the cluster does not answer, runs other code, does not
            see the files, or has no room for a worker.
    """

    def __init__(self, engine: EngineConfig, needs: Needs) -> None:
        self._ray = ray = library()
        self._engine, self._needs = engine, needs
        connect(ray, engine, needs.most)
        try:
            takes = {"num_cpus": engine.cpus_per_client, "num_gpus": engine.gpus_per_client}
            self._make = ray.remote(_Work).options(**takes, max_restarts=0).remote
            if engine.address is not None:
                check_nodes(ray, needs)
            super().__init__(workers_on(alive(ray), engine, needs.most), attempts=_ATTEMPTS)
            self._wait_for_the_first()
        except BaseException:
            ray.shutdown()
            raise

    def _wait_for_the_first(self) -> None:
        """Waits until one worker has begun.

        Raises:
            FederationError: None begins in time.
        """
        waited = [worker.handle.result for worker in self._workers]
        if not self._ray.wait(waited, num_returns=1, timeout=_START_SECONDS)[0]:
            raise FederationError(
                f"no worker of the Ray cluster began within {_START_SECONDS:g} s: something else uses "
                f"its CPUs or GPUs; see `ray status`"
            )

    def _start(self) -> _Actor:
        """Asks for an actor; Ray starts it when there is room."""
        actor = self._make(self._engine.threads_per_worker, self._needs.log)
        return _Actor(actor, actor.begun.remote())

    def _replacement(self) -> _Actor | None:
        """A new actor if the nodes that are left have room for one more than the others."""
        room = capacity(alive(self._ray), self._engine)
        return self._start() if room >= len(self._workers) else None

    def _has_begun(self, handle: _Actor) -> bool:
        """Whether its process runs, or failed to."""
        if not handle.has_begun and self._ray.wait([handle.result], timeout=0)[0]:
            handle.has_begun = True
            try:
                handle.node = self._ray.get(handle.result)
            except self._ray.exceptions.RayError:
                handle.is_lost = True
        return handle.has_begun

    def _is_alive(self, handle: _Actor) -> bool:
        """Whether it began, and answered when another one on its node was lost."""
        return not handle.is_lost

    def _send(self, handle: _Actor, job: Job) -> None:
        """Asks the actor to run a job."""
        handle.result = handle.actor.run.remote(job.function, job.arguments)

    def _ready(
        self, busy: Sequence[Worker[_Actor]], timeout_seconds: float
    ) -> Sequence[Worker[_Actor]]:
        """Waits for the results."""
        if not busy:
            time.sleep(min(timeout_seconds, 0.05))
            return []
        waited = {worker.handle.result: worker for worker in busy}
        ready, _ = self._ray.wait(list(waited), num_returns=1, timeout=timeout_seconds)
        return [waited[result] for result in ready]

    def _receive(self, handle: _Actor) -> Any:
        """Fetches a result; an error of the job itself is one, too."""
        try:
            return self._ray.get(handle.result)
        except self._ray.exceptions.RayTaskError as error:  # a result that cannot be sent
            return Failure(None, str(error))

    def _end(self, handle: _Actor, *, kill: bool = False) -> str:
        """Kills what is left of an actor; idle ones on its node must answer before they get a job."""
        self._ray.kill(handle.actor)
        if kill:
            return "a worker was stopped"
        logger.warning("a worker of the Ray cluster died, or its node was lost")
        for worker in self._workers:
            other = worker.handle
            if worker.job is None and other.has_begun and other.node == handle.node:
                other.has_begun, other.result = False, other.actor.begun.remote()
        return "a worker died, or its node was lost"

    def _stop(self, handles: Sequence[_Actor]) -> None:
        """Stops all actors and leaves the cluster; one that was started for the run ends."""
        for handle in handles:
            self._ray.kill(handle.actor)
        self._ray.shutdown()


class _Work:
    """What runs in an actor."""

    def __init__(self, threads: int, log: Path) -> None:
        begin(threads, log, logging.WARNING)

    def begun(self) -> str:
        """The node on which the process runs."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def run(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """Runs one function."""
        return run(function, arguments)
