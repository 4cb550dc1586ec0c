"""What runs inside a worker process: limits, threads, and one function after another."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fedslm.errors import FedslmError

_CACHED_KERNELS = 32  # of 1,024; with fewer, those of the next length are made again


@dataclass(frozen=True)
class Failure:
    """A job that raised: contains the error if it is a FedslmError, else its traceback."""

    error: FedslmError | None
    details: str


def run(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Runs a function; a result is wrapped, so that it is never mistaken for "not ready"."""
    try:
        return (function(*arguments),)
    except FedslmError as error:
        return Failure(error, traceback.format_exc())
    except Exception:  # worker boundary: report every error to the parent
        return Failure(None, traceback.format_exc())


def set_threads(threads: int) -> None:
    """Sets the number of torch threads; more than one rarely helps on small matrices."""
    import torch

    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def _limit_memory(memory_mb: int | None, threads: int) -> None:
    """Limits this process's memory, so that the kernel refuses allocations and kills no process.

    The limit counts what libraries reserve and never use: oneDNN's code, 256 kB for each kernel of each
    shape, and OpenBLAS' buffers and stacks for each thread. So they are told to reserve little, before
    they are imported.
    """
    if memory_mb is not None and sys.platform != "win32":
        import resource

        os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = str(_CACHED_KERNELS)
        os.environ["OPENBLAS_NUM_THREADS"] = str(threads)
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        asked = memory_mb << 20
        allowed = asked if hard == resource.RLIM_INFINITY else min(asked, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))


def work(
    pipe: Connection,
    environment: Mapping[str, str],
    limits: tuple[int, int | None],
    log: Path | None,
    log_level: int,
) -> None:
    """Runs the worker's loop; ends when the parent closes its end of the pipe or dies.

    Args:
        pipe: Where jobs come from.
        environment: Variables to set first.
        limits: Threads, and memory in MiB or None.
        log: File to which it appends; None: standard error.
        log_level: Least level of fedslm's own lines in it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(environment)
    threads, memory_mb = limits
    _limit_memory(memory_mb, threads)
    begin(threads, log, log_level)
    while True:
        try:
            function, arguments = pipe.recv()
        except (EOFError, OSError):
            return
        pipe.send(run(function, arguments))


def begin(threads: int, log: Path | None, log_level: int) -> None:
    """Sets up a worker's threads and its log.

    Args:
        threads: Threads that it computes with.
        log: File to which it appends; None: standard error.
        log_level: Least level of fedslm's own lines; other libraries' begin at WARNING.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if log is not None:
        form = "%(asctime)s %(process)d %(name)s %(levelname)s %(message)s"
        options: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace", "force": True}
        logging.basicConfig(filename=log, level=logging.WARNING, format=form, **options)
        logging.getLogger("fedslm").setLevel(log_level)
        logging.captureWarnings(True)
    set_threads(threads)
