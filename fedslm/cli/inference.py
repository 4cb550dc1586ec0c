"""``fedslm predict``, ``generate``, ``evaluate`` and ``export``: use a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fedslm.cli.answers import (
    Rows,
    counted,
    print_answers,
    print_table,
    progress,
    say_where,
    write_answers,
)
from fedslm.cli.console import ERRORS, USE, Json, clear_errors
from fedslm.storage import json_text

if TYPE_CHECKING:
    from fedslm.inference.generation import Prompt
    from fedslm.inference.trained import Trained

inference_app = typer.Typer()

Run = Annotated[Path, typer.Argument(help="A finished run's directory.", metavar="RUN")]
Base = Annotated[str | None, typer.Option(help="The base model, if it was moved since training.")]
Device = Annotated[
    Literal["auto", "cpu", "cuda", "mps"] | None,
    typer.Option(help="Device; default: as in training."),
]


@inference_app.command(rich_help_panel=USE)
def predict(
    run: Run,
    text: Annotated[list[str], typer.Option(help="A text; may be repeated.")] = [],  # noqa: B006
    file: Annotated[
        Path | None, typer.Option(help="Texts: .txt (one a line), .jsonl, .csv, .tsv, .parquet, ….")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the answers here: .jsonl or .csv.")] = None,
    base: Base = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Predict classes, entities or next words with a trained model.

    There is one answer for each text, in the same order.

    Example: `fedslm predict runs/demo/epsilon-8 --text "slurred speech and facial droop"`

    Example: `fedslm predict runs/ner --file notes.jsonl --out entities.jsonl`
    """
    with clear_errors():
        from fedslm.inference.inputs import read_inputs
        from fedslm.inference.prediction import check_task
        from fedslm.inference.prediction import predict as answers_to
        from fedslm.inference.trained import load_trained, open_run

        _one_of(text, file, "--text")
        _check_out(out)
        opened = open_run(run, base=base, device=device)
        check_task(opened)
        column = opened.data.text_column
        rows = [{column: each} for each in text] if file is None else read_inputs(file, [column])
        answers = answers_to(load_trained(opened), rows)
        with progress("texts") as show:
            shown = counted(answers, len(rows), show)
            if out is not None:
                write_answers(out, shown)
            elif as_json:
                for answer in shown:
                    typer.echo(json_text(answer))
            else:
                answered = list(shown)
        if out is not None:
            say_where(out, len(rows), as_json)
        elif not as_json:
            print_answers(answered)


@inference_app.command(rich_help_panel=USE)
def generate(
    run: Run,
    prompt: Annotated[list[str], typer.Option(help="A prompt; may be repeated.")] = [],  # noqa: B006
    file: Annotated[
        Path | None, typer.Option(help="Prompts: .txt (one a line), .jsonl, .csv, …, with columns.")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Most new tokens; default: the targets' limit in training, or 64."),
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="0: greedy decoding; 1: sample from the model's distribution.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="The same seed samples the same texts.")] = 0,
    samples: Annotated[
        int, typer.Option(help="Texts for each prompt; more than 1 needs a temperature.")
    ] = 1,
    out: Annotated[Path | None, typer.Option(help="Write the texts here: .jsonl or .csv.")] = None,
    base: Base = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Generate text with a trained model: continue a text, answer an instruction, summarise.

    Prompts are formatted as in training: the same template and chat format.

    Example: `fedslm generate runs/shakespeare --prompt "My lord," --temperature 0.8 --samples 3`
    """
    with clear_errors():
        from fedslm.inference import generation
        from fedslm.inference.trained import load_trained, open_run

        _one_of(prompt, file, "--prompt")
        _check_out(out)
        opened = open_run(run, base=base, device=device)
        generation.check_task(opened)
        rows = _prompt_rows(generation.prompt_columns(opened), prompt, file)
        trained = load_trained(opened)
        most = generation.default_max_tokens(trained) if max_tokens is None else max_tokens
        sampling = generation.Sampling(most, temperature, samples, seed)
        prompts = generation.prompts_of(trained, rows, most)
        if out is None and not as_json:
            _write_aloud(trained, prompts, sampling)
            return
        with progress("prompts") as show:
            written = counted(generation.write(trained, prompts, sampling), len(prompts), show)
            answers = (_written(*pair) for pair in zip(prompts, written, strict=True))
            if out is not None:
                write_answers(out, answers)
            else:
                for answer in answers:
                    typer.echo(json_text(answer))
        if out is not None:
            say_where(out, len(prompts), as_json)


@inference_app.command(rich_help_panel=USE)
def evaluate(
    run: Run,
    data: Annotated[
        str | None,
        typer.Option(help="Path, hub name or database URL; default: the run's own split."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of --data; default: the run's.")] = None,
    query: Annotated[str | None, typer.Option(help="SQL, if --data is a database's URL.")] = None,
    texts: Annotated[
        bool,
        typer.Option("--generate", help="Generate texts too, and score them by ROUGE and exact match."),
    ] = False,
    max_generated: Annotated[int, typer.Option(min=1, help="Records to generate texts for.")] = 100,
    max_records: Annotated[
        int | None, typer.Option(min=1, help="Evaluate on a sample of this size of --data.")
    ] = None,
    resamples: Annotated[int, typer.Option(help="Bootstrap resamples, at least 1000.")] = 2000,
    out: Annotated[Path | None, typer.Option(help="Write the table here too, as Markdown.")] = None,
    base: Base = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Compare a trained model with its base on all metrics, with 95 % bootstrap intervals.

    Figures on private data have no ε guarantee: keep them where the data is.

    Example: `fedslm evaluate runs/demo/epsilon-8`

    Example: `fedslm evaluate runs/medquad --generate --max-generated 50 --out medquad.md`
    """
    with clear_errors():
        from fedslm.inference import evaluation, tables
        from fedslm.inference.trained import load_trained, open_run
        from fedslm.storage import write_text

        if data is None and (split, query, max_records) != (None, None, None):
            raise typer.BadParameter("--split, --query and --max-records are for --data")
        opened = open_run(run, base=base, device=device)
        if data is None:
            rows = evaluation.own_rows(opened)
        else:
            elsewhere = evaluation.Elsewhere(data, split, query, max_records)
            rows = evaluation.other_rows(opened, elsewhere)
        trained = load_trained(opened)
        asked = evaluation.EvaluationOptions(resamples, max_generated if texts else 0)
        with progress("records, base and tuned") as show:
            found = evaluation.evaluate(trained, rows, show, asked)
        notes = tables.notes_of(trained, found, resamples)
        title = f"{opened.report['name']} on {data or 'its public evaluation split'}"
        if out is not None:
            write_text(out, tables.markdown_of(title, found, notes))
        if as_json:
            values = {"run": str(opened.directory), "data": data, "split": split, "notes": notes}
            typer.echo(json_text({**values, "resamples": resamples, **tables.json_of(found)}))
        else:
            print_table(title, tables.COLUMNS, tables.rows_of(found), notes)


@inference_app.command(rich_help_panel=USE)
def export(
    run: Run,
    out: Annotated[Path, typer.Option(help="A new directory.", metavar="DIR")],
    merge: Annotated[
        bool,
        typer.Option("--merge", help="Merge the adapter into the base's weights; otherwise copy it."),
    ] = False,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        typer.Option(help="Precision of merged weights; default: float32."),
    ] = None,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Export a model from a run: a plain transformers directory, or only the PEFT adapter.

    The model card is included, with its privacy statement.

    Example: `fedslm export runs/mine --merge --out models/mine --dtype bfloat16`
    """
    with clear_errors():
        from fedslm.inference.export import export_adapter, export_merged
        from fedslm.inference.trained import open_run

        if dtype is not None and not merge:
            raise typer.BadParameter("--dtype is for --merge; an adapter is float32")
        opened = open_run(run, base=base)
        if merge:
            export_merged(opened, out, dtype or "float32")
        else:
            export_adapter(opened, out)
        if as_json:
            typer.echo(json_text({"out": str(out), "merged": merge, "dtype": dtype or "float32"}))
        else:
            typer.echo(str(out))


def _one_of(texts: list[str], file: Path | None, name: str) -> None:
    """Refuses anything but exactly one source of texts."""
    if bool(texts) == (file is not None):
        raise typer.BadParameter(f"give either {name} (may be repeated) or --file")


def _check_out(out: Path | None) -> None:
    """Refuses an unsupported output format before the work begins."""
    if out is not None and out.suffix not in (".jsonl", ".csv"):
        raise typer.BadParameter(f"--out={str(out)!r} must end with .jsonl or .csv")


def _prompt_rows(columns: list[str], prompts: list[str], file: Path | None) -> Rows:
    """Returns the rows that prompts are built from."""
    from fedslm.inference.inputs import read_inputs

    if file is not None:
        return read_inputs(file, columns)
    if len(columns) > 1:
        raise typer.BadParameter(
            f"this run's prompt is made of {', '.join(columns)}; give a --file with these columns"
        )
    return [{columns[0]: each} for each in prompts]


def _written(prompt: Prompt, texts: list[str]) -> dict[str, Any]:
    """Returns a prompt and its generated texts as plain values."""
    cut = {"truncated": True} if prompt.cut else {}
    return {"prompt": prompt.text, "texts": texts, **cut}


def _write_aloud(trained: Trained, prompts: list[Prompt], sampling: Any) -> None:
    """Prints texts while they are generated (one sample), or when they are complete."""
    from fedslm.config.tasks import TASKS
    from fedslm.inference.generation import write

    goes_on = not TASKS[trained.run.task.name].has_prompt
    aloud = sampling.samples == 1
    written = write(trained, prompts, sampling, _echo if aloud else None)
    for number, prompt in enumerate(prompts, 1):
        if prompt.cut:
            ERRORS.print(f"prompt {number} is too long; its middle was cut", style="yellow")
        begun = prompt.text if goes_on else ""
        if aloud:
            _echo(begun)
            next(written)
            typer.echo()
        else:
            for text in next(written):
                typer.echo(f"{begun}{text}\n---")


def _echo(text: str) -> None:
    """Prints text immediately."""
    typer.echo(text, nl=False)
