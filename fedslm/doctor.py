"""What this installation and this machine can do: versions, devices, engines, permissions, network.

Nothing is written, nothing is sent, and no base is loaded.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from fedslm.attestations import cache_problem
from fedslm.config import ModelConfig
from fedslm.engines.placement import LIBRARY_BYTES, cores, free_bytes
from fedslm.errors import plural
from fedslm.models import precision
from fedslm.models.base import device_of, has_mps, num_gpus
from fedslm.storage import user_cache

Area = Literal["versions", "extras", "devices", "engines", "permissions", "machine", "network"]
_CPUINFO = Path("/proc/cpuinfo")
_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd")
_FOR_DEVELOPERS = ("test",)  # extras that no user installs
_TRAINING = ("torch", "transformers", "peft", "opacus", "datasets")
_LEAST_DISK_BYTES = 1_000_000_000


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis.

    Attributes:
        area: What it is about.
        name: Its name.
        text: What was found.
        remedy: What to do; empty if nothing is wrong.
        is_usable: False if fedslm cannot be used until that is done.
    """

    area: Area
    name: str
    text: str
    remedy: str = ""
    is_usable: bool = True


def diagnosis() -> Iterator[Finding]:
    """Yields all findings."""
    yield from _versions(_requirements())
    yield from _extras(_requirements())
    yield from _devices()
    yield from _engines()
    yield from _permissions()
    yield from _machine()
    yield from _network(os.environ)


def _requirements() -> tuple[Requirement, ...]:
    """What the installed fedslm declares; nothing if it runs from its source without installation."""
    try:
        found = distribution("fedslm").requires or []
    except PackageNotFoundError:
        return ()
    return tuple(map(Requirement, found))


def _installed(name: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _extras_of(requirement: Requirement, extras: Sequence[str]) -> tuple[str, ...]:
    """The extras that ask for a requirement; none if every installation needs it."""
    marker = requirement.marker
    if marker is None or _is_required(requirement):
        return ()
    return tuple(each for each in extras if marker.evaluate({"extra": each}))


def _is_required(requirement: Requirement) -> bool:
    """Whether every installation on this platform needs a requirement."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def _names_of_extras() -> tuple[str, ...]:
    """The extras that a user may install."""
    try:
        found = distribution("fedslm").metadata.get_all("Provides-Extra") or []
    except PackageNotFoundError:
        return ()
    return tuple(each for each in found if each not in _FOR_DEVELOPERS)


def _versions(requirements: Sequence[Requirement]) -> Iterator[Finding]:
    """Python, and each package that fedslm declares, against the range that it was tested with."""
    if not requirements:
        remedy = "pip install fedslm, or pip install -e . in its source"
        yield Finding("versions", "fedslm", "not installed, so no versions can be checked", remedy)
        return
    meta, here = distribution("fedslm").metadata, platform.python_version()
    wanted = SpecifierSet(meta["Requires-Python"] or "")
    fits = wanted.contains(here, prereleases=True)
    remedy = "" if fits else f"use Python {wanted}"
    yield Finding("versions", "fedslm", version("fedslm"))
    yield Finding("versions", "python", f"{here} (tested: {wanted})", remedy, fits)
    extras = _names_of_extras()
    said = {"fedslm"}
    for each in sorted(requirements, key=lambda each: len(_extras_of(each, extras))):
        wanted_by = _extras_of(each, extras)
        if each.name not in said and (wanted_by or _is_required(each)):
            yield _version(each, wanted_by)
            said.add(each.name)


def _version(requirement: Requirement, wanted_by: Sequence[str]) -> Finding:
    """One package: whether it is there, and in the tested range."""
    name, found = requirement.name, _installed(requirement.name)
    install = f'pip install "{name}{requirement.specifier}"'
    tested = f" (tested: {requirement.specifier})" if requirement.specifier else ""
    if found is None and wanted_by:
        return Finding("versions", name, f"not installed (for fedslm[{wanted_by[0]}])")
    if found is None:
        return Finding("versions", name, "not installed", install, is_usable=False)
    if not requirement.specifier.contains(found, prereleases=True):
        return Finding("versions", name, f"{found}, not tested{tested}", install, is_usable=False)
    return Finding("versions", name, f"{found}{tested}")


def _extras(requirements: Sequence[Requirement]) -> Iterator[Finding]:
    """Which optional parts are installed."""
    extras = _names_of_extras()
    for extra in extras:
        asked = [each for each in requirements if extra in _extras_of(each, extras)]
        lacking = sorted({name for each in asked for name in _lacking(each)})
        if not lacking:
            yield Finding("extras", extra, "installed")
            continue
        remedy = f'to use it: pip install "fedslm[{extra}]"'
        yield Finding("extras", extra, f"not installed: {', '.join(lacking)} missing", remedy)


def _lacking(requirement: Requirement) -> Iterator[str]:
    """The packages that are missing for a requirement with its own extras."""
    if _installed(requirement.name) is None:
        yield requirement.name
        return
    own = map(Requirement, distribution(requirement.name).requires or [])
    for each in own:
        if _extras_of(each, sorted(requirement.extras)):
            yield from _lacking(each)


def _devices() -> Iterator[Finding]:
    """The processor, CUDA and Apple's GPU."""
    cpu = f"{platform.machine()}{_cpu_features()}"
    if find_spec("torch") is None:
        yield Finding("devices", "cpu", cpu)
        yield Finding("devices", "gpu", "unknown: torch is not installed")
        return
    native = precision.is_native(device_of(ModelConfig(base="demo", device="cpu")))
    yield Finding("devices", "cpu", f"{cpu}; bfloat16 {'in hardware' if native else 'is emulated'}")
    count = num_gpus()
    yield Finding("devices", "cuda", plural(count, "device") if count else "none")
    yield Finding("devices", "mps", "available" if has_mps() else "none")


def _cpu_features() -> str:
    """Instruction sets that matter here, as Linux names them; empty where it does not say."""
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    except OSError:
        return ""
    words = {word for line in text.splitlines() for word in line.partition(":")[2].split()}
    found = [each for each in _FEATURES if each in words]
    return f" with {', '.join(found)}" if found else ""


def _engines() -> Iterator[Finding]:
    """Where clients can run."""
    missing = [name for name in _TRAINING if find_spec(name) is None]
    if missing:
        text = f"no training: {', '.join(missing)} not installed"
        yield Finding("engines", "local", text, 'to train: pip install "fedslm[train]"')
    else:
        yield Finding("engines", "local", "in this process (engine.workers = 0)")
        is_there = "forkserver" in multiprocessing.get_all_start_methods()
        how = "forkserver" if is_there else "spawn"
        text = f"worker processes, one for each of {plural(cores(), 'core')} ({how})"
        yield Finding("engines", "workers", text)
    has_ray = find_spec("ray") is not None
    remedy = "" if has_ray else 'to use it: pip install "fedslm[simulation]"'
    text = f"Ray {_installed('ray')}" if has_ray else "Ray is not installed"
    yield Finding("engines", "ray", text, remedy)
    nginx = shutil.which("nginx")
    remedy = "" if nginx else "only for `fedslm server up`: install nginx"
    yield Finding("engines", "deployed", nginx or "nginx is not installed", remedy)


def _permissions() -> Iterator[Finding]:
    """Directories that runs write to."""
    problem = cache_problem()
    remedy = "set FEDSLM_CACHE to a directory of your own; until then each run tests this machine again"
    if problem:
        yield Finding("permissions", "cache", problem, remedy)
    else:
        yield Finding("permissions", "cache", str(user_cache()))
    here = Path.cwd()
    if os.access(here, os.W_OK | os.X_OK):
        yield Finding("permissions", "directory", str(here))
    else:
        remedy = "set run.directory, or change to a directory that can be written"
        yield Finding("permissions", "directory", f"{here} cannot be written", remedy)


def _machine() -> Iterator[Finding]:
    """Processors, free memory and free disk."""
    yield Finding("machine", "cores", str(cores()))
    memory = free_bytes()
    if memory is not None:
        least, text = LIBRARY_BYTES, f"{memory / 1e9:.1f} GB free"
        remedy = "" if memory >= least else f"one worker takes {least / 1e9:.1f} GB: free some memory"
        yield Finding("machine", "memory", text, remedy, is_usable=memory >= least)
    disk = shutil.disk_usage(Path.cwd()).free
    remedy = "" if disk >= _LEAST_DISK_BYTES else "free some, or set run.directory to another disk"
    yield Finding("machine", "disk", f"{disk / 1e9:.1f} GB free here", remedy)


def _network(environment: Mapping[str, str]) -> Iterator[Finding]:
    """What uses the network, and what the environment says about it."""
    text = "sends nothing by itself: no telemetry, no update check"
    yield Finding("network", "fedslm", text)
    offline = environment.get("HF_HUB_OFFLINE", "0") not in ("", "0")
    text = "off: HF_HUB_OFFLINE is set"
    if not offline:
        text = "only for a base or data set given by a hub name; HF_HUB_OFFLINE=1 forbids it"
    yield Finding("network", "hub", text)
    quiet = environment.get("FLWR_TELEMETRY_ENABLED", "1") == "0"
    text = "no telemetry: FLWR_TELEMETRY_ENABLED=0"
    if not quiet:
        text = "only its programs, such as `flwr run`, send telemetry: set FLWR_TELEMETRY_ENABLED=0"
    yield Finding("network", "flower", text)
    stats = environment.get("RAY_USAGE_STATS_ENABLED", "0") == "0"
    text = "no usage statistics" if stats else "sends usage statistics: RAY_USAGE_STATS_ENABLED is set"
    yield Finding("network", "ray", text)
