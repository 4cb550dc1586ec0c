"""The command line."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import fedslm
from fedslm import config as configuration
from fedslm import contradictions
from fedslm.config import Config
from fedslm.errors import FedslmError

app = typer.Typer(
    help="Federated, privacy-preserving fine-tuning of small language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
config_app = typer.Typer(help="Look at and check a configuration.", no_args_is_help=True)
app.add_typer(config_app, name="config")

_ERRORS = Console(stderr=True)
_INTERRUPTED = 130

ConfigPath = Annotated[Path, typer.Argument(help="A TOML file.", metavar="CONFIG")]
Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one value; may be repeated."),
]
Json = Annotated[bool, typer.Option("--json", help="End with one JSON line on standard output.")]


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Prints our own errors without a traceback; Ctrl-C ends cleanly."""
    try:
        yield
    except FedslmError as error:
        _ERRORS.print(f"[red bold]error:[/red bold] {type(error).__name__}", highlight=False)
        _ERRORS.print(str(error), highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(1) from None


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


@app.command()
def simulate(
    config: Annotated[
        Path | None, typer.Argument(help="A TOML file; may be left out with --resume.")
    ] = None,
    overrides: Overrides = [],  # noqa: B006  (typer copies it)
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Continue this run directory.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run a federation on this machine.

    Example: `fedslm simulate simulations/demo.toml --set privacy.epsilon=2`

    Ctrl-C stops after the clients that are at work; continue with `--resume RUN`.
    """
    with _clear_errors():
        if config is None and (resume is None or overrides):
            message = "give a CONFIG, or --resume RUN without --set"
            raise typer.BadParameter(message)
        loaded = None if config is None else _load(config, overrides)
        report = _simulate(loaded, resume)
        _finish(report, as_json)
        if report["stopped"]:
            _ERRORS.print(f"stopped early: {report['stopped']}", style="red", markup=False)
            raise typer.Exit(1)


def _load(path: Path, overrides: list[str]) -> Config:
    """Reads a config, refuses contradictions, and shows warnings."""
    loaded = configuration.from_toml(path, overrides)
    contradictions.check(loaded)
    for warning in contradictions.warnings(loaded):
        _ERRORS.print(f"warning: {warning}", style="yellow", highlight=False, markup=False)
    return loaded


def _simulate(config: Config | None, resume: Path | None) -> dict[str, Any]:
    """Runs or resumes behind a progress bar."""
    if config is None or (config.engine.name == "local" and config.engine.workers != 0):
        from fedslm.federation.workers import preload

        preload()
    from fedslm import simulation
    from fedslm.progress import Bar

    bar = Bar()
    try:
        if resume is not None:
            return simulation.resume(resume, bar, config)
        if config is None:
            raise typer.BadParameter("give a CONFIG")
        return simulation.simulate(config, bar)
    except KeyboardInterrupt:
        bar.close()
        directory = resume or Path(
            (config and config.run.directory) or Path("runs") / (config.run.name if config else "")
        )
        hint = f"interrupted; continue with: fedslm simulate --resume {directory}"
        _ERRORS.print(hint, highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(_INTERRUPTED) from None
    finally:
        bar.close()


def _finish(report: dict[str, Any], as_json: bool) -> None:
    """Says what came out and where to look."""
    from fedslm.progress import readable

    if as_json:
        keys = (
            "directory metrics_before metrics_after privacy epsilon delta rounds stopped seconds "
            "bytes_down bytes_up adapter_sha256"
        )
        typer.echo(json.dumps({key: report[key] for key in keys.split()}))
        return
    console = Console()
    name = report["headline"]
    before, after = report["metrics_before"][name], report["metrics_after"][name]
    console.print(f"{name}: {before:.4f} before, [bold]{after:.4f}[/bold] after", highlight=False)
    if report["epsilon"] is not None:
        spent = f"ε = {report['epsilon']:.3f} at δ = {report['delta']:g}"
        console.print(f"privacy: {spent} (largest over clients)", highlight=False)
    sent = f"{readable(report['bytes_down'])} down, {readable(report['bytes_up'])} up"
    console.print(f"sent: {sent}; {report['seconds']:.1f} s", highlight=False)
    for file in ("report.md", "adapter", "ledger"):
        path = Path(report["directory"]) / file
        if path.exists():
            console.print(f"  {path}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def demo(
    directory: Annotated[
        Path, typer.Option(help="Where the three runs are written.", metavar="DIRECTORY")
    ] = Path("runs/demo"),
    as_json: Json = False,
) -> None:
    """Train the embedded model across five fictional hospitals, without privacy, at ε = 8 and ε = 2.

    Example: `fedslm demo --directory /tmp/demo`
    """
    with _clear_errors():
        from fedslm.federation.workers import preload

        preload()
        from fedslm import demonstration

        demonstration.run(directory, as_json=as_json)


@config_app.command("schema")
def schema() -> None:
    """Print the JSON Schema of a configuration.

    Example: `fedslm config schema > schema.json`
    """
    typer.echo(json.dumps(Config.model_json_schema(), indent=2))


@config_app.command("show")
def show(config: ConfigPath, overrides: Overrides = []) -> None:  # noqa: B006
    """Print a configuration with all defaults filled in.

    Example: `fedslm config show simulations/demo.toml`
    """
    with _clear_errors():
        typer.echo(configuration.to_toml(_load(config, overrides).resolved()))


@config_app.command("check")
def check(config: ConfigPath, overrides: Overrides = []) -> None:  # noqa: B006
    """Say what is wrong with a configuration's keys and values; data and model are not looked at.

    Example: `fedslm config check simulations/demo.toml --set privacy.delta=1e-6`
    """
    with _clear_errors():
        loaded = _load(config, overrides)
        typer.echo(f"{config}: ok (sha256 {loaded.sha256()[:12]})")
