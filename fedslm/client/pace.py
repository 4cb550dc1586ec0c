"""When a reply may leave a node: at a public time after its request, not when the work is done.

A private round takes longer the more records were sampled, and a server can time it. With
``answer_after_seconds`` in its policy a deployed node holds every reply back until a time that does not
depend on the records, in the manner of Askarov, Zhang and Myers, "Predictive black-box mitigation of
timing channels" (CCS 2010): a period that is doubled when it was too short.

Formal guarantees, for a policy with ``answer_after_seconds`` and by this machine's monotonic clock:
    * A reply leaves 1, 2, 4, 8 … periods after the node had the whole request, at the first of these
      times at which it is complete and signed; what is left to do then depends on its size only. This
      holds for an update, a refusal, a failure, a worker that died, and a stored release that is sent
      again.
    * A reply that is not complete after one period leaves at a later one of these times, which the
      server sees. From then on no reply of this process leaves sooner: whatever work the server
      requests, replies of one process become later at most log2(86,400 / period) times, rounded up.
    * Work is stopped at the last of these times that its exchange leaves, and the reply is then an
      error: a server learns no more by a time limit of its own. Stopped work makes later replies later,
      too.
    * A request whose exchange is too short for one period is refused at once, before a record is read.
      This depends on the request, on the policy and on earlier replies' times only.
    * The node asks for its next message only when this reply has left, and so tells nothing more.

Edge cases:
    * A node that is stopped during the work or the wait gives the work up and sends nothing; the charge
      stays. The server sees when the node was stopped, which is its operator's choice.
    * A node that is killed sends nothing. A restarted one begins with one period again.
    * At the end of a node's hours (``conditions``) a reply still waits for its time.
    * The clock does not count the time for which a machine is suspended. A reply may leave some
      milliseconds late, by the system's timer; never early.
    * The policy is read when the request arrives. One that cannot be read refuses the request.
    * In a simulation nothing waits: nobody outside sees its times.

*Not* hidden: that a worker died, the load of the machine, and what its operator can see.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from flwr.app import Context

from fedslm.client.node import Node
from fedslm.errors import NeedsTime
from fedslm.protocol.lifetime import DAY_SECONDS, deadline_with

logger = logging.getLogger(__name__)
Stopped = Callable[[float], bool]


@dataclass(frozen=True)
class _Turn:
    """The request that is being answered: when it began, its period, and its last possible time."""

    began: float
    period: float
    last: float


class Pace:
    """Decides when replies leave; one for a node's process, which answers one request at a time.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._least = 0.0
        self._turn: _Turn | None = None
        self._until = 0.0

    @property
    def holds(self) -> bool:
        """Whether the current reply is held back."""
        return self._turn is not None

    def begin(self, period: float | None, seconds: float) -> None:
        """Starts the time of a request that has just arrived.

        Args:
            period: The policy's ``answer_after_seconds``; None: the reply leaves when it is ready.
            seconds: How long its exchange may take, in [0, 86,400].

        Raises:
            NeedsTime: The exchange is too short for a reply at its time; the refusal leaves at once.
        """
        now, self._turn = self._clock(), None
        self._until = now + seconds
        if period is None:
            return
        own = period
        while own < self._least:
            own *= 2
        if seconds < (needed := deadline_with(own)):
            raise NeedsTime(
                f"this node answers after {own:g} s, and the request leaves {seconds:g} s: set "
                f"federation.round_deadline_seconds to at least {needed:g}",
                min(own, DAY_SECONDS),
            )
        last = own
        while 2 * last <= seconds:
            last *= 2
        self._turn, self._until = _Turn(now, own, last), now + last

    def left(self) -> float:
        """Seconds that are left for the work on the current request."""
        return max(0.0, self._until - self._clock())

    def wait(self, stopped: Stopped) -> bool:
        """Waits until the reply may leave; returns at once if it is not held back.

        Args:
            stopped: Waits for up to the given number of seconds; True if the node must stop.

        Returns:
            False if the node must stop before: then the reply must not be sent.
        """
        turn, self._turn = self._turn, None
        if turn is None:
            return True
        took = self._clock() - turn.began
        due = turn.period
        while due < min(took, turn.last):
            due *= 2
        self._note(turn, took, due)
        while (left := turn.began + due - self._clock()) > 0:
            if stopped(left):
                return False
        return True

    def _note(self, turn: _Turn, took: float, due: float) -> None:
        """Logs, for this node's operator, how long the work took; remembers a period that was short."""
        if took <= turn.period:
            logger.info("the work took %.1f s; the reply leaves after %g s", took, due)
            return
        self._least = due if took <= turn.last else 2 * turn.last
        text = (
            "the work took %.1f s, more than the %g s after which this node answers, and the server "
            "sees that; until a restart this node answers after %g s: set answer_after_seconds in the "
            "policy to more than a round takes here"
        )
        logger.warning(text, took, turn.period, self._least)


def period_of(context: Context) -> float | None:
    """The period after which a node answers; None in a simulation, or if its policy names none.

    Raises:
        FederationError: The context describes no node.
        PolicyRefused: The policy cannot be read.
    """
    node = Node.of(context, "")
    policy = node.policy() if node.deployed else None
    return None if policy is None else policy.answer_after_seconds
