"""The record of a run for people and programs: report.json, report.md, report.png, the model card."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fedslm
from fedslm.config import Config
from fedslm.federation.checkpoint import RunDirectory
from fedslm.federation.rounds import Outcome
from fedslm.privacy.ledger import Ledger
from fedslm.privacy.plan import ExamplePlan, Plan
from fedslm.records import PrivacySpent, RoundRecord
from fedslm.reporting.plots import plot_rounds
from fedslm.storage import write_text


@dataclass(frozen=True)
class Inputs:
    """What a report is made of.

    Attributes:
        config: The resolved config.
        plan: What ran.
        outcome: How it ended.
        clients: Names of the clients.
        headline: Name of the task's first metric.
        seconds: Wall time of this session.
    """

    config: Config
    plan: Plan
    outcome: Outcome
    clients: tuple[str, ...]
    headline: str
    seconds: float


def write(directory: RunDirectory, inputs: Inputs) -> dict[str, Any]:
    """Writes everything that explains a run into its directory.

    Returns:
        The content of ``report.json``.
    """
    records = directory.records()
    report = _report(directory, inputs, records)
    write_text(directory.path / "report.json", json.dumps(report, indent=2) + "\n")
    write_text(directory.path / "report.md", _render("report.md.j2", report=report))
    card = _render("model_card.md.j2", report=report, config=inputs.config)
    write_text(directory.path / "adapter" / "README.md", card)
    plot_rounds(directory.path / "report.png", records, report)
    return report


def _report(directory: RunDirectory, inputs: Inputs, records: list[RoundRecord]) -> dict[str, Any]:
    """The content of ``report.json``."""
    config, outcome, plan = inputs.config, inputs.outcome, inputs.plan
    spent = {name: asdict(value) for name, value in _spent(directory, inputs).items()}
    return {
        "fedslm_version": fedslm.__version__,
        "run_id": directory.run_id,
        "name": config.run.name,
        "directory": str(directory.path),
        "config_sha256": config.sha256(),
        "base_model": config.model.base,
        "base_sha256": outcome.setup.base_sha256,
        "adapter_sha256": outcome.adapter.sha256(),
        "num_trained_parameters": outcome.checkpoint.trained.num_parameters,
        "num_frozen_parameters": outcome.frozen.num_parameters,
        "aggregation": outcome.setup.method,
        "task": config.task.name,
        "labels": list(outcome.setup.labels),
        "headline": inputs.headline,
        "metrics_before": dict(outcome.checkpoint.metrics_before),
        "metrics_after": dict(outcome.checkpoint.metrics),
        "rounds": outcome.checkpoint.round,
        "rounds_planned": config.federation.rounds,
        "stopped": outcome.stopped,
        "clients": list(inputs.clients),
        "plan": asdict(plan) if isinstance(plan, ExamplePlan) else None,
        "privacy": spent,
        "epsilon": max((value["epsilon"] for value in spent.values()), default=None),
        "delta": config.privacy.delta if spent else None,
        "bytes_down": sum(record.bytes_down for record in records),
        "bytes_up": sum(record.bytes_up for record in records),
        "seconds_in_rounds": sum(record.seconds for record in records),
        "seconds": inputs.seconds,
        "failures": [f"round {r.round}: {reason}" for r in records for reason in r.reasons],
    }


def _spent(directory: RunDirectory, inputs: Inputs) -> dict[str, PrivacySpent]:
    """What each client's own ledger says; empty without privacy."""
    plan = inputs.plan
    if not isinstance(plan, ExamplePlan):
        return {}
    ledgers = {
        name: Ledger(directory.path / "ledger" / f"client-{client:05d}.jsonl")
        for client, name in enumerate(inputs.clients)
    }
    return {name: ledger.spent(plan.delta) for name, ledger in ledgers.items()}


def _render(template: str, **values: Any) -> str:
    """Renders one of the templates beside this file."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701  (Markdown, not HTML)
    )
    return environment.get_template(template).render(**values)
