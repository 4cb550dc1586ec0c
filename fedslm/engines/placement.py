"""Which workers run where: decided from the config and from what this machine has free for them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedslm.config import Config, EngineConfig, ModelConfig
from fedslm.errors import ConfigError, Problem, plural
from fedslm.models.base import has_mps, local, num_gpus

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")
LIBRARY_BYTES = 600_000_000  # a worker with the embedded model: 0.32 to 0.50 GB were measured
_SHARE = 0.9  # of the free memory
_WIDENED = 2  # a file in bfloat16 may be computed in float32


@dataclass(frozen=True)
class Placement:
    """The workers of a run on this machine.

    Attributes:
        workers: Number of processes; 0 if everything runs in this process.
        threads: Threads of each of them.
        devices: The device of each worker; one entry if there is no worker process.
        why: What determined the number of workers.
    """

    workers: int
    threads: int
    devices: tuple[str, ...]
    why: str


def placed(config: Config) -> Placement:
    """Decides where the clients of a simulation run on this machine.

    On GPUs there is one worker for each device, so one base for each. On a CPU there is one for each
    core, fewer if threads, clients or memory do not suffice.

    Raises:
        ConfigError: ``engine.devices`` names a device that is not here.
    """
    engine = config.engine
    devices = devices_of(engine, config.model)
    if engine.workers == 0:
        return Placement(0, engine.threads_per_worker, devices[:1], "engine.workers=0")
    workers, why = _workers(config, devices)
    each = tuple(devices[number % len(devices)] for number in range(workers))
    return Placement(workers, engine.threads_per_worker, each, why)


def _workers(config: Config, devices: Sequence[str]) -> tuple[int, str]:
    """The number of workers, and what determined it."""
    engine, busy = config.engine, config.federation.cohort_size
    if engine.workers > 0:
        return engine.workers, f"engine.workers={engine.workers}"
    if devices[0] != "cpu":  # a second worker on a device would hold a second base there
        bounds = {plural(len(devices), "device"): len(devices)}
    else:
        processors = cores()
        threads = engine.threads_per_worker
        bounds = {
            f"{plural(processors, 'core')}, {plural(threads, 'thread')} each": processors // threads
        }
        held = free_bytes()
        if held is not None:
            fit = int(_SHARE * held / (LIBRARY_BYTES + _base_bytes(config.model)))
            bounds[f"{held / 1e9:.1f} GB of free memory"] = fit
    bounds[f"{plural(busy, 'client')} in a round"] = busy
    why = min(bounds, key=lambda each: bounds[each])
    return max(1, bounds[why]), why


def devices_of(engine: EngineConfig, model: ModelConfig) -> tuple[str, ...]:
    """The devices that workers share, at least one, such as ``("cuda:0", "cuda:1")`` or ``("cpu",)``.

    Raises:
        ConfigError: A device is not here.
    """
    if engine.name == "local" and engine.devices:
        return _asked(engine.devices, model)
    if model.device in ("auto", "cuda") and (count := num_gpus()):
        return tuple(f"cuda:{number}" for number in range(count))
    if model.device == "auto":
        return ("mps" if has_mps() else "cpu",)
    return (model.device,)


def _asked(devices: Sequence[str], model: ModelConfig) -> tuple[str, ...]:
    """The devices that the config names, if they are here."""
    if devices[0] == "cpu":
        if model.device == "auto" and has_mps():  # which cannot be hidden from a process
            message = 'is ["cpu"], and model.device="auto" is mps here; set model.device="cpu"'
            raise ConfigError([Problem("engine.devices", message)])
        return tuple(devices)
    count = num_gpus()
    missing = [device for device in devices if int(device.split(":")[1]) >= count]
    if missing:
        raise ConfigError(
            [
                Problem(
                    "engine.devices",
                    f"names {', '.join(missing)}, and this machine has {plural(count, 'CUDA device')}; "
                    f'name those that `nvidia-smi -L` lists, or use ["cpu"]',
                )
            ]
        )
    return tuple(devices)


def visible(device: str) -> dict[str, str]:
    """Environment of a worker that may see one device only; there it is the first one.

    >>> visible("cpu"), visible("mps")
    ({'CUDA_VISIBLE_DEVICES': '-1'}, {})
    """
    kind, _, number = device.partition(":")
    if kind == "cpu":
        return {"CUDA_VISIBLE_DEVICES": "-1"}
    if not number:  # there is none: the worker itself says so
        return {}
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return {"CUDA_VISIBLE_DEVICES": allowed[int(number)].strip() if allowed != [""] else number}


def cores() -> int:
    """Processors that this process may use: its affinity and its container's quota count.

    >>> cores() >= 1
    True
    """
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        allowed = os.cpu_count() or 1
    try:
        quota, period = (_CGROUP / "cpu.max").read_text(encoding="ascii").split()
        return max(1, min(allowed, int(quota) // int(period)))
    except (OSError, ValueError, ZeroDivisionError):  # no cgroup v2, or quota "max"
        return allowed


def free_bytes() -> int | None:
    """Memory that new processes may take, in bytes; None if it is unknown."""
    found = []
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError, IndexError):
        pass
    try:
        limit = int((_CGROUP / "memory.max").read_text(encoding="ascii"))
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        lines = (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines()
        kept = sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
        found.append(limit - used + kept)  # the kernel gives pages of files up
    except (OSError, ValueError, IndexError):  # no cgroup v2, or limit "max"
        pass
    return max(0, min(found)) if found else None


def _base_bytes(model: ModelConfig) -> int:
    """The memory of a base by the size of its files; 0 if it is not here yet, or cannot be found."""
    directory = local(model)
    files = [] if directory is None else directory.glob("*.safetensors")
    return _WIDENED * sum(path.stat().st_size for path in files)
