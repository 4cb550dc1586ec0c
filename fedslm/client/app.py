"""The Flower ClientApp; ``clients/app.py`` on a client is a one-line wrapper of it."""

from __future__ import annotations

from flwr.clientapp import ClientApp

from fedslm.client.handlers import hello, train
from fedslm.client.personal import measure


def client_app() -> ClientApp:
    """The ClientApp that every engine runs."""
    app = ClientApp()
    app.train()(train)
    app.evaluate()(measure)
    app.query("hello")(hello)
    return app
