"""The application bundle that Flower sends from the server to the nodes.

A bundle of one version of fedslm has the same bytes everywhere, whatever a run's config (the config is
sent as overrides), so that its hash can be approved once. A node runs none of its code: it runs its own
installed fedslm, and only for bundles whose hash it approves.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache

import fedslm
from fedslm.config import Config

_CLIENT = b'''"""Nodes run their own installed fedslm."""

from fedslm.client.app import client_app

app = client_app()
'''
_SERVER = b'''"""All of it is in fedslm, which is installed at the server."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedslm.flower import serve_flower

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the federation that the run config describes."""
    serve_flower(grid, context.run_config, context.run_id)
'''
_HEAD = """[project]
name = "fedslm-federation"
version = "{version}"
description = "One federation of fedslm"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedslm"
fab-include = ["federation/*.py"]

[tool.flwr.app.components]
serverapp = "federation.server:app"
clientapp = "federation.client:app"

[tool.flwr.app.config]
"""


@cache
def bundle() -> bytes:
    """This version's bundle."""
    from flwr.cli.build import build_fab_from_files

    files = {
        "pyproject.toml": (_HEAD.format(version=fedslm.__version__) + _defaults()).encode(),
        "federation/__init__.py": b'"""A federation."""\n',
        "federation/client.py": _CLIENT,
        "federation/server.py": _SERVER,
    }
    content: bytes = build_fab_from_files(files)[0]
    return content


def sha256_of(content: bytes) -> str:
    """Hash of a bundle's bytes, by which Flower identifies it."""
    return hashlib.sha256(content).hexdigest()


def _defaults() -> str:
    """Every key with a value of its type: Flower's overrides may use only existing keys."""
    config = Config.model_validate(
        {
            "model": {"base": "demo"},
            "data": {"source": "demo"},
            "task": {"name": "classification"},
            "privacy": {"unit": "none"},
        }
    )
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in config.flat().items())
