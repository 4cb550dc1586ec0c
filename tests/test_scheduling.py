"""Which worker gets which job when workers are lost: no job is lost with them, none is run out of turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from fedslm.errors import FederationError
from fedslm.scheduling import Job, Worker, WorkerDied, Workers
from fedslm.worker_process import Failure


@dataclass(eq=False)
class Hand:
    """A worker that a test drives: what it was given, and whether it is there."""

    name: int
    given: list[Job] = field(default_factory=list)
    is_alive: bool = True
    has_begun: bool = True
    is_done: bool = False


class Driven(Workers[Hand]):
    """Workers whose jobs end, and which die, when a test says so."""

    def __init__(self, num_workers: int, *, attempts: int = 2, spare: int = 0) -> None:
        self.hands: list[Hand] = []
        self.spare = spare
        super().__init__(num_workers, attempts=attempts)

    def _start(self) -> Hand:
        self.hands.append(Hand(len(self.hands)))
        return self.hands[-1]

    def _replacement(self) -> Hand | None:
        if not self.spare:
            return None
        self.spare -= 1
        return self._start()

    def _has_begun(self, handle: Hand) -> bool:
        return handle.has_begun

    def _is_alive(self, handle: Hand) -> bool:
        return handle.is_alive

    def _send(self, handle: Hand, job: Job) -> None:
        handle.given.append(job)
        handle.is_done = False

    def _ready(self, busy: Sequence[Worker[Hand]], timeout_seconds: float) -> Sequence[Worker[Hand]]:
        return [worker for worker in busy if worker.handle.is_done or not worker.handle.is_alive]

    def _receive(self, handle: Hand) -> Any:
        if not handle.is_alive:
            raise EOFError
        return (handle.given[-1].function(*handle.given[-1].arguments),)

    def _end(self, handle: Hand, *, kill: bool = False) -> str:
        handle.is_alive = False
        return "a worker died"

    def _stop(self, handles: Sequence[Hand]) -> None:
        for handle in handles:
            handle.is_alive = False

    def finish(self) -> None:
        """Ends all jobs that are being worked on."""
        for hand in self.hands:
            hand.is_done = True


def result_of(workers: Driven, job: int) -> Any:
    """What comes of a job if everything that runs ends at once."""
    for _ in range(50):
        workers.finish()
        if (found := workers.poll(job, 0.0)) is not None:
            return found
    return "never"


def same(number: int) -> int:
    """A job."""
    return number


def test_a_job_is_not_lost_with_an_idle_worker_that_has_no_replacement() -> None:
    """Another one gets it."""
    workers = Driven(2)
    workers.hands[0].is_alive = False
    jobs = [workers.submit(same, number) for number in range(3)]
    assert [result_of(workers, job) for job in jobs] == [(0,), (1,), (2,)]
    assert workers.num_workers == 1


def test_a_worker_that_has_not_begun_gets_no_job() -> None:
    """Neither a new one nor the replacement of a lost one; the others do its part."""
    workers = Driven(2, spare=1)
    workers.hands[0].has_begun = False
    jobs = [workers.submit(same, number) for number in range(4)]
    assert [result_of(workers, job) for job in jobs] == [(0,), (1,), (2,), (3,)]
    assert not workers.hands[0].given


def test_a_job_is_tried_again_once() -> None:
    """After that it has failed: what it did to two workers it may do to all."""
    workers = Driven(1, spare=5)
    job = workers.submit(same, 7)
    workers.hands[0].is_alive = False
    assert result_of(workers, job) == (7,)
    job = workers.submit(same, 8)
    for hand in (1, 2):
        workers.hands[hand].is_alive = False
        found = workers.poll(job, 0.0)
    assert isinstance(found, Failure)
    assert isinstance(found.error, WorkerDied)


def test_jobs_that_are_tried_again_keep_their_turn() -> None:
    """Also when results fill the window: the one that is waited for runs."""
    workers = Driven(4)
    jobs = [workers.submit(same, number) for number in range(16)]
    lost = [hand for hand in workers.hands if hand.given and hand.given[0].number in jobs[:2]]
    for hand in lost:
        hand.is_alive = False
    workers.poll(jobs[2], 0.0)
    assert [job.number for job in workers._queue] == sorted(job.number for job in workers._queue)
    for number in (*range(2, 10), 0, 1, *range(10, 16)):
        assert result_of(workers, jobs[number]) == (number,)


def test_without_any_worker_nothing_waits_for_ever() -> None:
    """The last one that is lost ends the run."""
    workers = Driven(1)
    job = workers.submit(same, 1)
    workers.hands[0].is_alive = False
    with pytest.raises(FederationError, match="no worker is left"):
        workers.poll(job, 0.0)
