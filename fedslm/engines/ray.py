"""Flower's simulation on Ray: the same server and client functions, in Ray actors."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TypeVar

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedslm.client.app import client_app
from fedslm.config import EngineConfig
from fedslm.errors import FederationError

T = TypeVar("T")


def run_on_ray(serve: Callable[[Grid], T], num_clients: int, engine: EngineConfig) -> T:
    """Runs a server function against simulated nodes on Ray.

    Args:
        serve: The server function; it is called with the grid.
        num_clients: Number of simulated nodes.
        engine: Worker processes and their threads.

    Returns:
        The return value of ``serve``.

    Raises:
        FederationError: Ray is not installed, or the simulation crashed.
    """
    try:
        import ray  # noqa: F401  (a clear error now, rather than Flower's exit later)
    except ImportError:
        raise FederationError('engine.name="ray" needs Ray: pip install "fedslm[simulation]"') from None
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    from flwr.simulation import run_simulation

    flower = logging.getLogger("flwr")
    flower.setLevel(logging.ERROR)
    flower.propagate = False

    app, results, errors = ServerApp(), list[T](), list[BaseException]()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            results.append(serve(grid))
        except BaseException as error:
            errors.append(error)
            raise

    workers = os.cpu_count() or 1 if engine.workers < 1 else engine.workers
    os.environ["OMP_NUM_THREADS"] = str(engine.threads_per_worker)  # the actors inherit it
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    options = {
        "init_args": {
            "num_cpus": workers,
            "include_dashboard": False,
        },
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
    }
    try:
        run_simulation(app, client_app(), num_clients, backend_config=options)  # type: ignore[arg-type]
    except Exception as error:
        raise errors[0] if errors else FederationError(f"Ray: {error}") from error
    if not results:
        raise FederationError("the simulation on Ray ended without a result")
    return results[0]
