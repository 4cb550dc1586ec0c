"""A Ray cluster: how to reach it, what it has, and whether its nodes can take part in a run.

Only messages go through Ray. The clients' data, their ledgers and the base are files: every node must
see the run's directory, and the base, under the same paths, as on a shared file system.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import fedslm
from fedslm.config import EngineConfig
from fedslm.engines.placement import cores
from fedslm.errors import FederationError, plural
from fedslm.fingerprint import code_fingerprint

_CONNECT_SECONDS, _CHECK_SECONDS = 5.0, 120.0
_MARK = ".seen-by-ray"


@dataclass(frozen=True)
class Needs:
    """What the workers need to see and to be.

    Attributes:
        directory: The run's directory.
        base: The base, if it is a path on this machine.
        log: File to which the workers append their logs.
        most: The most workers that can be busy at once.
    """

    directory: Path
    base: Path | None
    log: Path
    most: int


def alive(ray: Any) -> list[Mapping[str, Any]]:
    """The cluster's nodes that are alive."""
    return [node for node in ray.nodes() if node["Alive"]]


def capacity(nodes: Sequence[Mapping[str, Any]], engine: EngineConfig) -> int:
    """How many workers fit on some nodes; each is on one node.

    Args:
        nodes: Ray's descriptions: what each node has is in ``Resources``.
        engine: What a worker takes.

    >>> node = {"Resources": {"CPU": 4.0, "GPU": 1.0}}
    >>> capacity([node, node], EngineConfig(cpus_per_client=2, gpus_per_client=0.5))
    4
    """
    wants = {"CPU": engine.cpus_per_client, "GPU": engine.gpus_per_client}
    return sum(
        min(int(node["Resources"].get(name, 0.0) / each + 1e-9) for name, each in wants.items() if each)
        for node in nodes
    )


def workers_on(nodes: Sequence[Mapping[str, Any]], engine: EngineConfig, most: int) -> int:
    """How many workers a run gets on some nodes.

    Args:
        nodes: As for :func:`capacity`.
        engine: How many are asked for, and what each takes.
        most: The most workers that can be busy at once.

    Raises:
        FederationError: There is no room for as many as are asked for, or for one.
    """
    asked, room = engine.workers, capacity(nodes, engine)
    if room < max(1, asked):
        cpus, gpus = (sum(node["Resources"].get(key, 0.0) for node in nodes) for key in ("CPU", "GPU"))
        wanted = f"engine.workers={asked} do not fit: " if asked > 0 else ""
        raise FederationError(
            f"{wanted}the cluster has room for {plural(room, 'worker')} of engine.cpus_per_client="
            f"{engine.cpus_per_client:g} and engine.gpus_per_client={engine.gpus_per_client:g}, each "
            f"on one node; it has {cpus:g} CPUs and {gpus:g} GPUs on {plural(len(nodes), 'node')}"
        )
    return asked if asked > 0 else min(room, most)


def survey(engine: EngineConfig) -> list[Mapping[str, Any]]:
    """Ray's descriptions of a cluster's nodes; starts nothing there.

    Args:
        engine: The address, and what a worker takes.

    Raises:
        FederationError: Ray is not installed, or the cluster does not answer.
    """
    ray = library()
    connect(ray, engine, 1)
    try:
        return alive(ray)
    finally:
        ray.shutdown()


def library() -> Any:
    """Ray itself.

    Raises:
        FederationError: It is not installed.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # of a Ray that is started here
    try:
        import ray
    except ImportError:
        raise FederationError('engine.name="ray" needs Ray: pip install "fedslm[simulation]"') from None
    return ray


@contextmanager
def _as_one_error() -> Iterator[None]:
    """Turns what Ray raises while it connects into a FederationError."""
    try:
        yield
    except FederationError:
        raise
    except Exception as error:
        first = str(error).strip().splitlines()[:1]
        raise FederationError(f"Ray: {''.join(first)[:300] or type(error).__name__}") from error


def own_workers(engine: EngineConfig, most: int) -> int:
    """How many workers a run gets in a Ray that is started on this machine for it."""
    return engine.workers if engine.workers > 0 else min(cores(), most)


@_as_one_error()
def connect(ray: Any, engine: EngineConfig, most: int) -> None:
    """Joins a cluster, or starts one on this machine.

    Raises:
        FederationError: The address cannot be used, or this process uses Ray already.
    """
    if ray.is_initialized():
        raise FederationError(
            "this process is connected to Ray already; call ray.shutdown() first, and name the cluster "
            "by engine.address"
        )
    options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False}
    options |= {"namespace": f"fedslm-{uuid4().hex}", "logging_level": logging.ERROR}
    if engine.address is None:
        cpus = math.ceil(own_workers(engine, most) * engine.cpus_per_client - 1e-9)
        ray.init(address="local", num_cpus=cpus, **options)  # whatever cluster this machine belongs to
        return
    if engine.address != "auto":
        _knock(engine.address)
    try:
        ray.init(address=engine.address, **options)
    except ConnectionError as error:
        raise FederationError(
            f"engine.address={engine.address!r}: no Ray cluster answers on this machine; start this "
            f"machine's node with `ray start --address HOST:PORT`, and give the same address here"
        ) from error


def _knock(address: str) -> None:
    """Refuses an address where nobody listens: Ray itself would wait for minutes.

    Raises:
        FederationError: It is not HOST:PORT, or does not answer.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise FederationError(
            f'engine.address={address!r} must be HOST:PORT, such as 10.0.0.1:6379, or "auto"'
        )
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS):
            return
    except (OSError, ValueError, OverflowError) as error:
        raise FederationError(
            f"engine.address={address!r} does not answer ({error}); give "
            f"the address that `ray start --head` prints, such as 10.0.0.1:6379"
        ) from error


def check_nodes(ray: Any, needs: Needs) -> None:
    """Checks that every node runs this code and sees the run's files.

    Raises:
        FederationError: Names each node that does not, and why.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    mark, secret = needs.directory / _MARK, uuid4().hex
    mark.write_text(secret, encoding="ascii")
    probe = ray.remote(_seen_there)
    try:
        asked = {
            node["NodeID"]: probe.options(
                num_cpus=0,
                max_retries=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            ).remote(mark, needs.base)
            for node in alive(ray)
        }
        until, problems = time.monotonic() + _CHECK_SECONDS, {}
        for node, result in asked.items():
            problem = _problem(ray, result, max(0.0, until - time.monotonic()), secret, needs)
            if problem:
                problems[node] = problem
    finally:
        mark.unlink(missing_ok=True)
    said = [  # a node that was lost meanwhile is nobody's problem
        f"node {node['NodeManagerAddress']} ({node['NodeID'][:8]}) {problems[node['NodeID']]}"
        for node in alive(ray)
        if node["NodeID"] in problems
    ]
    if said:
        where = ray.get_runtime_context().gcs_address
        raise FederationError(f"the Ray cluster at {where} cannot be used: " + "; ".join(said))


def _problem(ray: Any, result: Any, seconds: float, secret: str, needs: Needs) -> str:
    """Why a node cannot take part; empty if it can."""
    install = f"install fedslm=={fedslm.__version__} there as it is here"
    try:
        there = ray.get(result, timeout=seconds)
    except ray.exceptions.GetTimeoutError:
        return f"does not answer within {_CHECK_SECONDS:g} s"
    except ray.exceptions.RayError as error:
        last = str(error).strip().splitlines()[-1:]
        return f"cannot run fedslm ({''.join(last)[:200]}); {install}"
    if there["version"] != fedslm.__version__:
        return f"runs fedslm {there['version']}, this process {fedslm.__version__}; {install}"
    if there["code"] != code_fingerprint():
        return (
            f"runs other code or libraries (Python {there['python']}, here {_python()}); {install}, "
            f"with the same versions of its libraries"
        )
    if there["mark"] != secret:
        return (
            f"does not see {needs.directory}; put run.directory on a file system that all nodes share"
        )
    if not there["base"]:
        return f"does not see the base {needs.base}; put it on a file system that all nodes share"
    return ""


def _seen_there(mark: Path, base: Path | None) -> dict[str, Any]:
    """What a node is and sees; runs there."""
    try:
        seen = mark.read_text(encoding="ascii")
    except (OSError, ValueError):
        seen = ""
    return {
        "version": fedslm.__version__,
        "code": code_fingerprint(),
        "python": _python(),
        "mark": seen,
        "base": base is None or base.exists(),
    }


def _python() -> str:
    """Python's version."""
    return ".".join(map(str, sys.version_info[:3]))
