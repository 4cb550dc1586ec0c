"""The Flower ClientApp; ``clients/app.py`` on a client is a one-line wrapper of it."""

from __future__ import annotations

import time
from collections.abc import Callable

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedslm.client.handlers import hello, refusal, secagg, train
from fedslm.client.pace import Pace, period_of
from fedslm.client.personal import measure
from fedslm.errors import FederationError, PolicyRefused
from fedslm.protocol.legs import SECAGG
from fedslm.protocol.lifetime import work_seconds

Handler = Callable[[Message, Context], Message]


def client_app() -> ClientApp:
    """The ClientApp for Flower's own engines: Ray, and a SuperNode at a real node.

    A node that ``fedslm node`` runs does not use it: that holds replies back after they are signed.
    """
    app, pace = ClientApp(), Pace()
    app.train()(paced(train, pace, _slept))
    app.evaluate()(paced(measure, pace, _slept))
    app.query("hello")(hello)
    app.query(SECAGG.removeprefix("query."))(secagg)
    return app


def paced(answer: Handler, pace: Pace, stopped: Callable[[float], bool]) -> Handler:
    """A handler whose replies return at their time (:mod:`fedslm.client.pace`), at a real node.

    Flower packs and sends a reply afterwards. Work is not stopped at a time limit, and a process that
    answers one message, as a SuperNode may start it, does not remember an earlier reply that was late.

    Args:
        answer: The handler.
        pace: Decides when its replies leave.
        stopped: Waits for up to the given number of seconds; True if the process must stop.
    """

    def answered(message: Message, context: Context) -> Message:
        try:
            pace.begin(period_of(context), work_seconds(message.metadata.ttl))
        except (FederationError, PolicyRefused) as error:
            return refusal(message, error)
        try:
            return answer(message, context)
        finally:
            pace.wait(stopped)

    return answered


def _slept(seconds: float) -> bool:
    """Waits; a signal that ends the process ends this too."""
    time.sleep(seconds)
    return False
