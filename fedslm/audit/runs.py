"""Audits a run: the guarantee, its mechanisms, the spending of each client, and what is not covered.

All data come from the run directory: the config, the nodes' ledgers (in a simulation) and the signed
statements that the server received. The run's own report is not used.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import fedslm
from fedslm import layout
from fedslm.audit.distilled import distillations
from fedslm.audit.empirical import attacked
from fedslm.audit.ledgers import Evidence, LedgerAudit, as_json, audit_ledger
from fedslm.audit.statements import check_received
from fedslm.config import Config, PrivacyConfig
from fedslm.data.store import client_names
from fedslm.errors import LedgerError, MissingPackage, PrivacyError, Unusable
from fedslm.federation.checkpoint import RunDirectory
from fedslm.federation.spends import standings_of_run
from fedslm.federation.standings import as_values
from fedslm.fingerprint import code_fingerprint
from fedslm.privacy import accounting
from fedslm.privacy.chain import read_chain
from fedslm.privacy.keys import PUBLIC_KEY, read_public_key
from fedslm.privacy.shares import assumption, least_honest
from fedslm.privacy.statement import Statement
from fedslm.records import Event, epsilon_as_json
from fedslm.rendering import page, render
from fedslm.storage import json_text, write_text

_DELTAS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
_FALSE_POSITIVE_RATES = (0.001, 0.01, 0.1)
_GROUP_SIZES = (2, 4)
Progress = Callable[[str, int, int], None]


def _silent(stage: str, done: int, total: int) -> None:
    """Shows no progress."""


@dataclass(frozen=True)
class _Client:
    """The evidence about one client.

    Attributes:
        name: As in the run's report; "client 0", and so on, if the run's data no longer exist.
        events: All its charges, over all given runs.
        is_lost: Whether it released anything without privacy: then its epsilon is infinite.
        releases: Number of statements that the server received in this run.
        audit: The audit of its ledger; None if the ledger is not here.
    """

    name: str
    events: tuple[Event, ...]
    is_lost: bool
    releases: int
    audit: LedgerAudit | None

    def epsilon(self, delta: float) -> float:
        """Returns epsilon of all its charges."""
        return math.inf if self.is_lost else accounting.epsilon(self.events, delta)


def audit_run(
    path: Path,
    *,
    others: tuple[Path, ...] = (),
    group_sizes: tuple[int, ...] = _GROUP_SIZES,
    empirical: bool = True,
    on_progress: Progress = _silent,
) -> dict[str, Any]:
    """Audits a run and writes ``audit.md``, ``audit.json`` and a printable ``audit.html`` into it.

    Args:
        path: The run directory.
        others: Further run directories on the same data (tuning, failed attempts): their charges count.
        group_sizes: Numbers of records per person for which a record-level run is reported.
        empirical: Also attack the mechanism with canaries, for a measured lower bound.
        on_progress: Is called with a stage, what is done of it, and its total.

    Returns:
        The content of ``audit.json``; ``findings`` is empty if there are no problems.

    Raises:
        RunError: It is not a run directory, or its files are damaged.
        PrivacyError: The run had no privacy: there is nothing to audit.
    """
    directory, config = RunDirectory.open(path)
    privacy = config.privacy
    if privacy.unit == "none" or privacy.delta is None:
        raise PrivacyError(f"{path} was trained without privacy: epsilon is infinite")
    statements = directory.statements()
    clients = _clients(directory, config.federation.num_clients, statements, on_progress)
    findings = _wrong(directory, clients, statements)
    clients = _with_others(clients, config, others, findings)
    worst = _worst(clients, privacy.delta, overlapping=privacy.overlapping)
    is_lost = any(client.is_lost for client in clients)
    audit: dict[str, Any] = {
        "fedslm_version": fedslm.__version__,
        "audited_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "run": {"id": directory.run_id, "path": str(directory.path), "name": config.run.name},
        "rounds": _rounds(directory, config.federation.rounds),
        "config_sha256": directory.config_sha256,
        "base_model": config.model.base,
        "privacy": privacy.model_dump(mode="json"),
        "protocol": config.secure_aggregation.protocol if privacy.shares_noise else None,
        "normaliser": config.training.batch_size,
        "guarantee": _guarantee(worst, privacy.delta, is_lost=is_lost),
        "mechanisms": _mechanisms(directory, len(clients)),
        "clients": [_describe(client, privacy.delta) for client in clients],
        "other_runs": [str(other) for other in others],
        "groups": []
        if privacy.unit != "record" or is_lost
        else _groups(worst, privacy.delta, group_sizes, on_progress),
        "standings": _standings(directory, findings),
        "self_test": _attestation(directory),
        "distillations": _distilled(directory, findings),
        "empirical": _attacked(clients, privacy, on_progress) if empirical else None,
        "findings": findings,
    }
    if audit["empirical"] is not None and not audit["empirical"]["consistent"]:
        audit["findings"].append("the attack with canaries found more than was proven: stop training")
    _write(directory.path, audit)
    return audit


def _wrong(
    directory: RunDirectory, clients: list[_Client], statements: list[tuple[int, Statement]]
) -> list[str]:
    """Returns the problems in ledgers and statements."""
    names = [client.name for client in clients]
    received = check_received(directory.run_id, names, directory.records(), statements)
    return [*_of_ledgers(clients), *received, *_strangers(directory, len(clients))]


def _of_ledgers(clients: list[_Client]) -> list[str]:
    """Returns the problems in the available ledgers."""
    return [
        f"{client.name}: {finding}"
        for client in clients
        for finding in (client.audit.findings if client.audit else ())
    ]


def _standings(directory: RunDirectory, findings: list[str]) -> dict[str, Any]:
    """Returns the spending of real nodes over all runs; adds excluded nodes to the findings."""
    found = standings_of_run(directory.path)
    findings += [
        f"{name} is excluded since {each.since}: {each.out}" for name, each in found.items() if each.out
    ]
    return {name: as_values(each) for name, each in found.items()}


def _distilled(directory: RunDirectory, findings: list[str]) -> list[dict[str, Any]]:
    """Returns the distillations of the run; adds their problems to the findings."""
    found, broken = distillations(directory)
    findings += broken
    return found


def _names(directory: RunDirectory, num_clients: int) -> tuple[str, ...]:
    """Returns the clients' names, by index."""
    names = client_names(directory.data)
    return names if len(names) == num_clients else tuple(f"client {n}" for n in range(num_clients))


def _clients(
    directory: RunDirectory,
    count: int,
    statements: list[tuple[int, Statement]],
    on_progress: Progress = _silent,
) -> list[_Client]:
    """Returns the evidence about each client."""
    found = []
    for index, name in enumerate(_names(directory, count)):
        own = [each for client, each in statements if client == index]
        found.append(_client(directory, index, name, own))
        on_progress("ledgers and statements of clients", index + 1, count)
    return found


def _client(directory: RunDirectory, index: int, name: str, statements: list[Statement]) -> _Client:
    """Reads one client's charges: from its ledger, or from its statement with the most charges."""
    last = max(statements, key=lambda each: each.num_charged, default=None)
    events = () if last is None else last.events
    is_lost = any(statement.unprotected for statement in statements)
    audit, node = None, directory.nodes / layout.simulated(index)
    if (node / layout.LEDGER).exists():
        key = read_public_key(node / PUBLIC_KEY if last is None else last.public_key)
        audit = audit_ledger(node, key, Evidence(statements=tuple(statements)))
        if audit.sound:
            events = read_chain(node / layout.LEDGER, key).events
        is_lost = is_lost or audit.unprotected > 0
    return _Client(name, events, is_lost, len(statements), audit)


def _with_others(
    clients: list[_Client], config: Config, others: tuple[Path, ...], findings: list[str]
) -> list[_Client]:
    """Adds the charges of further runs, from a client's ledger or its statements.

    A client with neither is a finding, unless the other run is a simulation that samples its clients:
    there the client was never chosen. If the other run partitioned the same data in the same way,
    charges are added client by client; otherwise a unit may have been at any client there, and each
    client gets the charges of all of them.
    """
    for other in others:
        directory, theirs = RunDirectory.open(other)
        statements = directory.statements()
        found = _clients(directory, theirs.federation.num_clients, statements)
        if not statements and all(client.audit is None for client in found):
            raise Unusable(
                f"--with {other}: it holds neither a ledger nor a statement, so nothing shows what it "
                f"spent; leave it out if no round began"
            )
        wrong = _wrong(directory, found, statements) if statements else _of_ledgers(found)
        if theirs.engine.nodes is not None or theirs.federation.clients_per_round is None:
            wrong += [
                f"{client.name}: neither a ledger nor a statement is here: nothing shows what it spent"
                for client in found
                if client.audit is None and not client.releases
            ]
        findings += [f"{other}, {finding}" for finding in wrong]
        charged, lost = [each.events for each in found], [each.is_lost for each in found]
        same = (theirs.data, theirs.run.seed, theirs.federation.num_clients) == (
            config.data,
            config.run.seed,
            config.federation.num_clients,
        )
        everything = tuple(event for events in charged for event in events)
        if not same:
            charged, lost = [everything] * len(clients), [any(lost)] * len(clients)
        clients = [
            replace(client, events=client.events + more, is_lost=client.is_lost or bare)
            for client, more, bare in zip(clients, charged, lost, strict=True)
        ]
    return clients


def _worst(clients: list[_Client], delta: float, *, overlapping: bool) -> tuple[Event, ...]:
    """Returns the charges that a unit bears: the most of one client, or those of all clients."""
    if overlapping:
        return tuple(event for client in clients for event in client.events)
    return max((client.events for client in clients), key=lambda each: accounting.epsilon(each, delta))


def _guarantee(events: tuple[Event, ...], delta: float, *, is_lost: bool) -> dict[str, Any]:
    """Epsilon by three accountants, over several deltas, and the resulting bound on an attacker.

    After a release without privacy, everything is infinite except the accounts of the charges.
    """
    accounts = accounting.cross_check(events, delta, needs_prv=False)
    deltas = sorted({*_DELTAS, delta})
    curve = [math.inf if is_lost else accounting.epsilon(events, each) for each in deltas]
    attack = [
        [rate, 1.0 if is_lost else accounting.true_positive_bound(events, rate)]
        for rate in _FALSE_POSITIVE_RATES
    ]
    return {
        "delta": delta,
        "epsilon": epsilon_as_json(math.inf if is_lost else accounts.epsilon),
        "accounts": asdict(accounts),
        "assumption": _assumption(events, delta, is_lost=is_lost),
        "curve": [[each, epsilon_as_json(found)] for each, found in zip(deltas, curve, strict=True)],
        "attack": attack,
    }


def _assumption(events: tuple[Event, ...], delta: float, *, is_lost: bool) -> dict[str, Any] | None:
    """What epsilon assumes of other nodes, and epsilon without it; None if it assumes nothing."""
    honest = least_honest(events)
    if honest is None:
        return None
    weaker = math.inf if is_lost else accounting.epsilon_if_all_collude(events, delta)
    return {
        "honest_nodes": honest,
        "text": assumption(honest),
        "epsilon_if_all_collude": epsilon_as_json(weaker),
    }


def _attacked(
    clients: list[_Client], privacy: PrivacyConfig, on_progress: Progress
) -> dict[str, Any] | None:
    """Attacks the client with the most steps."""
    told = partial(on_progress, "attack with canaries, steps")
    return attacked([client.events for client in clients], privacy, told)


def _describe(client: _Client, delta: float) -> dict[str, Any]:
    """Describes one client's charges."""
    audit = client.audit
    return {
        "name": client.name,
        "epsilon": epsilon_as_json(client.epsilon(delta)),
        "charges": len(client.events),
        "steps": sum(event.steps for event in client.events),
        "statements": client.releases,
        "ledger": None if audit is None else as_json(audit),
    }


def _groups(
    events: tuple[Event, ...], delta: float, sizes: tuple[int, ...], on_progress: Progress
) -> list[tuple[int, float | str]]:
    """Returns epsilon of a person with several records, by tight mixture accounting."""
    found: list[tuple[int, float | str]] = []
    for size in sizes:
        found.append((size, epsilon_as_json(accounting.group_epsilon(events, delta, size))))
        on_progress("epsilon of a person with several records", len(found), len(sizes))
    return found


def _mechanisms(directory: RunDirectory, num_clients: int) -> list[dict[str, Any]]:
    """Returns each distinct mechanism that was charged, as the ledgers or statements name it."""
    found: dict[str, dict[str, Any]] = {}
    for index in range(num_clients):
        node = directory.nodes / layout.simulated(index)
        if not (node / layout.LEDGER).exists():
            continue
        try:
            chain = read_chain(node / layout.LEDGER, read_public_key(node / PUBLIC_KEY))
        except LedgerError:
            continue  # already among the findings
        for charge in chain.charges:
            values = {
                "purpose": charge.purpose,
                **asdict(charge.event),
                "protocol": charge.protocol,
                "clip_norm": charge.clip_norm,
                "unit_column": charge.unit_column,
                "max_records_per_unit": charge.max_records_per_unit,
                "normaliser": charge.normaliser,
                "base_sha256": charge.base_sha256,
                "code_version": charge.code_version,
                "config_sha256": charge.config_sha256,
            }
            found.setdefault(json_text(values, sort_keys=True), values)
    return list(found.values())


def _strangers(directory: RunDirectory, num_clients: int) -> list[str]:
    """Returns node directories that belong to no client: their charges would not be counted."""
    known = {layout.simulated(index) for index in range(num_clients)}
    found = sorted(each.name for each in directory.nodes.glob("client-*"))
    return [f"nodes/{name} is of no client of this run" for name in found if name not in known]


def _rounds(directory: RunDirectory, planned: int) -> dict[str, int]:
    """Summarises the rounds."""
    records = directory.records()
    return {
        "planned": planned,
        "done": len(records),
        "failed": sum(record.failed for record in records),
        "late": sum(record.late for record in records),
        "refused": sum(record.refused for record in records),
    }


def _attestation(directory: RunDirectory) -> dict[str, Any] | None:
    """Returns the self-test attestation of this run; None if there is none."""
    try:
        values = json.loads((directory.nodes / layout.SELF_TEST).read_text(encoding="utf-8"))
        return {**values, "same_code_as_here": _is_here(values["fingerprint"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_here(fingerprint: str) -> bool | None:
    """Whether code that passed a self-test is the code here; None where training is not installed."""
    try:
        return fingerprint == code_fingerprint()
    except MissingPackage:
        return None


def _write(path: Path, audit: dict[str, Any]) -> None:
    """Writes the audit in its three formats."""
    markdown = render("audit.md.j2", audit=audit)
    write_text(path / "audit.json", json_text(audit, indent=2) + "\n")
    write_text(path / "audit.md", markdown)
    write_text(path / "audit.html", page(markdown, f"Privacy audit of {audit['run']['name']}"))
