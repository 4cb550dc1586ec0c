"""The command line."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import fedslm
from fedslm import config as configuration
from fedslm.cli.audit import audit_app
from fedslm.cli.budget import budget_app
from fedslm.cli.console import (
    DEPLOY,
    ERRORS,
    INTERRUPTED,
    PRIVACY,
    TRAIN,
    ConfigPath,
    Json,
    Overrides,
    clear_errors,
    load_completed,
    load_config,
)
from fedslm.cli.data import data_app, remarks, seen
from fedslm.cli.distill import distill_app
from fedslm.cli.doctor import doctor_app
from fedslm.cli.inference import inference_app
from fedslm.cli.init import init_app
from fedslm.cli.methods import methods_app
from fedslm.cli.model import model_app
from fedslm.cli.node import node_app
from fedslm.cli.outcome import fail_if_stopped, finish
from fedslm.cli.policy import policy_app
from fedslm.cli.program import Program
from fedslm.cli.provision import provision_app
from fedslm.cli.server import server_app
from fedslm.cli.sweep import sweep_app
from fedslm.cli.train import train_app
from fedslm.cli.tune import tune_app
from fedslm.config import Config
from fedslm.extras import is_trainable
from fedslm.models.base import check_early
from fedslm.storage import expand, json_text

if TYPE_CHECKING:
    from fedslm.recipes import Completed, Expectation

app = typer.Typer(
    cls=Program,
    help="Federated, privacy-preserving fine-tuning of small language models.",
    no_args_is_help=True,
    suggest_commands=False,  # click has suggested commands since 8.4
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
config_app = typer.Typer(help="Show and check a configuration.", no_args_is_help=True)
app.add_typer(config_app, name="config", rich_help_panel=TRAIN)
app.add_typer(data_app, name="data", rich_help_panel=TRAIN)
app.add_typer(model_app, name="model", rich_help_panel=TRAIN)
app.add_typer(init_app)
app.add_typer(doctor_app)
app.add_typer(methods_app)  # without a name: a top-level command
app.add_typer(train_app)
app.add_typer(sweep_app)
app.add_typer(tune_app)
app.add_typer(distill_app)
app.add_typer(inference_app)
app.add_typer(budget_app, name="budget", rich_help_panel=PRIVACY)
app.add_typer(policy_app, name="policy", rich_help_panel=PRIVACY)
app.add_typer(audit_app, name="audit", rich_help_panel=PRIVACY)
app.add_typer(provision_app, name="provision", rich_help_panel=DEPLOY)
app.add_typer(server_app, name="server", rich_help_panel=DEPLOY)
app.add_typer(node_app, name="node", rich_help_panel=DEPLOY)


def _version(wanted: bool) -> None:
    """Prints the version."""
    if wanted:
        typer.echo(fedslm.__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Federated, privacy-preserving fine-tuning of small language models.

    Start with `fedslm demo`.
    """
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("fedslm").setLevel(logging.WARNING)


@app.command(rich_help_panel=TRAIN)
def simulate(
    config: Annotated[
        Path | None, typer.Argument(help="A TOML file; may be left out with --resume.")
    ] = None,
    overrides: Overrides = [],  # noqa: B006  (typer copies it)
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Continue this run directory.")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Show what would run where, and start nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Simulate a federation on this machine, or in a Ray cluster.

    Example: `fedslm simulate simulations/demo.toml --set privacy.epsilon=2`

    Ctrl-C stops once the clients now training are done; continue with `--resume RUN`.
    """
    with clear_errors():
        if config is None and (resume is None or overrides):
            message = "give a CONFIG, or --resume RUN without --set"
            raise typer.BadParameter(message)
        made = None if config is None else load_completed(config, overrides)
        loaded = None if made is None else made.config
        if plan:
            _show_plan(loaded, resume, as_json=as_json)
            return
        report = _finished(loaded, resume) or _simulate(made, resume)
        finish(report, as_json=as_json)
        fail_if_stopped(report)


def _show_plan(config: Config | None, resume: Path | None, *, as_json: bool) -> None:
    """Shows what a new run would take."""
    if config is None or resume is not None:
        raise typer.BadParameter("--plan needs a CONFIG, and no --resume")
    from fedslm.cli import plan

    plan.show(config, as_json=as_json)


def _finished(config: Config | None, resume: Path | None) -> dict[str, Any] | None:
    """Returns and reports the result of a run to be resumed that is already complete."""
    if resume is None:
        return None
    from fedslm.simulation import finished

    report = finished(resume, config)
    if report is not None:
        text = f"{resume} is finished: there is nothing left to do, and nothing was written"
        ERRORS.print(text)
    return report


def _simulate(made: Completed | None, resume: Path | None) -> dict[str, Any]:
    """Runs or resumes a simulation with a progress bar."""
    config = None if made is None else made.config
    if config is None or (config.engine.name == "local" and config.engine.workers != 0):
        from fedslm.workers import preload

        preload(private=config is None or config.privacy.unit != "none")
    from fedslm import simulation
    from fedslm.progress import Bar

    try:
        if resume is not None:
            return simulation.resume(resume, [Bar()], config)
        if made is None:
            raise typer.BadParameter("give a CONFIG")
        return simulation.simulate(made, [Bar()])
    except KeyboardInterrupt:
        directory = resume or Path(
            (config and config.run.directory) or Path("runs") / (config.run.name if config else "")
        )
        hint = f"interrupted; continue with: fedslm simulate --resume {directory}"
        ERRORS.print(hint)
        raise typer.Exit(INTERRUPTED) from None


@app.command(rich_help_panel=TRAIN)
def demo(
    directory: Annotated[
        Path, typer.Option(help="Where the four runs are written.", metavar="DIRECTORY")
    ] = Path("runs/demo"),
    as_json: Json = False,
) -> None:
    """Train the embedded model across five fictional hospitals, without and with privacy.

    Example: `fedslm demo --directory /tmp/demo`
    """
    with clear_errors():
        from fedslm.workers import preload

        preload(private=True)
        from fedslm import demonstration

        fail_if_stopped(*demonstration.run(directory, as_json=as_json))


@config_app.command("schema")
def schema() -> None:
    """Print the JSON Schema of a configuration.

    Example: `fedslm config schema > schema.json`
    """
    typer.echo(json_text(Config.model_json_schema(), indent=2))


@config_app.command("example")
def example(
    name: Annotated[
        str | None, typer.Argument(help="One of the listed names; without it, list them.")
    ] = None,
) -> None:
    """List the configurations to start from, or print one.

    Example: `fedslm config example demo > demo.toml`
    """
    with clear_errors():
        from fedslm.cli.examples import list_configs, text_of_config

        if name is None:
            list_configs()
        else:
            typer.echo(text_of_config(name), nl=False)


@config_app.command("show")
def show(config: ConfigPath, overrides: Overrides = []) -> None:  # noqa: B006
    """Print a configuration with all defaults filled in.

    Example: `fedslm config show simulations/demo.toml`
    """
    with clear_errors():
        typer.echo(configuration.to_toml(load_config(config, overrides).resolved()))


def _assumed(config: Config) -> str | None:
    """What the epsilon of a config rests on, and epsilon without it; None if it assumes nothing."""
    from fedslm.privacy import accounting
    from fedslm.privacy.calibration import calibrated, shares_of
    from fedslm.privacy.plan import NoPrivacy
    from fedslm.privacy.shares import assumption
    from fedslm.rendering import spent

    privacy, training, federation = config.privacy, config.training, config.federation
    if not privacy.shares_noise:
        return None
    shares = shares_of(privacy, training, config.secure_aggregation, federation.cohort_size)
    plan = calibrated(privacy, training, federation.rounds, shares)
    if shares is None or isinstance(plan, NoPrivacy):
        return None
    weaker = spent(accounting.epsilon_if_all_collude(plan.run_events, plan.delta))
    text = (
        f"epsilon={plan.epsilon:g} holds if {assumption(shares.honest_nodes)}; if all others collude "
        f"it is {weaker}"
    )
    if shares.protocol == "masked":
        return text
    return (
        f"{text}. protocol={shares.protocol!r} is a simulation of secure aggregation: the server forms "
        f"the sum itself"
    )


def _outlook(config: Config) -> Expectation | None:
    """Returns what to expect of a private config; None without privacy, base or fedslm[train]."""
    from fedslm.models.base import local

    if config.privacy.unit == "none" or local(config.model) is None:
        return None
    if not is_trainable():
        ERRORS.print("note: whether this config can learn is not checked: that needs fedslm[train]")
        return None
    from fedslm.cli.model import trained_parameters
    from fedslm.recipes import expected

    return expected(config, trained_parameters(config.resolved()))


@config_app.command("check")
def check(
    config: ConfigPath,
    overrides: Overrides = [],  # noqa: B006
    data: Annotated[
        bool, typer.Option("--data", help="Check the data too, as `fedslm data preview` does.")
    ] = False,
) -> None:
    """Check a configuration's keys and values, and with --data its data.

    If the base model is a local directory, its config.json is checked too: some architectures cannot
    be trained privately.

    Example: `fedslm config check simulations/demo.toml --set privacy.delta=1e-6`
    """
    with clear_errors():
        loaded = load_config(config, overrides)
        if loaded.model.base == "demo" or Path(expand(loaded.model.base)).exists():
            check_early(loaded.model, loaded.lora, private=loaded.privacy.unit != "none")
        if data:
            from fedslm.simulation import with_layout

            found = with_layout(loaded)
            for line in remarks(seen(found), found):
                typer.echo(line)
        if (assumed := _assumed(loaded)) is not None:
            typer.echo(assumed)
        outlook = _outlook(loaded)
        if outlook is not None and outlook.learns:
            typer.echo(outlook.text)
        elif outlook is not None:
            ERRORS.print(outlook.text, style="red")
        typer.echo(f"{config}: ok (sha256 {loaded.sha256()[:12]})")
