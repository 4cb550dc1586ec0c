"""Worker processes that run functions; they are forked from a server that has imported torch once.

A worker uses few threads, keeps its base model loaded, and ignores Ctrl-C: the parent decides when to
stop. If a worker dies, its job fails and a new worker replaces it.
"""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from fedslm.errors import FederationError
from fedslm.worker_process import Failure, run, set_threads, work

_PRELOADED = (
    "fedslm.client.handlers",
    "fedslm.federation.public_model",
    "fedslm.training.local",
    "transformers.models.auto.modeling_auto",
    "fedslm.models.peft_library",
    "pyarrow.parquet",
)
_PRELOADED_IF_PRIVATE = ("dp_accounting.rdp", "opacus.accountants")
_HIDING = threading.Lock()
_START_METHOD = "forkserver" if sys.platform != "win32" else "spawn"

T = TypeVar("T")


class WorkerDied(FederationError):
    """The process that ran a job died (for example, out of memory)."""


@dataclass(frozen=True)
class _Job:
    """A function to run.

    Attributes:
        number: Number of the job.
        function: What is run.
        arguments: What it gets.
        client: The client that it works for; None if any worker will do.
    """

    number: int
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    client: int | None


@dataclass
class _Worker:
    """A process, its pipe and its current job."""

    process: BaseProcess
    pipe: Connection
    job: int | None = None


def preload(*, private: bool = False) -> None:
    """Starts importing the heavy libraries in the background; call it as early as possible.

    Only the first call has an effect.

    Args:
        private: Whether workers will train under privacy: then the accountants' libraries are imported
            too, once instead of in each worker.
    """
    context = multiprocessing.get_context(_START_METHOD)
    if _START_METHOD == "forkserver":
        from multiprocessing import forkserver

        private_too = _PRELOADED_IF_PRIVATE if private else ()
        context.set_forkserver_preload([*_PRELOADED, *private_too])
        forkserver.ensure_running()


class WorkerPool:
    """Runs functions in worker processes, in order of submission.

    Jobs of one client prefer one worker, which has read and tokenised its records before, and holds
    their cached layers: an idle worker takes the first job among the next few that is its own or
    nobody's, else the first. At most ``2 * num_workers`` results wait to be fetched: memory use does
    not grow with jobs.

    Args:
        num_workers: Number of processes, >= 1.
        threads: Number of threads in each worker.
        log: File to which the workers append their logs.
        log_level: Least level of fedslm's own lines in it; other libraries' begin at WARNING.
        memory_mb: Memory limit of each worker: the kernel refuses larger allocations, and the job
            fails; None: no extra limit. Not on Windows.
        is_forked: False lets each worker import the libraries itself: it starts later, but no server
            process keeps the heavy libraries in memory.
    """

    def __init__(
        self,
        num_workers: int,
        *,
        threads: int = 1,
        log: Path | None = None,
        log_level: int = logging.WARNING,
        memory_mb: int | None = None,
        is_forked: bool = True,
    ) -> None:
        self._method = _START_METHOD if is_forked else "spawn"
        if is_forked:
            preload()
        self._threads, self._log, self._memory_mb = threads, log, memory_mb
        self._log_level = log_level
        self._numbers = itertools.count()
        self._queue: deque[_Job] = deque()
        self._results: dict[int, Any] = {}
        self._window = 2 * num_workers
        self._workers = [self._start() for _ in range(num_workers)]

    @property
    def num_workers(self) -> int:
        """Number of processes."""
        return len(self._workers)

    def submit(self, function: Callable[..., Any], *arguments: Any, client: int | None = None) -> int:
        """Queues a job and returns its number; jobs of one client prefer one worker.

        Another worker takes it only when results are polled, since jobs of its own may follow.
        """
        job = _Job(next(self._numbers), function, arguments, client)
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
            busy = {worker.pipe: worker for worker in self._workers if worker.job is not None}
            ready = wait(list(busy), timeout=max(0.0, remaining))
            for pipe in ready:
                self._receive(busy[pipe])  # type: ignore[index]
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

    def _wait(self, job: int) -> Any:
        """Waits for a job without a time limit: the parent decides when to stop."""
        while (result := self.poll(job, 1.0)) is None:
            pass
        if isinstance(result, Failure):
            raise result.error or FederationError(result.details)
        return result[0]

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
        for worker in self._workers:
            if worker.job in gone:
                worker.process.kill()
                self._bury(worker)
        for job in gone:
            self._results.pop(job, None)

    def close(self, drain_seconds: float = 0.0) -> None:
        """Stops all workers; running jobs may finish within ``drain_seconds``."""
        self._queue.clear()
        deadline = time.monotonic() + drain_seconds
        while time.monotonic() < deadline:
            busy = {worker.pipe: worker for worker in self._workers if worker.job is not None}
            if not busy:
                break
            for pipe in wait(list(busy), timeout=0.2):
                self._receive(busy[pipe], replace=False)  # type: ignore[index]
        for worker in self._workers:
            worker.pipe.close()
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join(5.0)
        self._workers = []

    def _start(self) -> _Worker:
        """Starts one worker."""
        context = multiprocessing.get_context(self._method)
        here, there = context.Pipe()
        arguments = (there, self._threads, self._log, self._log_level, self._memory_mb)
        process = context.Process(  # type: ignore[attr-defined]
            target=work, args=arguments, daemon=True
        )
        with _without_script():
            process.start()
        there.close()
        return _Worker(process, here)

    def _dispatch(self, needed: int | None = None, *, is_complete: bool = True) -> None:
        """Assigns queued jobs to idle workers; a job that is waited for may exceed the window.

        Args:
            needed: The job that is waited for.
            is_complete: Whether a worker without own jobs may take another's.
        """
        for number, worker in enumerate(self._workers):
            if worker.job is not None:
                continue
            if not self._queue:
                return
            is_full = len(self._results) >= self._window
            if is_full and (needed is None or self._queue[0].number > needed):
                return
            job = self._queue.popleft() if is_full else self._next(number, is_complete=is_complete)
            if job is None:
                continue
            if not worker.process.is_alive():  # it died while idle
                self._bury(worker)
            worker.job = job.number
            try:
                worker.pipe.send((job.function, job.arguments))
            except OSError:
                self._bury(worker)

    def _next(self, worker: int, *, is_complete: bool) -> _Job | None:
        """Takes the next job of a worker from the queue."""
        for position, job in enumerate(itertools.islice(self._queue, self._window)):
            if job.client is None or job.client % len(self._workers) == worker:
                del self._queue[position]
                return job
        return self._queue.popleft() if is_complete else None

    def _receive(self, worker: _Worker, *, replace: bool = True) -> None:
        """Receives one result from a worker."""
        try:
            result = worker.pipe.recv()
        except Exception:  # end of the pipe, or unreadable bytes: the worker is lost
            self._bury(worker, replace=replace)
            return
        self._finish(worker, result)

    def _bury(self, worker: _Worker, *, replace: bool = True) -> None:
        """Marks the job of a dead worker as failed and replaces the worker."""
        worker.process.join(1.0)
        code = worker.process.exitcode
        self._finish(worker, Failure(WorkerDied(f"a worker died (exit code {code})"), ""))
        worker.pipe.close()
        if replace:
            fresh = self._start()
            worker.process, worker.pipe = fresh.process, fresh.pipe

    def _finish(self, worker: _Worker, result: Any) -> None:
        """Stores a result until it is fetched."""
        job, worker.job = worker.job, None
        if job is not None:
            self._results[job] = result


class InlinePool:
    """Runs functions in this process, when their results are requested; same interface as a pool."""

    num_workers = 0

    def __init__(self, *, threads: int = 1) -> None:
        self._threads = threads
        self._numbers = itertools.count()
        self._queue: dict[int, tuple[Callable[..., Any], tuple[Any, ...]]] = {}

    def submit(self, function: Callable[..., Any], *arguments: Any, client: int | None = None) -> int:
        """Queues a job and returns its number; this process works for every client."""
        job = next(self._numbers)
        self._queue[job] = (function, arguments)
        return job

    def poll(self, job: int, timeout_seconds: float) -> Any:
        """Runs the job."""
        set_threads(self._threads)
        function, arguments = self._queue.pop(job)
        return run(function, arguments)

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Runs one function."""
        set_threads(self._threads)
        return function(*arguments)

    def map(self, function: Callable[..., T], arguments: Sequence[tuple[Any, ...]]) -> list[T]:
        """Runs a function on several arguments, one after another."""
        return [self.call(function, *each) for each in arguments]

    def abandon(self, jobs: list[int]) -> None:
        """Removes queued jobs."""
        for job in jobs:
            self._queue.pop(job, None)

    def close(self, drain_seconds: float = 0.0) -> None:
        """Does nothing: there are no processes to stop."""
        self._queue.clear()


Pool = WorkerPool | InlinePool


@contextmanager
def _without_script() -> Iterator[None]:
    """Hides the user's script from a process that is starting.

    The process does not need the script and would run it from the top: without
    ``if __name__ == "__main__"``, that would start the same run again.
    """
    with _HIDING:
        script = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = script
