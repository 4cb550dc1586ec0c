"""Gives functions to workers, one at a time to each; a worker is a process here, or an actor elsewhere.

Jobs run in order of submission. Those of one client prefer one worker, which has read and tokenised its
records before, and holds their cached layers: an idle worker takes the first job among the next few
that is its own or nobody's, else the first. At most two results per worker wait to be fetched: memory
use does not grow with jobs.
"""

from __future__ import annotations

import itertools
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from fedslm.errors import FederationError
from fedslm.worker_process import Failure

H = TypeVar("H")
T = TypeVar("T")


class WorkerDied(FederationError):
    """The process that ran a job died (for example, out of memory)."""


@dataclass(frozen=True)
class Job:
    """A function to run.

    Attributes:
        number: Number of the job.
        function: What is run.
        arguments: What it gets.
        client: The client that it works for; None if any worker will do.
        attempts: How often it was given to a worker that was lost.
    """

    number: int
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    client: int | None
    attempts: int = 0


@dataclass(eq=False)
class Worker(Generic[H]):
    """How a worker is reached, and its current job."""

    handle: H
    job: Job | None = None


class Workers(ABC, Generic[H]):
    """Workers of one kind; a subclass starts them and exchanges jobs and results with them.

    Args:
        num_workers: Number of workers, >= 1.
        attempts: How often a job is tried if its worker is lost.
    """

    def __init__(self, num_workers: int, *, attempts: int = 1) -> None:
        self._numbers = itertools.count()
        self._queue: deque[Job] = deque()
        self._results: dict[int, Any] = {}
        self._window = 2 * num_workers
        self._attempts = attempts
        self._workers: list[Worker[H]] = [Worker(self._start()) for _ in range(num_workers)]

    @abstractmethod
    def _start(self) -> H:
        """Starts one worker."""

    @abstractmethod
    def _is_alive(self, handle: H) -> bool:
        """Whether a worker may get a job."""

    @abstractmethod
    def _send(self, handle: H, job: Job) -> None:
        """Gives a job to an idle worker; raises OSError if it is dead."""

    @abstractmethod
    def _ready(self, busy: Sequence[Worker[H]], timeout_seconds: float) -> Sequence[Worker[H]]:
        """Waits for the results of some workers; returns those that have one, or died."""

    @abstractmethod
    def _receive(self, handle: H) -> Any:
        """The result of a ready worker; raises if it died."""

    @abstractmethod
    def _end(self, handle: H, *, kill: bool = False) -> str:
        """Ends a dead worker, or kills one; returns what became of it."""

    def _has_begun(self, handle: H) -> bool:
        """Whether a new worker takes jobs yet; until then, the others take them."""
        return True

    def _replacement(self) -> H | None:
        """A new worker in place of a lost one; None if there is none to be had."""
        return self._start()

    @property
    def num_workers(self) -> int:
        """Number of workers."""
        return len(self._workers)

    def submit(self, function: Callable[..., Any], *arguments: Any, client: int | None = None) -> int:
        """Queues a job and returns its number; jobs of one client prefer one worker.

        Another worker takes it only when results are polled, since jobs of its own may follow.
        """
        job = Job(next(self._numbers), function, arguments, client)
        self._queue.append(job)
        self._dispatch(is_complete=False)
        return job.number

    def poll(self, job: int, timeout_seconds: float) -> Any | None:
        """Waits for one job for a limited time.

        Returns:
            The result, a :class:`Failure`, or None if it is not ready. A result is returned only once.
        """
        deadline = time.monotonic() + timeout_seconds
        while job not in self._results:
            self._dispatch(needed=job)
            remaining = deadline - time.monotonic()
            ready = self._ready(self._busy(), max(0.0, remaining))
            for worker in ready:
                self._take(worker)
            if not ready and remaining <= 0:
                return None
        result = self._results.pop(job)
        self._dispatch()
        return result

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Runs one function in a worker and returns its result.

        Raises:
            FedslmError: Raised by the function.
        """
        value: T = self._wait(self.submit(function, *arguments))
        return value

    def map(self, function: Callable[..., T], arguments: Sequence[tuple[Any, ...]]) -> list[T]:
        """Runs a function on several arguments in parallel.

        Raises:
            FedslmError: Raised by the function.
        """
        return [self._wait(job) for job in [self.submit(function, *each) for each in arguments]]

    def abandon(self, jobs: list[int]) -> None:
        """Abandons jobs: queued ones never run, and the worker of a running one is replaced.

        Otherwise, a worker that hangs would never become available.
        """
        gone = set(jobs)
        self._queue = deque(job for job in self._queue if job.number not in gone)
        for worker in list(self._workers):
            if worker.job is not None and worker.job.number in gone:
                worker.job = None
                self._bury(worker, kill=True)
        for job in gone:
            self._results.pop(job, None)

    def close(self, drain_seconds: float = 0.0) -> None:
        """Stops all workers; running jobs may finish within ``drain_seconds``."""
        self._queue.clear()
        deadline = time.monotonic() + drain_seconds
        while time.monotonic() < deadline and (busy := self._busy()):
            for worker in self._ready(busy, 0.2):
                self._take(worker, replaced=False)
        self._stop([worker.handle for worker in self._workers])
        self._workers = []

    @abstractmethod
    def _stop(self, handles: Sequence[H]) -> None:
        """Stops workers at the end."""

    def _busy(self) -> list[Worker[H]]:
        """The workers that have a job."""
        return [worker for worker in self._workers if worker.job is not None]

    def _wait(self, job: int) -> Any:
        """Waits for a job without a time limit: the parent decides when to stop."""
        while (result := self.poll(job, 1.0)) is None:
            pass
        if isinstance(result, Failure):
            raise result.error or FederationError(result.details)
        return result[0]

    def _dispatch(self, needed: int | None = None, *, is_complete: bool = True) -> None:
        """Assigns queued jobs to idle workers; a job that is waited for may exceed the window.

        Args:
            needed: The job that is waited for.
            is_complete: Whether a worker without own jobs may take another's.
        """
        for number, worker in enumerate(list(self._workers)):
            if worker.job is not None or not self._has_begun(worker.handle):
                continue
            if not self._queue:
                return
            is_full = len(self._results) >= self._window
            if is_full and (needed is None or self._queue[0].number > needed):
                return
            job = self._queue.popleft() if is_full else self._next(number, is_complete=is_complete)
            if job is not None:
                self._give(worker, job)

    def _give(self, worker: Worker[H], job: Job) -> None:
        """Gives a job to an idle worker, which is replaced first if it died meanwhile."""
        if not self._is_alive(worker.handle):
            self._bury(worker)
            if worker not in self._workers or not self._has_begun(worker.handle):
                self._put_back(job)
                return
        worker.job = job
        try:
            self._send(worker.handle, job)
        except OSError:
            self._bury(worker)

    def _next(self, worker: int, *, is_complete: bool) -> Job | None:
        """Takes the next job of a worker from the queue."""
        for position, job in enumerate(itertools.islice(self._queue, self._window)):
            if job.client is None or job.client % len(self._workers) == worker:
                del self._queue[position]
                return job
        return self._queue.popleft() if is_complete else None

    def _take(self, worker: Worker[H], *, replaced: bool = True) -> None:
        """Takes the result of a ready worker."""
        try:
            result = self._receive(worker.handle)
        except Exception:  # it died, or sent unreadable bytes: the worker is lost
            self._bury(worker, replaced=replaced)
            return
        self._finish(worker, result)

    def _bury(self, worker: Worker[H], *, kill: bool = False, replaced: bool = True) -> None:
        """Ends a lost worker, whose job fails or is tried again, and starts another in its place."""
        died = WorkerDied(self._end(worker.handle, kill=kill))
        job = worker.job
        if job is not None and replaced and job.attempts + 1 < self._attempts:
            worker.job = None
            self._put_back(replace(job, attempts=job.attempts + 1))
        self._finish(worker, Failure(died, ""))
        if not replaced:
            return
        fresh = self._replacement()
        if fresh is not None:
            worker.handle = fresh
            return
        self._workers.remove(worker)
        if not self._workers:
            raise FederationError(f"no worker is left: {died}")

    def _put_back(self, job: Job) -> None:
        """Queues a job in order of its number, on which the window relies."""
        later = (at for at, other in enumerate(self._queue) if other.number > job.number)
        self._queue.insert(next(later, len(self._queue)), job)

    def _finish(self, worker: Worker[H], result: Any) -> None:
        """Stores a result until it is fetched."""
        job, worker.job = worker.job, None
        if job is not None:
            self._results[job.number] = result
