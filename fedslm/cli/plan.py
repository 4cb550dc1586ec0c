"""``fedslm simulate --plan``: what will run where, and what it takes, before anything starts."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fedslm.cli.answers import print_facts
from fedslm.cli.model import describe
from fedslm.config import Config
from fedslm.errors import plural
from fedslm.storage import expand, json_text

if TYPE_CHECKING:
    from fedslm.engines.placement import Placement

_PRIVATE = 1.15  # a private step over a plain one (benchmarks/README.md)
_LEDGER_BYTES, _STATEMENT_BYTES, _CLIENT_BYTES = 1_500, 800, 1_000  # of a round; of a client's keys
_FULL = 0.9


def show(config: Config, *, as_json: bool) -> None:
    """Prints the plan of a simulation; trains nothing, and writes nothing.

    Raises:
        FedslmError: The base, a device or the cluster cannot be used.
    """
    found = planned(config.resolved())
    if as_json:
        typer.echo(json_text(found))
    else:
        print_facts(_lines(found), found["warnings"])
        typer.echo("Nothing was started. Run it without --plan.")


def planned(config: Config) -> dict[str, Any]:
    """Returns the plan as JSON values.

    Raises:
        FedslmError: As :func:`show`.
    """
    from fedslm.engines.placement import LIBRARY_BYTES, free_bytes, placed

    model = describe(config)
    place = placed(config)
    nodes: list[dict[str, Any]] = []
    if config.engine.name == "ray":
        place, nodes = _on_ray(config, place)
    processes = max(1, place.workers)
    each = LIBRARY_BYTES + model["memory_bytes"]["total"]
    directory = Path(config.run.directory or Path("runs") / config.run.name)
    found: dict[str, Any] = {
        "engine": config.engine.name,
        "workers": place.workers,
        "threads_per_worker": place.threads,
        "devices": list(place.devices),
        "why": place.why,
        "nodes": nodes,
        "worker_bytes": each,
        "memory_bytes": processes * each,
        "free_memory_bytes": free_bytes(),
        "directory": str(directory),
        "disk_bytes": _disk(config, model),
        "free_disk_bytes": shutil.disk_usage(_existing(directory)).free,
        **_work(config, model, processes, is_on_cores="cpu" in place.devices and not nodes),
    }
    return {**found, "warnings": [*model["warnings"], *_warnings(config, found)]}


def estimate(config: Config, records: int) -> str:
    """Returns how long a run's training takes about, from passes that are timed here.

    Args:
        config: The completed config.
        records: Private records of all clients together.

    Raises:
        FedslmError: The base cannot be used, or no pass can be timed.
    """
    from fedslm.cli.model import time_of_a_record
    from fedslm.engines.placement import placed

    made, place = config.resolved(), placed(config.resolved())
    each, kept = time_of_a_record(made)
    each *= _PRIVATE if made.privacy.unit != "none" else 1.0
    passed = min(_records(made), _expected(made, records))
    whole = min(records, passed)  # of a record, the layers that are kept are computed once
    seconds = each * (kept * whole + (1 - kept) * passed)
    seconds /= _at_once(made, max(1, place.workers), is_on_cores="cpu" in place.devices)
    return (
        f"an estimate: about {_shown(seconds)} of training, from passes timed on this machine "
        f"({1000 * each:.1f} ms for a record of task.max_length); start-up, evaluation, and tests of "
        f"the code before the first private round are not in it"
    )


def _expected(config: Config, records: int) -> float:
    """Records that the steps of a private run are expected to pass; infinite without privacy."""
    federation, rate = config.federation, config.privacy.sample_rate
    if config.privacy.unit == "none" or rate is None:
        return math.inf
    steps = federation.rounds * config.training.local_steps
    return steps * federation.cohort_size * rate * records / federation.num_clients


def _on_ray(config: Config, place: Placement) -> tuple[Placement, list[dict[str, Any]]]:
    """The workers in a cluster, which is asked what it has; this machine's if Ray will be started."""
    from dataclasses import replace

    from fedslm.engines.ray_cluster import capacity, own_workers, survey, workers_on

    engine, most = config.engine, config.federation.cohort_size
    nodes = [] if engine.address is None else survey(engine)
    found = [
        {
            "address": node["NodeManagerAddress"],
            "id": node["NodeID"],
            "cpus": node["Resources"].get("CPU", 0.0),
            "gpus": node["Resources"].get("GPU", 0.0),
            "workers": capacity([node], engine),
        }
        for node in nodes
    ]
    workers, why = own_workers(engine, most), "Ray is started on this machine"
    if engine.address is not None:
        workers = workers_on(nodes, engine, most)
        room = capacity(nodes, engine)
        why = f"room for {plural(room, 'worker')} on {plural(len(nodes), 'node')}"
    device = f"{engine.gpus_per_client:g} GPU" if engine.gpus_per_client else "cpu"
    return replace(place, workers=workers, devices=(device,) * workers, why=why), found


def _work(
    config: Config, model: dict[str, Any], processes: int, *, is_on_cores: bool
) -> dict[str, Any]:
    """The records that are trained on, and how long that takes at most; None if no pass was timed."""
    records = _records(config)
    found: dict[str, Any] = {"records": records, "seconds_per_record": None, "seconds": None}
    speed = model["speed"]
    if speed is None:
        return found
    stored = model["quantization"]
    variant = model["dtype"] if stored == "none" else f"{stored} in {model['dtype']}"
    tokens = speed["records"] * speed["tokens"]
    each = speed["seconds"][variant] / tokens * config.task.max_length
    each *= _PRIVATE if config.privacy.unit != "none" else 1.0
    at_once = _at_once(config, processes, is_on_cores=is_on_cores)
    return found | {"seconds_per_record": each, "seconds": each * records / at_once}


def _records(config: Config) -> int:
    """The records that are trained on, at most, as expected."""
    training, federation = config.training, config.federation
    records = federation.rounds * federation.cohort_size * training.local_steps * training.batch_size
    units = config.privacy.max_records_per_unit if config.privacy.unit == "user" else None
    return records * (units or 1)


def _at_once(config: Config, processes: int, *, is_on_cores: bool) -> int:
    """How many clients train at the same time."""
    from fedslm.engines.placement import cores

    at_once = min(processes, config.federation.cohort_size)
    return max(1, min(at_once, cores())) if is_on_cores else at_once


def _disk(config: Config, model: dict[str, Any]) -> int:
    """What the run directory takes at most, in bytes, with the data if their files are here."""
    federation = config.federation
    participations = federation.rounds * federation.cohort_size
    clients = min(federation.num_clients, participations)
    down, up = model["bytes_down_per_client"], model["bytes_up_per_client"]
    total: int = _size(Path(expand(config.data.source))) + 4 * down
    if config.privacy.unit != "none":
        total += participations * (_LEDGER_BYTES + _STATEMENT_BYTES)
        total += clients * (_CLIENT_BYTES + up)  # each keeps its last release, to send it again
    return total


def _size(source: Path) -> int:
    """The size of a file, or of the files in a directory; 0 if it is neither."""
    if source.is_file():
        return source.stat().st_size
    return sum(path.stat().st_size for path in source.rglob("*") if path.is_file())


def _existing(directory: Path) -> Path:
    """The directory, or the nearest one above it that exists."""
    directory = directory.absolute()
    return next(path for path in (directory, *directory.parents) if path.exists())


def _warnings(config: Config, found: dict[str, Any]) -> list[str]:
    """What will not fit, or cannot be used."""
    from fedslm.engines.placement import cores
    from fedslm.progress import readable

    warnings = []
    directory = Path(found["directory"])
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        warnings.append(f"{directory} exists: set another run.name or run.directory, or use --resume")
    busy, here = config.federation.cohort_size, cores()
    if found["workers"] > busy:
        warnings.append(f"engine.workers={found['workers']}, and a round asks {plural(busy, 'client')}")
    threads = found["workers"] * found["threads_per_worker"]
    if config.engine.name == "local" and threads > here:
        warnings.append(f"the workers have {threads} threads for {plural(here, 'core')}")
    free, disk = found["free_memory_bytes"], found["free_disk_bytes"]
    if not found["nodes"] and free is not None and found["memory_bytes"] > _FULL * free:
        warnings.append(
            f"about {readable(found['memory_bytes'])} of memory are needed and {readable(free)} are "
            f"free; lower engine.workers"
        )
    if found["disk_bytes"] > _FULL * disk:
        warnings.append(
            f"about {readable(found['disk_bytes'])} are written below {found['directory']}, where "
            f"{readable(disk)} are free; set run.directory"
        )
    return warnings


def _lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns name and text of each line."""
    from fedslm.progress import readable

    threads = plural(found["threads_per_worker"], "thread")
    where = (
        f"{plural(found['workers'], 'worker')}, {threads} each" if found["workers"] else "this process"
    )
    counts = {device: found["devices"].count(device) for device in found["devices"]}
    devices = ", ".join(f"{device} ×{count}" for device, count in counts.items())
    free = found["free_memory_bytes"]
    held = f"; {readable(free)} are free" if free is not None and not found["nodes"] else ""
    nodes = [
        (
            "node",
            f"{node['address']} ({node['id'][:8]}): {node['cpus']:g} CPUs, {node['gpus']:g} GPUs, room "
            f"for {plural(node['workers'], 'worker')}",
        )
        for node in found["nodes"]
    ]
    lines = [
        ("engine", f"{found['engine']}: {where} ({found['why']})"),
        *nodes,
        ("devices", devices),
        (
            "memory",
            f"about {readable(found['memory_bytes'])}: {readable(found['worker_bytes'])} each{held}",
        ),
        (
            "disk",
            f"about {readable(found['disk_bytes'])} in {found['directory']}; "
            f"{readable(found['free_disk_bytes'])} are free",
        ),
        ("training", f"{found['records']:,} records are passed through the base, as expected"),
    ]
    return [*lines, ("time", _time(found))]


def _time(found: dict[str, Any]) -> str:
    """The line about the time."""
    if found["seconds"] is None:
        return "unknown: no pass could be timed"
    return (
        f"about {_shown(found['seconds'])} if every record is task.max_length long and none is cached "
        f"({1000 * found['seconds_per_record']:.1f} ms a record, timed here with one thread); "
        f"evaluation and start-up are not in it"
    )


def _shown(seconds: float) -> str:
    """A duration for people, of a second or more.

    >>> _shown(0.2), _shown(90), _shown(7200)
    ('1 s', '90 s', '2.0 h')
    """
    if seconds < 120:
        return f"{max(1, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
