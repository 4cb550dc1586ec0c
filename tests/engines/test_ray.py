"""Runs in a Ray cluster: the same adapter as here, a node that is lost, and clusters that cannot be used."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.ray_cluster import ROOT, Cluster, cluster, may_mount
from support.sites import free_port

import fedslm
from fedslm import Observer
from fedslm.config import Config, EngineConfig, from_mapping
from fedslm.engines.ray_cluster import capacity, connect, workers_on
from fedslm.errors import ConfigError, FederationError
from fedslm.validation import check

CLIENTS, ROUNDS, STEPS = 6, 3, 2
PRIVATE = {"unit": "record", "epsilon": 8.0, "delta": 1e-5, "clip_norm": 1.0, "sample_rate": 0.1}


def make_config(directory: Path, *, privacy: dict[str, Any] | None = None, **engine: Any) -> Config:
    """A small run on the embedded base."""
    return from_mapping(
        {
            "run": {"name": directory.name, "directory": str(directory)},
            "model": {"base": "demo", "device": "cpu"},
            "lora": {"rank": 2, "alpha": 2.0, "target_modules": ["3.output.dense"]},
            "data": {"source": "demo", "partition": "iid", "max_evaluation_records": 50},
            "task": {"name": "classification", "pooling": "mean", "max_length": 48},
            "training": {"local_steps": STEPS, "batch_size": 8},
            "privacy": privacy or {"unit": "none"},
            "federation": {"num_clients": CLIENTS, "rounds": ROUNDS},
            "engine": engine,
        }
    )


class Killer(Observer):
    """Kills a node of the cluster when the first reply of a round has come."""

    def __init__(self, made: Cluster, *, node: int, round: int) -> None:
        self._made, self._node, self._round = made, node, round
        self.killed = 0

    def on_client(self, round: int, done: int, cohort: int) -> None:
        """The first reply of the round is here, and others are being computed."""
        if round == self._round and done == 1:
            self.killed = self._made.kill(self._node)


def is_in_a_cluster() -> bool:
    """Whether Ray runs on this machine."""
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if b"gcs_server" in process.read_bytes():
                return True
    return False


def problems(config: Config) -> str:
    """What is wrong with a config."""
    with pytest.raises(ConfigError) as refused:
        check(config)
    return str(refused.value)


@pytest.mark.slow  # a cluster of two nodes, and two runs
def test_two_nodes_give_the_adapter_of_this_process_even_if_one_is_lost(tmp_path: Path) -> None:
    """Bit for bit without privacy; a client that trained on the lost node trains again elsewhere."""
    here = fedslm.simulate(make_config(tmp_path / "here", workers=2)).report
    with cluster(2, cpus=2) as made:  # so a node is lost with two workers, of which one may be idle
        ray = {"name": "ray", "address": made.address}
        there = fedslm.simulate(make_config(tmp_path / "there", **ray)).report
        assert there["adapter_sha256"] == here["adapter_sha256"]
        killer = Killer(made, node=1, round=2)
        config = make_config(tmp_path / "lost", **ray)
        lost = fedslm.simulate(config, observers=[killer])
    assert killer.killed > 0
    assert lost.report["failures"] == []
    assert lost.report["adapter_sha256"] == here["adapter_sha256"]


@pytest.mark.slow
def test_a_private_client_whose_node_is_lost_is_charged_again(tmp_path: Path) -> None:
    """As after any crash: what was charged by then stays charged, a spare round pays, and no client is lost."""
    with cluster(2) as made:
        killer = Killer(made, node=1, round=2)
        privacy = {**PRIVATE, "spare_rounds": 1}
        config = make_config(tmp_path / "run", privacy=privacy, name="ray", address=made.address)
        report = fedslm.simulate(config, observers=[killer]).report
    assert killer.killed > 0
    assert report["failures"] == []
    steps = {each["steps"] for each in report["privacy"].values()}
    assert len(report["privacy"]) == CLIENTS
    assert steps <= {ROUNDS * STEPS, (ROUNDS + 1) * STEPS}
    assert report["epsilon"] <= PRIVATE["epsilon"]


@pytest.mark.slow
@pytest.mark.skipif(not may_mount(), reason="this process may not make a mount namespace")
def test_a_node_with_other_code_is_named(tmp_path: Path) -> None:
    """Nothing is trained; the message says which node it is, and what to do."""
    shutil.copytree(ROOT / "fedslm", tmp_path / "fedslm")
    changed = tmp_path / "fedslm" / "errors.py"
    changed.write_text(changed.read_text() + "# changed\n")
    with cluster(2, mount=f"mount --bind {tmp_path / 'fedslm'} {ROOT / 'fedslm'}") as made:
        config = make_config(tmp_path / "run", name="ray", address=made.address)
        with pytest.raises(FederationError, match=r"node \S+ \(\w+\) runs other code or libraries"):
            fedslm.simulate(config)


@pytest.mark.slow
@pytest.mark.skipif(not may_mount(), reason="this process may not make a mount namespace")
def test_a_node_that_does_not_see_the_run_is_named(tmp_path: Path) -> None:
    """As on a machine without the shared file system; and GPUs that no node has."""
    with cluster(2, mount=f"mount -t tmpfs none {tmp_path}") as made:
        config = make_config(tmp_path / "run", name="ray", address=made.address)
        with pytest.raises(FederationError, match=r"node \S+ \(\w+\) does not see .*run\.directory"):
            fedslm.simulate(config)
        made.kill(1)
        too_many = make_config(tmp_path / "more", name="ray", address=made.address, gpus_per_client=1)
        with pytest.raises(FederationError, match=r"room for 0 workers of .* 0 GPUs on 1 node"):
            fedslm.simulate(too_many)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:PORT", "does not answer"),
        ("nowhere", "must be HOST:PORT"),
        ("nowhere.invalid:6379", "does not answer"),
        ("auto", "no Ray cluster answers on this machine"),
    ],
)
def test_an_address_where_no_cluster_is(tmp_path: Path, address: str, said: str) -> None:
    """It is refused at once, before anything is computed, and the remedy is in the message."""
    if address == "auto" and is_in_a_cluster():
        pytest.skip("this machine belongs to a Ray cluster, which would be found")
    address = address.replace("PORT", str(free_port()))
    with pytest.raises(FederationError, match=said):
        fedslm.simulate(make_config(tmp_path / "run", name="ray", address=address))


def test_a_cluster_has_room_for_whole_workers_on_each_node() -> None:
    """A worker does not spread over two nodes, and needs both CPU and GPU."""
    large = {"Resources": {"CPU": 5.0, "GPU": 2.0}}
    small = {"Resources": {"CPU": 3.0}}
    assert capacity([large, small], EngineConfig(cpus_per_client=2)) == 3
    assert capacity([large, small], EngineConfig(cpus_per_client=2, gpus_per_client=1)) == 2
    assert capacity([large], EngineConfig(cpus_per_client=0.1, gpus_per_client=0.1)) == 20
    assert capacity([], EngineConfig()) == 0


@pytest.mark.parametrize(
    ("workers", "cpus", "started"), [(5, 0.5, 3), (3, 0.4, 2), (1, 1.4, 2), (2, 1, 2)]
)
def test_a_ray_of_the_run_s_own_has_room_for_its_workers(
    workers: int, cpus: float, started: int
) -> None:
    """Whatever they reserve, and whatever cluster this machine belongs to."""
    asked: dict[str, Any] = {}
    ray = SimpleNamespace(init=lambda **given: asked.update(given), is_initialized=lambda: False)
    engine = EngineConfig(name="ray", workers=workers, cpus_per_client=cpus)
    connect(ray, engine, 100)
    assert (asked["address"], asked["num_cpus"]) == ("local", started)
    node = {"Resources": {"CPU": float(asked["num_cpus"])}}
    assert workers_on([node], engine, 100) == workers


def test_contradictions_are_refused(tmp_path: Path) -> None:
    """Settings of Ray without Ray, a client server's address, a GPU that is not reserved."""
    assert "engine.address" in problems(make_config(tmp_path, address="10.0.0.1:6379"))
    assert "engine.gpus_per_client" in problems(make_config(tmp_path, gpus_per_client=1))
    assert "engine.address" in problems(
        make_config(tmp_path, name="ray", address="ray://10.0.0.1:10001")
    )
    assert "engine.workers" in problems(make_config(tmp_path, name="ray", workers=0))
    config = make_config(tmp_path, name="ray")
    model = config.model.model_copy(update={"device": "cuda"})
    assert "engine.gpus_per_client" in problems(config.model_copy(update={"model": model}))
