"""A whole federation on one machine, to try it out: the server and all nodes, with simulated data.

Every key is stored on one disk, so this protects nobody: use it only for demonstrations and tests.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path

from fedslm import layout
from fedslm.config import Config
from fedslm.data.federated import share_out
from fedslm.data.store import write_parquet
from fedslm.deployment import admission, enrolment, rosters
from fedslm.deployment.authority import certify
from fedslm.deployment.control import connected
from fedslm.deployment.server import running
from fedslm.deployment.settings import FEDERATION_FILE, NODE_FILE
from fedslm.errors import Unusable
from fedslm.storage import write_text

SERVER, HOST = "server", "127.0.0.1"
_RECORDS = "records.parquet"
_BUDGETS = 4


def make_lab(directory: Path, config: Config, *, port: int, inner_port: int) -> list[Path]:
    """Creates a server and ``federation.num_clients`` admitted nodes with one client's records each.

    Args:
        directory: A new directory.
        config: A simulation's config: defines the data and how they are partitioned.
        port: Port of the proxy.
        inner_port: Port of the SuperLink.

    Returns:
        The nodes' directories, by client index.

    Raises:
        RunError: The directory exists, or the server does not start.
        DataError: The data have a problem that would stop a client later.
    """
    if directory.exists():
        raise Unusable(f"{directory} exists: give a new directory")
    server, count = directory.absolute() / SERVER, config.federation.num_clients
    shared = share_out(
        config.data, config.task, config.privacy, num_clients=count, seed=config.run.seed
    )
    nodes = [directory.absolute() / f"node-{client}" for client in range(count)]
    for node, (_, records) in zip(nodes, shared.shards, strict=True):
        node.mkdir(parents=True)
        write_parquet(node / _RECORDS, [records])
        write_text(node / NODE_FILE, _node_file(node, records.column_names))
        write_text(node / layout.POLICY, _policy(config))
    ports = f"port = {port}\ninner_port = {inner_port}\n"
    write_text(server / FEDERATION_FILE, f'name = "lab"\nhost = "{HOST}"\n{ports}')
    certify(server)
    with running(server, threading.Event()), connected(server) as control:
        for node in nodes:
            request = enrolment.enroll(node, node.name)
            _, told = admission.admit(server, request, control.register)
            admission.accept(node, told)
    rosters.sign_roster(server)
    return nodes


def _node_file(node: Path, columns: list[str]) -> str:
    """Settings of a node of the lab."""
    values = {"name": node.name, "source": str(node / _RECORDS), "columns": columns}
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())


def _policy(config: Config) -> str:
    """A policy that allows what a config requests, several times."""
    privacy, training, secure = config.privacy, config.training, config.secure_aggregation
    values: dict[str, object] = {
        "unit": privacy.unit,
        "unit_column": privacy.unit_column,
        "epsilon": _BUDGETS * (privacy.epsilon or 1.0),
        "delta": privacy.delta or 1e-5,
        "min_noise_multiplier": 0.1,
        "max_clip_norm": privacy.clip_norm,
        "max_sample_rate": privacy.sample_rate or 1.0,
        "max_records_per_unit": privacy.max_records_per_unit,
        "max_steps_per_round": training.local_steps,
        "max_rounds_per_day": 1000,
        "base_models": ["any"],
        "tasks": [config.task.name],
        "weakest_passes": privacy.passes,
        "metrics": "none" if privacy.metric_noise_multiplier is None else "noisy",
        "min_metric_noise_multiplier": privacy.metric_noise_multiplier,
        "allow_distributed_noise": privacy.shares_noise,
        "least_honest_nodes": None
        if secure.threshold is None
        else secure.threshold - secure.max_colluding,
        "most_colluding_nodes": secure.max_colluding if privacy.shares_noise else None,
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items() if value is not None]
    return "# For a lab: it allows what the config asks for.\n" + "\n".join(lines) + "\n"
