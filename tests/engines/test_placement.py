"""How many workers a run gets on this machine, and which devices they see."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from fedslm.config import Config, from_mapping
from fedslm.engines import placement
from fedslm.engines.placement import Placement, placed, visible
from fedslm.errors import ConfigError
from fedslm.validation import check
from fedslm.workers import WorkerPool


def make_config(*, clients: int = 100, device: str = "auto", **engine: Any) -> Config:
    """A run whose engine matters only."""
    return from_mapping(
        {
            "run": {"name": "run"},
            "model": {"base": "demo", "device": device},
            "data": {"source": "demo"},
            "task": {"name": "classification"},
            "privacy": {"unit": "none"},
            "federation": {"num_clients": clients},
            "engine": engine,
        }
    )


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Says what the machine has."""

    def has(*, cores: int = 8, gpus: int = 0, free: int | None = 64 * 10**9) -> None:
        monkeypatch.setattr(placement, "cores", lambda: cores)
        monkeypatch.setattr(placement, "num_gpus", lambda: gpus)
        monkeypatch.setattr(placement, "free_bytes", lambda: free)

    return has


def test_a_cpu_gets_a_worker_for_each_core_that_it_can_use(machine: Any) -> None:
    """Fewer if threads, clients or memory do not suffice, and the reason is said."""
    machine(cores=8)
    assert placed(make_config()) == Placement(8, 1, ("cpu",) * 8, "8 cores, 1 thread each")
    assert placed(make_config(threads_per_worker=3)).workers == 2
    assert placed(make_config(clients=5)) == Placement(5, 1, ("cpu",) * 5, "5 clients in a round")
    machine(cores=8, free=2 * 10**9)
    few = placed(make_config())
    assert 1 <= few.workers < 8
    assert few.why == "2.0 GB of free memory"
    machine(cores=8, free=None)
    assert placed(make_config()).workers == 8


def test_there_is_always_a_worker(machine: Any) -> None:
    """Too little memory, or more threads than cores: the run is tried with one."""
    machine(cores=1, free=10**6)
    assert placed(make_config()).workers == 1
    assert placed(make_config(threads_per_worker=4)).workers == 1


def test_each_gpu_gets_one_worker_and_so_one_base(machine: Any) -> None:
    """More workers share the devices in turn, only if they are asked for."""
    machine(gpus=2)
    assert placed(make_config()) == Placement(2, 1, ("cuda:0", "cuda:1"), "2 devices")
    assert placed(make_config(device="cpu")).devices == ("cpu",) * 8
    three = placed(make_config(workers=3))
    assert three.devices == ("cuda:0", "cuda:1", "cuda:0")
    assert placed(make_config(devices=["cuda:1"])) == Placement(1, 1, ("cuda:1",), "1 device")
    assert placed(make_config(workers=0)) == Placement(0, 1, ("cuda:0",), "engine.workers=0")
    assert placed(make_config(devices=["cpu"])).devices == ("cpu",) * 8


def test_more_gpus_than_there_are_is_an_error(machine: Any) -> None:
    """The message says how many there are."""
    machine(gpus=1)
    with pytest.raises(ConfigError, match=r"names cuda:1, cuda:7, and this machine has 1 CUDA device;"):
        placed(make_config(devices=["cuda:0", "cuda:1", "cuda:7"]))


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ({"devices": ["gpu"]}, "'gpu' is not a device"),
        ({"devices": ["cuda"]}, "'cuda' is not a device"),
        ({"devices": ["cpu", "cuda:0"]}, "mixes CPU and GPU"),
        ({"devices": ["cuda:0"], "device": "cpu"}, 'contradicts model.device="cpu"'),
        ({"devices": ["cuda:1"], "workers": 0}, "engine.workers=0 starts none"),
        ({"devices": ["cpu"], "name": "ray"}, 'only for engine.name="local"'),
    ],
)
def test_contradictions_are_refused(engine: dict[str, Any], said: str) -> None:
    """Each is reported under its option."""
    with pytest.raises(ConfigError, match=said) as refused:
        check(make_config(**engine))
    assert "engine.devices" in str(refused.value)


def test_a_worker_sees_its_own_device_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the first one; if the process itself may see only some, the numbers count among those."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible("cuda:1") == {"CUDA_VISIBLE_DEVICES": "1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 6")
    assert visible("cuda:1") == {"CUDA_VISIBLE_DEVICES": "6"}
    assert visible("cpu") == {"CUDA_VISIBLE_DEVICES": "-1"}
    assert visible("cuda") == visible("mps") == {}


def seen() -> tuple[int, str]:
    """A worker and the device that it may see."""
    return os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES", "")


def die() -> None:
    """Ends the worker."""
    os._exit(1)


def test_a_worker_that_is_replaced_gets_the_device_of_the_lost_one() -> None:
    """Before it imports anything that would open a device."""
    pool = WorkerPool(2, environments=[visible("cuda:0"), visible("cuda:1")], is_forked=False)
    try:
        before = dict(pool.map(seen, [()] * 4))
        assert sorted(before.values()) == ["0", "1"]
        pool.poll(pool.submit(die), 60.0)
        after = dict(pool.map(seen, [()] * 8))
        assert sorted(after.values()) == ["0", "1"]
        assert before.keys() != after.keys()
    finally:
        pool.close()


def test_a_container_s_quota_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of processors and of memory (cgroup v2)."""
    monkeypatch.setattr(placement, "_CGROUP", tmp_path)
    monkeypatch.setattr(placement.os, "sched_getaffinity", lambda _: range(16), raising=False)
    assert placement.cores() == 16
    for text, found in (("max 100000", 16), ("250000 100000", 2), ("50000 100000", 1)):
        (tmp_path / "cpu.max").write_text(text)
        assert placement.cores() == found
    (tmp_path / "memory.max").write_text("5000000")
    (tmp_path / "memory.current").write_text("4000000")
    (tmp_path / "memory.stat").write_text("active_file 700000\ninactive_file 2000000\nfile 2700000\n")
    assert placement.free_bytes() == 3_000_000
    (tmp_path / "memory.max").write_text("max")
    assert placement.free_bytes() is None or placement.free_bytes() > 3_000_000
