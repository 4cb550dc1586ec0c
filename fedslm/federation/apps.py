"""The Flower ClientApp; ``clients/app.py`` at the edge is one line around it."""

from __future__ import annotations

from flwr.clientapp import ClientApp

from fedslm.federation import client, personal


def client_app() -> ClientApp:
    """The ClientApp that every engine runs."""
    app = ClientApp()
    app.train()(client.train)
    app.evaluate()(personal.measure)
    app.query("hello")(client.hello)
    return app
