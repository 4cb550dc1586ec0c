"""Reports of a run for people and programs: report.json, report.md, report.png, the model card."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import fedslm
from fedslm import layout
from fedslm.config import Config
from fedslm.config.tasks import TASKS
from fedslm.errors import RunError
from fedslm.federation.checkpoint import RunDirectory
from fedslm.federation.participation import unknown_rounds
from fedslm.federation.rounds import Outcome
from fedslm.models.peft_export import plain
from fedslm.privacy import accounting
from fedslm.privacy.chain import read_chain
from fedslm.privacy.keys import PUBLIC_KEY, read_public_key
from fedslm.privacy.plan import Plan, PrivatePlan
from fedslm.privacy.shares import assumption
from fedslm.protocol.metrics import as_json
from fedslm.recipes import expected, read_recipe
from fedslm.records import Event, PrivacySpent, RoundRecord, epsilon_as_json
from fedslm.rendering import render
from fedslm.reporting.plots import plot_rounds
from fedslm.storage import expand, json_text, read_text, write_text

_LONGEST_SHARE = 64  # bytes of a number


@dataclass(frozen=True)
class Inputs:
    """The data that a report is built from.

    Attributes:
        config: The resolved config.
        plan: The plan that ran.
        outcome: The result of the rounds.
        clients: Names of the clients.
        headline: Name of the task's main metric.
        seconds: Wall time of this session.
        duplicates: Training records that also occur in the public split (simulation).
    """

    config: Config
    plan: Plan
    outcome: Outcome
    clients: tuple[str, ...]
    headline: str
    seconds: float
    duplicates: int = 0


def write(directory: RunDirectory, inputs: Inputs) -> dict[str, Any]:
    """Writes all reports of a run into its directory.

    Returns:
        The content of ``report.json``.
    """
    records = directory.records()
    report = _report(directory, inputs, records)
    write_text(directory.path / layout.REPORT_PAGE, render("report.md.j2", report=report))
    values = {"report": report, "config": inputs.config, "dtype": inputs.outcome.dtype}
    card = render("model_card.md.j2", tasks=TASKS, **values)
    write_text(directory.path / layout.ADAPTER / "README.md", card)
    plot_rounds(directory.path / "report.png", records, report)
    text = json_text(report, indent=2) + "\n"
    write_text(directory.path / layout.REPORT, text)  # last: this file marks the run as finished
    return report


def _report(directory: RunDirectory, inputs: Inputs, records: list[RoundRecord]) -> dict[str, Any]:
    """Builds the content of ``report.json``."""
    config, outcome, plan = inputs.config, inputs.outcome, inputs.plan
    adapter, lora = plain(outcome.adapter, config.lora)  # as it was exported
    private = isinstance(plan, PrivatePlan)  # then the report contains no exact record counts
    return {
        "fedslm_version": fedslm.__version__,
        "run_id": directory.run_id,
        "name": config.run.name,
        "directory": str(directory.path),
        "config_sha256": config.sha256(),
        **_base(config, outcome),
        "adapter_sha256": adapter.sha256(),
        "adapter_lora": {"rank": lora.rank, "alpha": lora.alpha, "rslora": lora.rslora},
        "num_trained_parameters": outcome.checkpoint.server.moving.num_parameters,
        "num_frozen_parameters": outcome.frozen.num_parameters,
        "aggregation": outcome.setup.method,
        **_expected(directory, config, outcome),
        "settings": _settings(config),
        "attack": _attack(config),
        "personal": None if config.personalization.method == "none" else config.personalization.method,
        "task": config.task.name,
        "labels": list(outcome.setup.labels),
        "headline": inputs.headline,
        "metrics_before": dict(outcome.checkpoint.metrics_before),
        "metrics_after": dict(outcome.checkpoint.metrics),
        "rounds": outcome.checkpoint.round,
        "rounds_planned": config.federation.rounds,
        "stopped": outcome.stopped,
        "clients": list(inputs.clients),
        "training_records_in_public_split": None if private else inputs.duplicates,
        "plan": {"unit": plan.unit, **asdict(plan)} if isinstance(plan, PrivatePlan) else None,
        **_privacy(config, _charged(directory, inputs)),
        "private_metrics": [r.private_metric for r in records if r.private_metric is not None],
        "bytes_down": sum(record.bytes_down for record in records),
        "bytes_up": sum(record.bytes_up for record in records),
        **_times(records),
        "seconds": inputs.seconds,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "measured_by_clients": _measured(inputs),
        "failures": [f"round {r.round}: {reason}" for r in records for reason in r.reasons],
    }


def _expected(directory: RunDirectory, config: Config, outcome: Outcome) -> dict[str, Any]:
    """Returns the recipe and the held-out share, if any, and what the noise leaves to learn."""
    found = expected(config, outcome.checkpoint.server.moving.num_parameters)
    outlook = None if found is None else found.as_json()
    recipe, share = read_recipe(directory.path), _holdout(directory)
    return {"recipe": recipe, "outlook": outlook, "holdout": share}


def _holdout(directory: RunDirectory) -> float | None:
    """Share of the private file whose units are treated as public; None if the public split is not.

    Raises:
        RunError: The file cannot be read, or holds something else.
    """
    path = directory.path / layout.HOLDOUT
    if not path.exists():
        return None
    try:
        share = json.loads(read_text(path, _LONGEST_SHARE))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    if not isinstance(share, float) or not 0 < share < 1:
        raise RunError(f"{path}: value {share!r} must be in (0, 1), the share that was held out")
    return share


def _base(config: Config, outcome: Outcome) -> dict[str, str]:
    """Returns name, hash and precision of the base model at the server."""
    return {
        "base_model": expand(config.model.base),
        "base_sha256": outcome.setup.base_sha256,
        "base_dtype": outcome.dtype,
    }


_TOLD_ELSEWHERE = {
    "run",
    "model",
    "data",
    "task",
    "privacy",
    "engine",
    "attack",
    "federation",
    "distill",
    "secure_aggregation",
}


def _settings(config: Config) -> dict[str, Any]:
    """Returns the training and aggregation settings that differ from the default."""
    found = {}
    for name, values in config.model_dump(mode="json").items():
        if name in _TOLD_ELSEWHERE:
            continue
        for key, value in values.items():
            default = getattr(config.__class__.model_fields[name].default, key)
            usual = list(default) if isinstance(default, tuple) else default
            if value != usual and f"{name}.{key}" != "aggregation.method":
                found[f"{name}.{key}"] = value
    return found


def _times(records: list[RoundRecord]) -> dict[str, Any]:
    """Returns the time of all rounds, and the part of it that evaluation took."""
    return {
        "seconds_in_rounds": sum(record.seconds for record in records),
        "evaluations": sum(record.evaluation_seconds > 0 for record in records),
        "seconds_in_evaluations": sum(record.evaluation_seconds for record in records),
    }


def _attack(config: Config) -> dict[str, Any] | None:
    """Describes the attack in a simulation and the defence; None if there was none."""
    if config.attack.kind == "none":
        return None
    aggregation = config.aggregation
    return {
        "kind": config.attack.kind,
        "clients": config.attack.clients,
        "rule": aggregation.rule,
        "hostile": aggregation.num_byzantine,
    }


def _measured(inputs: Inputs) -> dict[str, Any] | None:
    """Returns the clients' metrics on held-out records; None if they reported none."""
    measured = {inputs.clients[client]: each for client, each in inputs.outcome.measured.items()}
    return as_json(measured) if measured else None


def _charged(directory: RunDirectory, inputs: Inputs) -> dict[str, tuple[Event, ...]]:
    """Returns each client's charges in this run, from its ledger (simulation) or its statement.

    A round of which no statement came counts as charged if it may have been.

    Clients without a directory and a statement are left out: most of a large population.
    """
    if not isinstance(inputs.plan, PrivatePlan):
        return {}
    statements = inputs.outcome.checkpoint.statements
    names = (path.name.removeprefix("client-") for path in directory.nodes.glob("client-*"))
    there = {int(name) for name in names if name.isdecimal()}
    charged = {}
    for client in sorted((there | set(statements)) & set(range(len(inputs.clients)))):
        node = directory.nodes / layout.simulated(client)
        if (node / layout.LEDGER).exists():
            events = read_chain(node / layout.LEDGER, read_public_key(node / PUBLIC_KEY)).events
        else:
            events = ()
            if (last := statements.get(client)) is not None:
                perhaps = unknown_rounds(directory.records(), client, last.round)
                events = last.events + perhaps * inputs.plan.round_events
        charged[inputs.clients[client]] = events
    return charged


def _privacy(config: Config, charged: dict[str, tuple[Event, ...]]) -> dict[str, Any]:
    """Returns the privacy loss of each client and of the whole network; infinite without privacy."""
    delta, overlapping = config.privacy.delta, config.privacy.overlapping
    spent, epsilon, is_private = {}, math.inf, config.privacy.unit != "none"
    if is_private and delta is not None:
        spent = {name: _spent(events, delta) for name, events in charged.items()}
        clients = list(charged.values()) or [()]
        epsilon = accounting.network_epsilon(clients, delta, overlapping=overlapping)
    return {
        "assumption": _assumption(config, charged),
        "privacy": spent,
        "epsilon": epsilon_as_json(epsilon),
        "delta": delta if is_private else None,
        "overlapping": overlapping,
        "is_deployed": config.engine.nodes is not None,
    }


def _assumption(config: Config, charged: dict[str, tuple[Event, ...]]) -> dict[str, Any] | None:
    """Returns what epsilon assumes of other clients, and epsilon without it; None: nothing."""
    secure, delta = config.secure_aggregation, config.privacy.delta
    if not config.privacy.shares_noise or secure.threshold is None or delta is None:
        return None
    honest = secure.threshold - secure.max_colluding
    found = [accounting.epsilon_if_all_collude(each, delta) for each in charged.values()]
    return {
        "honest_nodes": honest,
        "text": assumption(honest),
        "threshold": secure.threshold,
        "max_colluding": secure.max_colluding,
        "protocol": secure.protocol,
        "epsilon_if_all_collude": epsilon_as_json(max(found, default=0.0)),
    }


def _spent(events: tuple[Event, ...], delta: float) -> dict[str, Any]:
    """Returns epsilon and steps of the given charges."""
    steps = sum(event.steps for event in events)
    spent = PrivacySpent(accounting.epsilon(events, delta), delta, steps)
    return {**asdict(spent), "epsilon": epsilon_as_json(spent.epsilon)}
