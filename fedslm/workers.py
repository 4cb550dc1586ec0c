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
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

from fedslm.scheduling import Job, Worker, Workers
from fedslm.worker_process import run, set_threads, work

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


class _Process(NamedTuple):
    """A worker's process, the pipe to it, and the variables that it set."""

    process: BaseProcess
    pipe: Connection
    environment: Mapping[str, str]


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


class WorkerPool(Workers[_Process]):
    """Runs functions in worker processes (see :mod:`fedslm.scheduling`).

    Args:
        num_workers: Number of processes, >= 1.
        threads: Number of threads in each worker.
        log: File to which the workers append their logs.
        log_level: Least level of fedslm's own lines in it; other libraries' begin at WARNING.
        memory_mb: Memory limit of each worker: the kernel refuses larger allocations, and the job
            fails; None: no extra limit. Not on Windows.
        is_forked: False lets each worker import the libraries itself: it starts later, but no server
            process keeps the heavy libraries in memory.
        environments: Variables that each worker sets before it does anything, such as the device that
            it may see; one worker after another gets the next. A replacement gets those of the worker
            that was lost.
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
        environments: Sequence[Mapping[str, str]] = (),
    ) -> None:
        self._environments = deque(environments or [{}])
        self._method = _START_METHOD if is_forked else "spawn"
        if is_forked:
            preload()
        self._threads, self._log, self._memory_mb = threads, log, memory_mb
        self._log_level = log_level
        super().__init__(num_workers)

    def _start(self) -> _Process:
        """Starts one worker."""
        context = multiprocessing.get_context(self._method)
        here, there = context.Pipe()
        environment = self._environments.popleft()
        limits = (self._threads, self._memory_mb)
        arguments = (there, environment, limits, self._log, self._log_level)
        process = context.Process(  # type: ignore[attr-defined]
            target=work, args=arguments, daemon=True
        )
        with _without_script():
            process.start()
        there.close()
        self._environments.append(environment)
        return _Process(process, here, environment)

    def _is_alive(self, handle: _Process) -> bool:
        """Whether the process runs."""
        return handle.process.is_alive()

    def _send(self, handle: _Process, job: Job) -> None:
        """Writes a job into the pipe."""
        handle.pipe.send((job.function, job.arguments))

    def _ready(
        self, busy: Sequence[Worker[_Process]], timeout_seconds: float
    ) -> Sequence[Worker[_Process]]:
        """Waits for the pipes."""
        pipes = {worker.handle.pipe: worker for worker in busy}
        return [pipes[pipe] for pipe in wait(list(pipes), timeout_seconds)]  # type: ignore[index]

    def _receive(self, handle: _Process) -> Any:
        """Reads a result from the pipe."""
        return handle.pipe.recv()

    def _end(self, handle: _Process, *, kill: bool = False) -> str:
        """Reaps the process."""
        if kill:
            handle.process.kill()
        handle.process.join(1.0)
        handle.pipe.close()
        self._environments.remove(handle.environment)
        self._environments.appendleft(handle.environment)
        return f"a worker died (exit code {handle.process.exitcode})"

    def _stop(self, handles: Sequence[_Process]) -> None:
        """Stops all processes."""
        for handle in handles:
            handle.pipe.close()
            handle.process.terminate()
        for handle in handles:
            handle.process.join(5.0)


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


Pool = Workers[Any] | InlinePool


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
