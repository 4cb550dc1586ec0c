"""A Flower ``Grid`` whose clients run on this machine: in worker processes, or in this process."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedslm.client.handlers import hello, secagg, train
from fedslm.client.personal import measure
from fedslm.protocol.legs import SECAGG
from fedslm.protocol.messages import HELLO, MEASURE, TRAIN
from fedslm.scheduling import WorkerDied
from fedslm.worker_process import Failure
from fedslm.workers import Pool

logger = logging.getLogger(__name__)
_POLL_SECONDS = 0.5
_SERVER_NODE_ID = 1
_FIRST_NODE_ID = 2
_CLIENT_RAISED = 2
_CLIENT_DIED = 8
_REASONS = {
    _CLIENT_RAISED: "the client raised an error; see its log",
    _CLIENT_DIED: "the client's worker died; see its log",
}


class LocalGrid(Grid):
    """Runs the same client functions as any other grid.

    Messages start in the order in which they were pushed; replies may be pulled in any order, and at
    most two replies per worker wait to be pulled.

    Args:
        num_clients: Size of the population.
        pool: The workers in which clients run.
    """

    def __init__(self, num_clients: int, pool: Pool) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 0, _SERVER_NODE_ID
        self._num_clients = num_clients
        self._pool = pool
        self._run = Run.create_empty(0)
        self._jobs: dict[str, tuple[int, Message]] = {}

    def set_run(self, run: Run) -> None:
        """Sets the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Creates a message."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> range:
        """Ids of all clients; each is always available."""
        return range(_FIRST_NODE_ID, _FIRST_NODE_ID + self._num_clients)

    @property
    def clients(self) -> dict[int, int]:
        """Client index to node id: in this process nobody has to be asked."""
        return {client: _FIRST_NODE_ID + client for client in range(self._num_clients)}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queues messages in order."""
        identifiers = []
        for message in messages:
            identifier = str(uuid4())
            message.metadata.__dict__["_message_id"] = identifier
            client = self._client_of(message.metadata.dst_node_id)
            job = self._pool.submit(handle, message, self._context(client), client=client)
            self._jobs[identifier] = (job, message)
            identifiers.append(identifier)
        return identifiers

    def _client_of(self, node: int) -> int:
        """The client with a node id.

        Raises:
            ValueError: There is no such node.
        """
        if node not in self.get_node_ids():
            raise ValueError(f"node_id={node} is not one of the {self._num_clients} clients")
        return node - _FIRST_NODE_ID

    def _context(self, client: int) -> Context:
        """What Flower gives a client with a message; made when it is asked, since most never are."""
        return Context(
            run_id=0,
            node_id=_FIRST_NODE_ID + client,
            node_config={"partition-id": client, "num-partitions": self._num_clients},
            state=RecordDict(),
            run_config={},
        )

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Returns the available replies; waits a short while for the first."""
        replies: list[Message] = []
        for identifier in message_ids:
            if identifier not in self._jobs:
                continue
            job, message = self._jobs[identifier]
            result = self._pool.poll(job, 0.0 if replies else _POLL_SECONDS)
            if result is not None:
                del self._jobs[identifier]
                replies.append(reply_of(message, result))
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Pushes messages and pulls replies until all have arrived or the time is over."""
        pending = list(self.push_messages(messages))
        deadline = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while pending and (deadline is None or time.monotonic() < deadline):
            pulled = list(self.pull_messages(pending))
            answered = {reply.metadata.reply_to_message_id for reply in pulled}
            pending = [identifier for identifier in pending if identifier not in answered]
            replies += pulled
        self.forget(pending)
        return replies

    def forget(self, message_ids: Iterable[str]) -> None:
        """Cancels messages: queued ones never start, running ones are stopped."""
        known = [identifier for identifier in message_ids if identifier in self._jobs]
        self._pool.abandon([self._jobs.pop(identifier)[0] for identifier in known])

    def forget_all(self) -> None:
        """Cancels every message that has no reply yet."""
        self.forget(list(self._jobs))


def handle(message: Message, context: Context) -> Message:
    """Routes a message to the client function, as a Flower ClientApp does."""
    match message.metadata.message_type:
        case "train":
            return train(message, context)
        case "evaluate":
            return measure(message, context)
        case "query.hello":
            return hello(message, context)
        case "query.secagg":
            return secagg(message, context)
        case other:
            known = ", ".join([TRAIN, MEASURE, HELLO, SECAGG])
            raise ValueError(f"unknown message type {other!r}; known: {known}")


def wait_for(
    pool: Pool,
    job: int,
    message: Message,
    seconds: float,
    goes_on: Callable[[], bool] = lambda: True,
) -> Message:
    """The reply of a job to a message; an error if it does not arrive in time.

    A worker that takes too long is replaced, so that the next message gets a working one.

    Args:
        pool: The workers.
        job: Number of the job.
        message: The message that it answers.
        seconds: Time limit.
        goes_on: False to give the job up before.
    """
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0 and goes_on():
        result = pool.poll(job, min(left, _POLL_SECONDS))
        if result is not None:
            return reply_of(message, result)
    pool.abandon([job])
    return Message(Error(code=_CLIENT_DIED, reason="no reply in time"), reply_to=message)


def reply_of(message: Message, result: object) -> Message:
    """Unwraps a worker's result, or turns its failure into Flower's error message.

    A failure is sent as one fixed text for its kind: an exception's own text may quote a record.
    """
    if isinstance(result, Failure):
        code = _CLIENT_DIED if isinstance(result.error, WorkerDied) else _CLIENT_RAISED
        logger.error("%s", result.details or result.error)
        return Message(Error(code=code, reason=_REASONS[code]), reply_to=message)
    reply: Message = result[0]  # type: ignore[index]
    return reply
