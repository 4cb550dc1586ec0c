"""What leaves a client whose function raised, or whose worker died."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from flwr.app import Message, RecordDict
from support.served import context_of

from fedslm.engines.local import LocalGrid, handle, reply_of, wait_for
from fedslm.errors import DataError, FederationError
from fedslm.federation.population import join
from fedslm.scheduling import WorkerDied
from fedslm.worker_process import Failure
from fedslm.workers import InlinePool

RECORD = "Jane Doe, born in 1961, has been diagnosed"
RAISED = "the client raised an error; see its log"


def message(kind: str = "train") -> Message:
    """Something that a server asks."""
    LocalGrid(1, InlinePool())  # tells Flower who sends
    made = Message(RecordDict({}), 2, kind)
    made.metadata.__dict__["_message_id"] = "1"
    return made


def stumble(error: Exception) -> None:
    """A job that quotes a record."""
    raise error


@pytest.mark.parametrize("kind", [ValueError, KeyError, MemoryError, DataError, FederationError])
def test_no_text_of_an_exception_leaves(
    kind: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    """One fixed text leaves, whatever was raised; what it was is in the node's own log."""
    logger, pool = logging.getLogger("fedslm.engines.local"), InlinePool()
    logger.addHandler(caplog.handler)  # whatever an earlier test made of the loggers above
    job = pool.submit(stumble, kind(RECORD))
    reply = wait_for(pool, job, message(), 60.0)
    logger.removeHandler(caplog.handler)
    assert (reply.error.code, reply.error.reason) == (2, RAISED)
    assert RECORD in caplog.text


def test_a_job_is_given_up_in_time_or_when_it_must_be() -> None:
    """It is abandoned, and the answer is one fixed error: nothing of the job leaves."""
    for seconds, goes_on in ((0.0, True), (3600.0, False)):
        pool = InlinePool()
        job = pool.submit(stumble, ValueError(RECORD))
        reply = wait_for(pool, job, message(), seconds, lambda goes_on=goes_on: goes_on)
        assert (reply.error.code, reply.error.reason) == (8, "no reply in time")
        assert job not in pool._queue


def test_how_a_worker_died_does_not_leave() -> None:
    """The exit code tells what a record did to the process; it stays here."""
    reply = reply_of(message(), Failure(WorkerDied("a worker died (exit code -11)"), ""))
    assert (reply.error.code, reply.error.reason) == (8, "the client's worker died; see its log")


def test_a_message_of_no_known_type_is_an_error(tmp_path: Path) -> None:
    """What a server calls its message does not come back to it."""
    pool, asked = InlinePool(), message("train.secret")
    reply = wait_for(pool, pool.submit(handle, asked, context_of(0, tmp_path)), asked, 60.0)
    assert reply.error.reason == RAISED


def test_a_large_population_costs_nothing_before_it_is_asked() -> None:
    """Nobody is asked who it is, and no client has a context before it gets a message."""
    grid = LocalGrid(10**15, InlinePool())  # with anything for each client, this would not end
    assert grid.get_node_ids() == range(2, 10**15 + 2)
    assert grid._context(10**15 - 1).node_config["partition-id"] == 10**15 - 1
    assert join(LocalGrid(3, InlinePool()), 3, 0.0) == {0: 2, 1: 3, 2: 4}


@pytest.mark.parametrize("node", [1, 5])
def test_a_node_that_does_not_exist_is_an_error(node: int) -> None:
    """Neither the server nor one beyond the last client is a client."""
    grid = LocalGrid(3, InlinePool())
    with pytest.raises(ValueError, match=f"node_id={node} is not one of the 3 clients"):
        grid.push_messages([Message(RecordDict({}), node, "train")])
