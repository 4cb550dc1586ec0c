"""``fedslm distill``: distill the federated model into a larger one, and measure the transfer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fedslm import layout
from fedslm.cli.answers import print_table, stages
from fedslm.cli.console import ERRORS, INTERRUPTED, TRAIN, Json, Overrides, clear_errors
from fedslm.config import values_of
from fedslm.errors import plural
from fedslm.storage import json_text

if TYPE_CHECKING:
    from fedslm.distillation.pipeline import Watcher

distill_app = typer.Typer()

_GIGA = 1e9
# Keys and arguments of Python, and the options that set them.
_OPTIONS = {
    "distill.student": "--student",
    "distill.source": "--data",
    "distill.split": "--split",
    "distill.method": "--method",
    "distill.general_source": "--general",
    "distill.steps": "--steps",
    "distill.device": "--device",
    "test": "--test",
    "test_split": "--test-split",
    "probe": "--probe",
    "probe_split": "--probe-split",
    "seeds": "--seeds",
    "resamples": "--resamples",
}


@distill_app.command(rich_help_panel=TRAIN)
def distill(
    run: Annotated[Path, typer.Argument(help="A finished run's directory.", metavar="RUN")],
    student: Annotated[
        str | None, typer.Option(help="The larger model: hub name or directory.", metavar="MODEL")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Public records: path, hub name or demo data.", metavar="PUBLIC")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split (or file stem) of --data.")] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="proxy-target, forward-kl, reverse-kl, jsd (same tokenizer, or classes); "
            "gated-reverse-kl, log-confidence (classes); sequence (other tokenizers); labels."
        ),
    ] = None,
    general: Annotated[
        str | None,
        typer.Option(
            help="General public text on which the student is kept close to its original output."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of the student.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Output directory; default: RUN/distilled.", metavar="DIR")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The teacher's base model, if it was moved since training.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps.")] = None,
    overrides: Overrides = [],  # noqa: B006
    drop_overlap: Annotated[
        bool, typer.Option("--drop-overlap", help="Leave out public records that contain test records.")
    ] = False,
    prove: Annotated[
        bool,
        typer.Option(
            "--prove",
            help="Train controls too, to test whether the clients' knowledge was transferred.",
        ),
    ] = False,
    test: Annotated[
        str | None,
        typer.Option(help="Test records for --prove; default: the run's evaluation split."),
    ] = None,
    test_split: Annotated[str, typer.Option(help="Split of --test.")] = "test",
    probe: Annotated[
        str | None,
        typer.Option(
            help='For --prove: probe records that only clients could know; needs a column "group".'
        ),
    ] = None,
    probe_split: Annotated[str, typer.Option(help="Split of --probe.")] = "probe",
    seeds: Annotated[int, typer.Option(help="For --prove: training runs (seeds) of each arm.")] = 1,
    resamples: Annotated[
        int, typer.Option(help="For --prove: bootstrap resamples, at least 1000.")
    ] = 2000,
    ceiling: Annotated[
        bool, typer.Option(help="For --prove: also train on a simulation's pooled private records.")
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and estimate memory and time.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Distill the federated model into a larger one, on public records only.

    The student has the guarantee of the federated adapter, and no more budget is spent. Run the same
    command again to resume an interrupted distillation.

    Example: `fedslm distill runs/triage --student BiggerLab/base --data public.jsonl`

    Example: `fedslm distill runs/story --student big --data public.jsonl --prove --seeds 3`
    """
    with clear_errors(_OPTIONS):
        from fedslm.api import students
        from fedslm.inference.trained import open_run

        opened = open_run(run, base=base)
        given = {
            "student": student,
            "source": data,
            "split": split,
            "method": method,
            "general_source": general,
            "steps": steps,
            "device": device,
        }
        settings = {f"distill.{key}": value for key, value in given.items() if value is not None}
        settings |= values_of(overrides)
        prepared = students.prepared(opened, settings, drop_overlap=drop_overlap)
        question = None
        if prove:
            proof = students.Proof(
                test, test_split, probe, probe_split, seeds, resamples, ceiling=ceiling
            )
            question = students.question(prepared, proof)
        elif test or probe:
            raise typer.BadParameter("--test and --probe are for --prove")
        if dry_run:
            _say_estimate(students.estimated(prepared), as_json)
            return
        with _watching(out or opened.directory / layout.DISTILLED) as (target, watcher):
            report = students.taught(prepared, target, question, watcher)
        _say(report, as_json)


def _say_estimate(found: dict[str, Any], as_json: bool) -> None:
    """Prints the estimated cost."""
    if as_json:
        typer.echo(json_text(found))
        return
    student, teacher = found["parameters"]
    total, device = found["total_bytes"], found["device"]
    rows = [
        ("method", found["method"]),
        ("public records", f"{found['public_records']:,}"),
        ("student", f"{student:,} parameters, {found['trained']:,} of its adapter are trained"),
        ("teacher", f"{teacher:,} parameters"),
        ("memory", f"about {total / _GIGA:.2f} GB on {device}"),
        ("time", f"about {_duration(found['seconds'])} for {plural(found['steps'], 'step')}"),
    ]
    print_table(
        "", ("quantity", "estimate"), rows, ["rough: the true value is often half or twice this"]
    )
    if found["device_bytes"] is not None and total > 0.9 * found["device_bytes"]:
        ERRORS.print(
            "this may not fit into memory: set distill.quantization=int4, "
            "distill.gradient_checkpointing=true or distill.cached_samples=16",
            style="yellow",
        )


def _duration(seconds: float) -> str:
    """Formats a number of seconds for people.

    >>> _duration(12.3), _duration(7200)
    ('12 s', '2.0 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


@contextmanager
def _watching(target: Path) -> Iterator[tuple[Path, Watcher]]:
    """Progress of the stages; Ctrl-C says how to continue."""
    try:
        with stages() as shown:
            yield target, shown
    except KeyboardInterrupt:
        ERRORS.print(f"interrupted; run the same command again to resume from {target}")
        raise typer.Exit(INTERRUPTED) from None


def _say(report: dict[str, Any], as_json: bool) -> None:
    """Prints the result and the location of the files."""
    if as_json:
        keys = ("directory", "method", "metrics", "general", "privacy", "adapter_sha256", "seconds")
        typer.echo(json_text({key: report[key] for key in keys}))
        return
    console, name = Console(), report["headline"]
    if report["metrics"]:
        figures = [f"{model} {each[name]:.4f}" for model, each in report["metrics"].items()]
        console.print(f"{name}: {', '.join(figures)}", highlight=False)
    if report["proof"] is not None:
        _say_gains(console, report["proof"])
    from fedslm.rendering import spent as shown

    privacy = report["privacy"]
    if privacy["unit"] is not None:
        console.print(
            f"privacy: ε = {shown(privacy['epsilon'])} at δ = {privacy['delta']:g}, the federated "
            f"adapter's; distillation spent nothing",
            highlight=False,
        )
    page = f"report: {report['directory']}/distill.md"
    console.print(page, highlight=False, markup=False, soft_wrap=True)


def _say_gains(console: Console, proof: dict[str, Any]) -> None:
    """Prints gains over the controls, and the conclusion."""
    for control, gain in proof["gains"].items():
        console.print(
            f"gain over {control}: {gain['value']:+.4f} [{gain['low']:+.4f}, {gain['high']:+.4f}]",
            highlight=False,
        )
    said = "a gain over every control" if proof["gain"] else "no gain over every control is shown"
    console.print(f"proof of transfer: {said}", style="green" if proof["gain"] else "yellow")
