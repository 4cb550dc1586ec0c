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
from fedslm.errors import plural
from fedslm.storage import json_text

if TYPE_CHECKING:
    from fedslm.distillation.pipeline import Watcher
    from fedslm.distillation.proof import ProofRequest
    from fedslm.distillation.run import PreparedJob

distill_app = typer.Typer()

_GIGA = 1e9


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
    with clear_errors():
        from fedslm.distillation.run import distill, prepare
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
        settings = _settings(opened.distill, given, overrides)
        prepared = prepare(opened, settings, drop_overlap=drop_overlap)
        if dry_run:
            _estimated(prepared, as_json)
            return
        target = out or opened.directory / layout.DISTILLED
        question = None
        if prove:
            places = [(test, test_split), (probe, probe_split)]
            question = _question(prepared, places, seeds, resamples, ceiling=ceiling)
        elif test or probe:
            raise typer.BadParameter("--test and --probe are for --prove")
        with _watching(target) as watcher:
            report = distill(prepared, target, watcher, question)
        _say(report, as_json)


def _question(
    prepared: PreparedJob,
    places: list[tuple[str | None, str]],
    seeds: int,
    resamples: int,
    *,
    ceiling: bool,
) -> ProofRequest:
    """Builds the proof request: on the run's own test records unless others are given."""
    from fedslm.distillation.proof import GROUP, ProofRequest
    from fedslm.inference.evaluation import Elsewhere, other_rows

    (test, test_split), (probe, probe_split) = places
    run, tests, probed = prepared.job.run, prepared.tests, []
    if test is not None:
        tests = other_rows(run, Elsewhere(test, test_split))
    if probe is not None:
        probed = other_rows(run, Elsewhere(probe, probe_split, optional=frozenset({GROUP})))
    return ProofRequest(tests, probed, prepared.general, seeds, resamples, ceiling)


def _settings(section: Any, given: dict[str, Any], overrides: list[str]) -> Any:
    """Returns the run's own ``[distill]`` section with the command-line options applied."""
    from fedslm.config import DistillConfig, section_from, with_overrides

    values = section.model_dump(mode="json")
    values |= {key: value for key, value in given.items() if value is not None}
    strangers = [each for each in overrides if not each.startswith("distill.")]
    if strangers:
        raise typer.BadParameter(f"--set {strangers[0]}: only distill.… can be set here")
    return section_from(
        DistillConfig, "distill", with_overrides({"distill": values}, overrides)["distill"]
    )


def _estimated(prepared: PreparedJob, as_json: bool) -> None:
    """Prints the estimated cost."""
    from fedslm.distillation.estimate import estimate

    found, job = estimate(prepared.job), prepared.job
    total = found.total_bytes(two_passes=bool(job.settings.cached_samples))
    if as_json:
        values = {**vars(found), "total_bytes": total, "method": job.settings.method}
        typer.echo(json_text(values))
        return
    student, teacher = found.parameters
    rows = [
        ("method", job.settings.method),
        ("public records", f"{len(job.rows):,}"),
        ("student", f"{student:,} parameters, {found.trained:,} of its adapter are trained"),
        ("teacher", f"{teacher:,} parameters"),
        ("memory", f"about {total / _GIGA:.2f} GB on {found.device}"),
        ("time", f"about {_duration(found.seconds)} for {plural(job.settings.steps, 'step')}"),
    ]
    print_table(
        "", ("quantity", "estimate"), rows, ["rough: the true value is often half or twice this"]
    )
    if found.device_bytes is not None and total > 0.9 * found.device_bytes:
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
def _watching(target: Path) -> Iterator[Watcher]:
    """Progress of the stages; Ctrl-C says how to continue."""
    try:
        with stages() as shown:
            yield shown
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
