"""Checks for a node's operator before the node starts: each one passes or fails, with a reason."""

from __future__ import annotations

import os
import re
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

from fedslm import layout
from fedslm.attestations import places_of_node
from fedslm.client.self_test_gate import attest
from fedslm.config import ModelConfig
from fedslm.deployment.authority import public_key_of
from fedslm.deployment.bundle import bundle, sha256_of
from fedslm.deployment.certificates import WARNING_DAYS, node_warnings, with_clock
from fedslm.deployment.conditions import reason_against
from fedslm.deployment.enrolment import node_key
from fedslm.deployment.fleet import check_key
from fedslm.deployment.node import Ready, import_records, worker
from fedslm.errors import ConfigError, FedslmError, RunError, plural
from fedslm.models.base import base_sha256, resolve
from fedslm.privacy import clock
from fedslm.privacy.chain import read_chain
from fedslm.privacy.keys import PUBLIC_KEY, public_hex, read_public_key, signing_key
from fedslm.privacy.policy import ANY, open_policy
from fedslm.secagg.roster import MOST_BYTES, verified
from fedslm.storage import read_text

_SKEW_SECONDS, _TOO_MUCH_SECONDS = 30.0, 240.0  # the server refuses a difference of five minutes
_LEAST_BYTES = 1 << 30
_SECONDS = 10.0


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: What was checked.
        is_good: Whether the node can start.
        detail: What was found, or what to do.
        warns: True if it can start, but something must be done soon.
    """

    name: str
    is_good: bool
    detail: str
    warns: bool = False


class _Warning(Exception):
    """The check passes, but something must be done soon."""


def preflight(ready: Ready, on_start: Callable[[str], None] = lambda name: None) -> Iterator[Check]:
    """Checks everything that would stop the node later; yields each result as it comes.

    Args:
        ready: The node.
        on_start: Called with each check's name before it begins: some take a while.
    """
    looks: dict[str, Callable[[], str]] = {
        "version and bundle": lambda: _version(ready),
        "policy": lambda: _policy(ready.directory),
        "keys and ledger": lambda: _ledger(ready.directory),
        "roster": lambda: _roster(ready),
        "records": lambda: _records(ready),
        "base models": lambda: _bases(ready.directory),
        "disk": lambda: _disk(ready.directory),
        "memory": lambda: _memory(ready),
        "conditions": lambda: _conditions(ready),
        "server and clock": lambda: _server(ready),
        "certificates": lambda: _certificates(ready),
        "key at the server": lambda: _key(ready),
        "self-test": lambda: _self_test(ready),
    }
    for name, look in looks.items():
        on_start(name)
        yield _check(name, look)


def _check(name: str, look: Callable[[], str]) -> Check:
    """Runs one check; any error becomes its result."""
    try:
        return Check(name, True, look())
    except _Warning as warning:
        return Check(name, True, str(warning), warns=True)
    except FedslmError as error:
        return Check(name, False, str(error))
    except Exception as error:  # an unusual machine is a result, not a crash
        return Check(name, False, f"{type(error).__name__}: {error}")


def _version(ready: Ready) -> str:
    """Checks that the server sends the bundle of this version, or an approved one."""
    if ready.admission.bundle_sha256 not in ready.approved:
        raise RunError(
            f"the server runs fedslm {ready.admission.version}, whose bundle is not approved here: "
            f"install that version, or add {ready.admission.bundle_sha256} to approved_bundles"
        )
    return f"bundle {sha256_of(bundle())[:16]}"


def _policy(directory: Path) -> str:
    """Checks the policy, and shows what it allows."""
    return open_policy(directory / layout.POLICY).in_words()


def _ledger(directory: Path) -> str:
    """Checks that only the owner can read the keys, and that the ledger is intact."""
    signing_key(directory)
    clock.right_now()
    path = directory / layout.LEDGER
    if not path.exists() and (directory / layout.RELEASE).exists():
        raise RunError(
            f"{path} is missing, but this node has trained before: restore the ledger and its head "
            f"from the latest backup; the next run finds out"
        )
    if not path.exists():
        return "no ledger yet"
    chain = read_chain(path, read_public_key(directory / PUBLIC_KEY))
    found = f"a complete ledger of {plural(len(chain.entries), 'line')}"
    ahead = clock.seconds_ahead(chain.entries)
    if ahead > clock.AHEAD_SECONDS:
        raise _Warning(
            f"{found}, {ahead} s ahead of this machine's clock: rounds may be refused until then. "
            f"If the clock jumped forwards and is correct now: fedslm node clock {directory} --reason …"
        )
    if chain.unprotected:
        raise _Warning(
            f"{found}, with {plural(len(chain.unprotected), 'release')} without privacy: epsilon is "
            f'infinite, and private runs are refused unless the policy says unit = "none"'
        )
    return found


def _roster(ready: Ready) -> str:
    """Checks who signed the list of nodes that may share noise with this one, and that it is on it."""
    try:
        policy = open_policy(ready.directory / layout.POLICY)
    except ConfigError:  # "policy" says what is wrong with it
        return "not checked: it is needed only if the policy allows noise that nodes share"
    if not policy.allow_distributed_noise:
        return "not needed: the policy does not allow noise that nodes share"
    path = ready.directory / layout.SIGNED_ROSTER
    if not path.exists():
        return "none yet: the server sends it in the first round that needs it"
    authority = public_key_of(ready.admission.authority.encode())
    roster = verified(read_text(path, MOST_BYTES), authority)
    own = roster.client_of(public_hex(signing_key(ready.directory).public_key()))
    count = plural(len(roster.members), "node")
    return f"{count}, signed by the authority; this node is number {own} on list {roster.serial}"


def _records(ready: Ready) -> str:
    """Checks that the records can be read, and have the columns that the operator declares."""
    found = f"{plural(import_records(ready), 'record')} can be read"
    columns = ", ".join(ready.file.columns)
    return f"{found}, with {columns}" if columns else f"{found}; declare their columns in node.toml"


def _bases(directory: Path) -> str:
    """Checks that the policy's base models are available, or can be fetched, and are allowed."""
    policy = open_policy(directory / layout.POLICY)
    if ANY in policy.base_names:
        return "the policy names none; a run's base model is checked on request"
    found = {name: base_sha256(resolve(ModelConfig(base=name))) for name in policy.base_names}
    strange = [name for name, sha256 in found.items() if sha256 not in policy.base_models]
    if strange and ANY not in policy.base_models:
        name, sha256 = strange[0], found[strange[0]]
        raise RunError(f"{name} has sha256 {sha256}, which is not among base_models of {layout.POLICY}")
    return ", ".join(f"{name} {sha256[:12]}" for name, sha256 in found.items())


def _disk(directory: Path) -> str:
    """Checks the free disk space: the ledger must never find a full disk."""
    status = os.statvfs(directory)
    free = status.f_bavail * status.f_frsize
    if free < _LEAST_BYTES:
        raise RunError(f"{free / 1e9:.1f} GB free in {directory}; at least 1 GB is needed")
    return f"{free / 1e9:.0f} GB free"


def _memory(ready: Ready) -> str:
    """Checks the available memory: free memory, and the system's file cache."""
    least = (ready.file.memory_mb << 20) if ready.file.memory_mb else _LEAST_BYTES
    held = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if (info := Path("/proc/meminfo")).exists():
        found = re.search(r"^MemAvailable:\s+(\d+) kB", info.read_text(), re.MULTILINE)
        held = int(found[1]) << 10 if found else held
    if held < least:
        raise RunError(
            f"{held / 1e9:.1f} GB of memory available; at least {least / 1e9:.1f} GB is needed"
        )
    return f"{held / 1e9:.1f} GB available"


def _conditions(ready: Ready) -> str:
    """Shows whether the node takes part now; not taking part is not an error."""
    if ready.file.conditions is None:
        return "none: always takes part"
    reason = reason_against(ready.file.conditions, ready.directory, datetime.now())
    return "takes part now" if reason is None else f"does not take part now: {reason}"


def _server(ready: Ready) -> str:
    """Checks that the server is reachable, has the admission's certificate, and has the same time."""
    import httpx

    context = ssl.create_default_context(cadata=ready.admission.authority)
    try:
        answer = httpx.get(f"https://{ready.admission.address}/", verify=context, timeout=_SECONDS)
    except httpx.HTTPError as error:
        text = f"{ready.admission.address} cannot be reached: {with_clock(error)}"
        raise RunError(text) from error
    date = answer.headers.get("date")
    if date is None:
        return f"{ready.admission.address} is there"
    skew = time.time() - parsedate_to_datetime(date).timestamp()
    if abs(skew) > _TOO_MUCH_SECONDS:
        raise RunError(f"this clock is {skew:+.0f} s off the server's: set it by NTP")
    late = f", {skew:+.0f} s apart: set the clock by NTP" if abs(skew) > _SKEW_SECONDS else ""
    return f"{ready.admission.address} is there{late}"


def _certificates(ready: Ready) -> str:
    """Checks that none of the certificates that this node relies on expires soon."""
    warnings = node_warnings(ready.admission.address, ready.admission.authority)
    if warnings:
        raise _Warning("; ".join(warnings))
    return f"neither the server's nor the authority's expires within {WARNING_DAYS} days"


def _key(ready: Ready) -> str:
    """Checks that the server knows this node's key."""
    admission = ready.admission
    key = node_key(ready.directory)
    check_key(admission.address, admission.authority.encode(), key, admission.node_id)
    return "the server knows it"


def _self_test(ready: Ready) -> str:
    """Runs the self-test on this machine, in a process like the one that will train."""
    with worker(ready) as pool:
        pool.call(attest, places_of_node(ready.directory))
    return "passed"
