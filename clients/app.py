"""The Flower ClientApp: all of it is in fedslm, which is installed on the node."""

from fedslm.client.app import client_app

app = client_app()
