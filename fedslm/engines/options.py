"""Contradictions among the options that say where clients run."""

from __future__ import annotations

import re
from collections.abc import Iterator

from fedslm.config import Config
from fedslm.errors import Problem

_DEVICE = re.compile(r"cpu|cuda:[0-9]{1,3}")
_ONLY_RAY = {"address": None, "cpus_per_client": 1.0, "gpus_per_client": 0.0}


def engine_problems(config: Config) -> Iterator[Problem]:
    """Each engine has the options that it needs, and none of another's.

    Real nodes are registered, keep their own policies, and do not simulate attacks.
    """
    engine = config.engine
    if (engine.name == "deployed") != (engine.nodes is not None):
        message = 'must be set exactly when engine.name="deployed"; `fedslm server run` sets both'
        yield Problem("engine.nodes", message)
    yield from _devices(config)
    for key, default in _ONLY_RAY.items():
        if engine.name != "ray" and getattr(engine, key) != default:
            yield Problem(f"engine.{key}", 'is only for engine.name="ray"; leave it out')
    if engine.name == "ray":
        yield from _ray(config)
    if engine.name != "deployed":
        return
    if engine.policy is not None:
        yield Problem(
            "engine.policy", "is only for simulated nodes; a real node has its own policy.toml"
        )
    if config.attack.kind != "none":
        yield Problem("attack.kind", "is only for simulations; no real node obeys it")


def _devices(config: Config) -> Iterator[Problem]:
    """The devices of the local engine are of one kind, and of the kind that the model asks for."""
    engine, key = config.engine, "engine.devices"
    if not engine.devices:
        return
    if engine.name != "local":
        yield Problem(key, 'is only for engine.name="local"; see engine.gpus_per_client for Ray')
    wrong = [device for device in engine.devices if not _DEVICE.fullmatch(device)]
    if wrong:
        yield Problem(key, f'value {wrong[0]!r} is not a device; write "cpu", "cuda:0", "cuda:1", ...')
        return
    kinds = {device.split(":")[0] for device in engine.devices}
    if len(kinds) > 1:
        message = "mixes CPU and GPU: the adapter would depend on which client ran where; name one kind"
        yield Problem(key, message)
    elif config.model.device not in ("auto", *kinds):
        yield Problem(key, f'contradicts model.device="{config.model.device}"; leave that at "auto"')
    if engine.workers == 0:
        message = "is for worker processes, and engine.workers=0 starts none; set model.device instead"
        yield Problem(key, message)


def _ray(config: Config) -> Iterator[Problem]:
    """A cluster has workers, and gives a client the GPU that the model asks for."""
    engine = config.engine
    if engine.workers == 0:
        yield Problem("engine.workers", 'value 0 is only for engine.name="local"; Ray needs a worker')
    if config.model.device == "cuda" and not engine.gpus_per_client:
        message = 'is 0, and model.device="cuda" needs a GPU; set it to 1, or to 0.5 to share one'
        yield Problem("engine.gpus_per_client", message)
    if engine.address is not None and engine.address.startswith("ray://"):
        message = (
            "is an address of Ray's client server; run fedslm on a machine of the cluster, and give "
            'HOST:PORT of its head, or "auto"'
        )
        yield Problem("engine.address", message)
