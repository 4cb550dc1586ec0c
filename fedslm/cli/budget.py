"""``fedslm budget``: plan a privacy budget before anything is spent."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fedslm.cli.console import ERRORS, Json, clear_errors, load_config
from fedslm.config import Config
from fedslm.errors import OutOfRange, plural
from fedslm.extras import is_trainable
from fedslm.models.base import local
from fedslm.storage import json_text

if TYPE_CHECKING:
    from fedslm.privacy.planning import BudgetPlan, BudgetQuery

budget_app = typer.Typer(help="Plan a privacy budget before it is spent.", no_args_is_help=True)


@budget_app.callback()
def budget() -> None:
    """Plan a privacy budget before it is spent."""


@budget_app.command("plan")
def plan(
    config: Annotated[
        Path | None,
        typer.Argument(help="Config that supplies the values not given.", metavar="[CONFIG]"),
    ] = None,
    unit: Annotated[str | None, typer.Option(help="record, user (or patient) or client.")] = None,
    epsilon: Annotated[float | None, typer.Option(help="Budget: find the noise.")] = None,
    noise_multiplier: Annotated[
        float | None, typer.Option(help="Noise / clip norm: find epsilon, or with --epsilon the steps.")
    ] = None,
    delta: Annotated[float | None, typer.Option(help="Failure probability.")] = None,
    sample_rate: Annotated[
        float | None,
        typer.Option(help="Probability that a unit joins a step (not needed for unit client)."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Noisy steps in the whole run.")] = None,
    rounds: Annotated[
        int | None,
        typer.Option(help="Instead of --steps; for unit client: the most rounds one client joins."),
    ] = None,
    local_steps: Annotated[int | None, typer.Option(help="Local steps in a round.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Units in a step, for the signal-to-noise ratio.")
    ] = None,
    clients: Annotated[int | None, typer.Option(help="Clients, for the signal-to-noise ratio.")] = None,
    parameters: Annotated[
        int | None, typer.Option(help="Trained parameters, for the signal-to-noise ratio.")
    ] = None,
    honest_nodes: Annotated[
        int | None,
        typer.Option(help="Clients that share the noise of a sum (docs/secure-aggregation.md)."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Plot epsilon over the rounds as PNG.")] = None,
    as_json: Json = False,
) -> None:
    """Find the noise for an epsilon, epsilon for a noise multiplier, or the rounds a budget allows.

    Example: `fedslm budget plan --epsilon 3 --delta 1e-5 --sample-rate 0.032 --steps 150`

    Example: `fedslm budget plan my.toml --parameters 40000 --plot budget.png`
    """
    given = {
        name: value for name, value in locals().items() if name not in ("plot", "as_json", "config")
    }
    with clear_errors():
        from fedslm.privacy.planning import plan_budget

        found = plan_budget(_question(given, None if config is None else load_config(config, [])))
        if plot is not None:
            from fedslm.reporting.plots import plot_budget

            plot_budget(plot, found)
        if as_json:
            typer.echo(json_text(asdict(found)))
        else:
            _print(found, plot)


def _question(given: dict[str, Any], config: Config | None) -> BudgetQuery:
    """Builds the query from the options, and otherwise from the config."""
    from fedslm.privacy.planning import PLANNED_UNITS, BudgetQuery

    known = {} if config is None else _from_config(config)
    if given["epsilon"] is not None and given["noise_multiplier"] is None:
        known.pop("noise_multiplier", None)  # a different budget needs a different noise level
    if given["noise_multiplier"] is not None and given["epsilon"] is None:
        known.pop("epsilon", None)
    unit = given["unit"] or known.get("unit", "record")
    unit = "user" if unit == "patient" else unit
    if unit not in PLANNED_UNITS:
        raise OutOfRange(f"unit={unit!r} must be record, user or client")
    if unit == "client":
        known = _of_clients(known)
    known |= {name: value for name, value in given.items() if value is not None} | {"unit": unit}
    missing = [f"--{key.replace('_', '-')}" for key in ("sample_rate", "delta") if key not in known]
    if missing:
        raise OutOfRange(f"{' and '.join(missing)} must be given, or a CONFIG that has them")
    if not 0 < known["sample_rate"] <= 1:
        raise OutOfRange(f"sample_rate={known['sample_rate']} must be in (0, 1]")
    local_steps, rounds = known.pop("local_steps", 1), known.pop("rounds", None)
    if rounds is not None and rounds < 1:
        raise OutOfRange(f"rounds={rounds} must be at least 1")
    if known.get("steps") is None and rounds is not None:
        known["steps"] = rounds * local_steps
    for key in ("steps", "epsilon", "noise_multiplier", "batch_size", "clients", "parameters"):
        if key in known and not 0 < known[key] < math.inf:
            raise OutOfRange(f"{key}={known[key]} must be positive and finite")
    if local_steps < 1:
        raise OutOfRange(f"local_steps={local_steps} must be at least 1")
    budget, noise = known.get("epsilon"), known.get("noise_multiplier")
    if known.get("steps") is None and (budget is None or noise is None):
        raise OutOfRange("give steps, or epsilon and noise_multiplier to find how many they allow")
    if budget is None and noise is None:
        raise OutOfRange("give epsilon to find the noise, or noise_multiplier to find epsilon")
    return replace(
        BudgetQuery(known["sample_rate"], known["delta"]), **known, steps_per_round=local_steps
    )


def _from_config(config: Config) -> dict[str, Any]:
    """Returns the plan settings of a config."""
    privacy, training, federation = config.privacy, config.training, config.federation
    if privacy.unit == "none":
        raise OutOfRange('privacy.unit="none" has no budget; give --unit and the rest')
    values = {
        "unit": privacy.unit,
        "epsilon": privacy.epsilon,
        "noise_multiplier": privacy.noise_multiplier,
        "delta": privacy.delta,
        "sample_rate": privacy.sample_rate,
        "rounds": federation.rounds + privacy.spare_rounds,
        "local_steps": training.local_steps,
        "batch_size": training.batch_size,
        "clients": federation.cohort_size,
    }
    secure = config.secure_aggregation
    if privacy.shares_noise and secure.threshold is not None:
        values["honest_nodes"] = secure.threshold - secure.max_colluding
    if not is_trainable():
        ERRORS.print("note: for the signal-to-noise ratio give --parameters; fedslm[train] counts them")
    elif local(config.model) is not None:
        from fedslm.cli.model import trained_parameters

        values["parameters"] = trained_parameters(config.resolved())
    return {key: value for key, value in values.items() if value is not None}


def _of_clients(known: dict[str, Any]) -> dict[str, Any]:
    """Returns the plan settings with the client as the unit: one release per round.

    A client may be in every cohort, and cohorts are public: its sample rate is 1.
    """
    cohort = {"batch_size": known["clients"]} if "clients" in known else {}
    kept = ("epsilon", "delta", "noise_multiplier", "rounds")
    return {key: known[key] for key in kept if key in known} | cohort | {"sample_rate": 1.0}


def _print(found: BudgetPlan, plot: Path | None) -> None:
    """Prints the plan, a table of epsilon over the rounds, and warnings."""
    console = Console()
    steps, rounds = plural(found.steps, "step"), plural(found.rounds, "round")
    work = f"{steps} in {rounds} at sample rate {found.sample_rate:g}"
    if found.unit == "client":
        work = f"it joins {rounds}; cohorts are public, so sampling protects no client"
    console.print(
        f"noise [bold]{found.noise_multiplier:g}[/bold], ε = [bold]{found.epsilon:.3f}[/bold] "
        f"at δ = {found.delta:g} for one {found.unit}: {work}",
        highlight=False,
    )
    if found.honest_nodes is not None and found.epsilon_if_all_collude is not None:
        from fedslm.privacy.shares import assumption
        from fedslm.rendering import spent

        console.print(f"this ε holds if {assumption(found.honest_nodes)};", highlight=False)
        weaker = spent(found.epsilon_if_all_collude)
        console.print(f"if all others collude, ε = [bold]{weaker}[/bold]", highlight=False)
    words = f"accountants: {found.accounts.in_words()}"
    console.print(words, highlight=False, markup=False)
    if found.affordable_steps is not None:
        paid = plural(found.affordable_steps, "step")
        console.print(f"the budget allows {paid}", highlight=False)
    if found.signal_to_noise is not None:
        console.print(
            f"signal-to-noise ratio over the run, if all gradients agreed: {found.signal_to_noise:.2g}",
            highlight=False,
        )
    table = Table(title="ε over the rounds")
    for column in ("round", *(f"δ = {delta:g}" for delta in found.deltas)):
        table.add_column(column, justify="right")
    for point in found.curve:
        table.add_row(str(point.round), *(f"{epsilon:.3f}" for epsilon in point.epsilons))
    console.print(table)
    if plot is not None:
        console.print(f"  {plot}", highlight=False, markup=False, soft_wrap=True)
    for warning in found.warnings:
        ERRORS.print(f"warning: {warning}", style="yellow")
