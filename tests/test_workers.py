"""Worker processes: order, failures, memory, and an end without orphans."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.pace import patient

from fedslm.errors import DataError, FederationError
from fedslm.scheduling import WorkerDied
from fedslm.worker_process import Failure
from fedslm.workers import InlinePool, WorkerPool


def square(number: int) -> int:
    """A job."""
    return number * number


def who() -> int:
    """The worker's process."""
    return os.getpid()


def threads() -> int:
    """Threads that the worker computes with."""
    import torch

    return torch.get_num_threads()


def die() -> None:
    """Dies as a process that ran out of memory does."""
    os.kill(os.getpid(), 9)


def say() -> None:
    """Logs as a node does, and as a library does."""
    logging.getLogger("fedslm.models.loaded").info("ours")
    logging.getLogger("fedslm.models.loaded").warning("our warning")
    logging.getLogger("elsewhere").info("theirs")
    logging.getLogger("elsewhere").warning("their warning")


def refuse() -> None:
    """Raises one of our errors."""
    raise DataError("no such column")


def stumble() -> None:
    """Raises something else."""
    raise ZeroDivisionError


def sleep(seconds: float) -> float:
    """A long job."""
    time.sleep(seconds)
    return seconds


SCRIPT = """
import os
from fedslm.workers import WorkerPool
print("begins", flush=True)
pool = WorkerPool(1, is_forked={is_forked})
print(pool.call(os.getppid) > 0, pool.call(os.getpid) != os.getpid(), flush=True)
pool.close()
"""


PRELOADING = """
import loaded
from fedslm.workers import WorkerPool, preload
preload(private={private})
pool = WorkerPool(1)
print(pool.call(loaded.loaded), loaded.loaded())
pool.close()
"""
LOADED = """
import sys
def loaded():
    return sorted({"dp_accounting", "opacus", "scipy.stats"} & sys.modules.keys())
"""


def touch(path: Path, seconds: float) -> None:
    """Leaves a trace after a while."""
    time.sleep(seconds)
    path.touch()


def process() -> int:
    """Which process this is."""
    return os.getpid()


@pytest.fixture(scope="module")
def shared() -> Iterator[WorkerPool]:
    """Two workers for all tests of this file."""
    pool = WorkerPool(2)
    yield pool
    pool.close()


def test_results_come_for_the_job_that_is_asked(shared: WorkerPool) -> None:
    """Results may be claimed in any order, also far beyond the window of unclaimed ones."""
    jobs = [shared.submit(square, number) for number in range(20)]
    for job, number in reversed(list(zip(jobs, range(20), strict=True))):
        assert shared._wait(job) == number * number
    assert shared.map(square, [(2,), (3,)]) == [4, 9]


def test_unclaimed_results_are_bounded(shared: WorkerPool) -> None:
    """Jobs that nobody claims stop being started: memory is flat in the number of jobs."""
    seconds = patient(1.5)
    blocking = shared.submit(sleep, seconds)
    jobs = [shared.submit(square, number) for number in range(40)]
    assert shared._wait(blocking) == seconds
    assert 1 <= len(shared._results) <= 2 * shared.num_workers + 1
    shared.abandon(jobs)


def test_a_client_s_jobs_prefer_the_worker_that_has_read_its_records(shared: WorkerPool) -> None:
    """Every client stays with one worker; its job waits for it, even if the other is idle, until polled."""
    where: dict[int, set[int]] = {}
    for _ in range(3):
        for client in (1, 0, 3, 2):
            where.setdefault(client, set()).add(shared._wait(shared.submit(process, client=client)))
    assert where == {0: where[0], 1: where[1], 2: where[0], 3: where[1]}
    assert len(where[0]) == len(where[1]) == 1
    assert where[0] != where[1]
    first, second = (shared.submit(process, client=client) for client in (1, 3))
    assert [worker.job and worker.job.number for worker in shared._workers] == [None, first]
    assert {shared._wait(first)} == where[1]
    shared._wait(second)


def test_an_idle_worker_takes_the_jobs_of_another(shared: WorkerPool) -> None:
    """A preference is no bound: all clients of one worker use both."""
    jobs = [shared.submit(process, client=2 * number) for number in range(6)]
    assert len({shared._wait(job) for job in jobs}) == 2


def test_workers_compute_with_one_thread(shared: WorkerPool) -> None:
    """Each worker has one thread."""
    assert shared.map(threads, [(), ()]) == [1, 1]


@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING])
def test_a_log_holds_what_is_asked_of_it(tmp_path: Path, level: int) -> None:
    """Our own lines from a level on, and the warnings of all libraries."""
    pool = WorkerPool(1, log=tmp_path / "log", log_level=level)
    pool.call(say)
    pool.close()
    lines = (tmp_path / "log").read_text().splitlines()
    said = [re.split(" (?:INFO|WARNING) ", line)[1] for line in lines]
    ours = ["ours"] if level == logging.INFO else []
    assert said == [*ours, "our warning", "their warning"]


def test_own_errors_cross_the_pipe(shared: WorkerPool) -> None:
    """Our errors keep their type; others come with their traceback."""
    with pytest.raises(DataError, match="no such column"):
        shared.call(refuse)
    with pytest.raises(FederationError, match="ZeroDivisionError"):
        shared.call(stumble)


def test_dead_worker_fails_its_job_alone_and_is_replaced(shared: WorkerPool) -> None:
    """Kill -9 of a worker fails one job; the next ones run on a fresh worker."""
    before = set(shared.map(who, [(), (), (), ()]))
    with pytest.raises(WorkerDied, match="exit code"):
        shared.call(die)
    after = set(shared.map(who, [()] * 8))
    assert len(before | after) >= len(before) + 1
    assert shared.map(square, [(5,)] * 4) == [25] * 4


def test_a_worker_that_died_idle_costs_no_job(shared: WorkerPool) -> None:
    """A worker that is killed while it has nothing to do is replaced before a job reaches it."""
    killed = {shared.call(who) for _ in range(4)}
    for worker in killed:
        os.kill(worker, 9)
    for worker in shared._workers:
        if worker.handle.process.pid in killed:
            worker.handle.process.join(600)
    assert shared.map(square, [(3,), (4,)]) == [9, 16]


def test_abandoned_jobs_never_start(shared: WorkerPool, tmp_path: Path) -> None:
    """Queued jobs that are abandoned leave no trace; the pool goes on."""
    blocking = [shared.submit(sleep, 0.3) for _ in range(2)]
    queued = [shared.submit(touch, tmp_path / str(n), 0.0) for n in range(3)]
    shared.abandon(queued)
    for job in blocking:
        assert shared._wait(job) == 0.3
    assert shared.call(square, 3) == 9
    assert not list(tmp_path.iterdir())


def test_close_lets_running_jobs_finish(tmp_path: Path) -> None:
    """close(drain) waits for what runs and drops what is queued."""
    pool = WorkerPool(1)
    pool.submit(touch, tmp_path / "running", 0.5)
    time.sleep(0.1)
    pool.submit(touch, tmp_path / "queued", 0.0)
    processes = [worker.handle.process for worker in pool._workers]
    pool.close(drain_seconds=600)
    assert [path.name for path in tmp_path.iterdir()] == ["running"]
    assert not any(process.is_alive() for process in processes)


def test_inline_pool_has_the_same_interface() -> None:
    """The pool in this process runs jobs when they are asked for."""
    pool = InlinePool()
    job = pool.submit(square, 4)
    assert pool.poll(job, 0.0) == (16,)
    failed = pool.poll(pool.submit(refuse), 0.0)
    assert isinstance(failed, Failure)
    assert isinstance(failed.error, DataError)
    assert pool.map(square, [(1,), (2,)]) == [1, 4]
    assert {name for name in dir(InlinePool) if name[0] != "_"} == {
        name for name in dir(WorkerPool) if name[0] != "_"
    }


@pytest.mark.parametrize("is_forked", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_script_needs_no_guard(tmp_path: Path, is_forked: bool) -> None:
    """A script without ``if __name__ == "__main__"`` starts workers: they do not run it again."""
    script = tmp_path / "mine.py"
    script.write_text(SCRIPT.format(is_forked=is_forked))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (0, "begins\nTrue True\n"), done.stderr


@pytest.mark.slow  # two templates import torch
@pytest.mark.parametrize(
    ("private", "found"), [(True, ["dp_accounting", "opacus", "scipy.stats"]), (False, [])]
)
def test_workers_share_the_accountants_imports(tmp_path: Path, private: bool, found: list[str]) -> None:
    """For a private run they are imported before the workers are forked; never in the parent."""
    (tmp_path / "loaded.py").write_text(LOADED)
    script = tmp_path / "mine.py"
    script.write_text(PRELOADING.format(private=private))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (0, f"{found} []\n"), done.stderr
