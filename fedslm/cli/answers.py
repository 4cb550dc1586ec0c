"""Shared code of commands that use a model: a progress bar, answer files, tables."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fedslm.cli.console import ERRORS
from fedslm.errors import plural
from fedslm.storage import json_text

Rows = list[dict[str, Any]]
_SHOWN_CHARACTERS = 60


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, where that is a terminal."""
    columns = (TextColumn(what), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=ERRORS, transient=True, disable=not ERRORS.is_terminal) as bar:
        task = bar.add_task(what, total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield show


@contextmanager
def stages() -> Iterator[Stages]:
    """Bars for the stages of a command on a terminal; elsewhere a line for each tenth."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=ERRORS, transient=True, disable=not ERRORS.is_terminal) as bar:
        yield Stages(bar)


class Stages:
    """Shows one progress bar per stage."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._tasks: dict[str, Any] = {}
        self._tenths: dict[str, int] = {}

    def on_progress(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Advances a stage's bar."""
        if ERRORS.is_terminal:
            if stage not in self._tasks:
                self._tasks[stage] = self._bar.add_task(stage, total=total, note="")
            self._bar.update(self._tasks[stage], completed=done, total=total, note=note)
            return
        tenth = 10 * done // max(total, 1)
        if tenth > self._tenths.get(stage, 0):
            self._tenths[stage] = tenth
            ERRORS.print(f"{stage}: {done}/{total} {note}")


def counted(answers: Iterable[Any], total: int, show: Callable[[int, int], None]) -> Iterator[Any]:
    """Yields answers and advances the bar."""
    for done, answer in enumerate(answers, 1):
        show(done, total)
        yield answer


def write_answers(out: Path, answers: Iterable[dict[str, Any]]) -> None:
    """Writes one answer per line; the file appears when all are complete."""
    from fedslm.storage import replacing

    with replacing(out) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        if out.suffix == ".jsonl":
            for answer in answers:
                file.write(json_text(answer, ensure_ascii=False) + "\n")
            return
        rows = [{key: _cell(value) for key, value in answer.items()} for answer in answers]
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def _cell(value: object) -> object:
    """Formats a value for a cell: lists and dictionaries as JSON."""
    return json_text(value, ensure_ascii=False) if isinstance(value, list | dict) else value


def say_where(out: Path, count: int, as_json: bool) -> None:
    """Prints the location of the answers."""
    typer.echo(
        json_text({"out": str(out), "rows": count}) if as_json else f"{out}: {plural(count, 'row')}"
    )


def print_answers(answers: Rows) -> None:
    """Prints answers for people."""
    rows = [
        (_short(str(each.get("text", " ".join(each.get("words", []))))), _said(each))
        for each in answers
    ]
    print_table("", ("text", "answer"), rows, [])
    cut = sum("truncated" in answer for answer in answers)
    if cut:
        ERRORS.print(f"{plural(cut, 'text')} truncated: the model did not see the end", style="yellow")


def _said(answer: dict[str, Any]) -> str:
    """Formats the answer for one text."""
    if "note" in answer:
        return str(answer["note"])
    if "entities" in answer:
        return (
            "\n".join(f"{e['kind']}: {e['text']} ({e['score']:.2f})" for e in answer["entities"]) or "–"
        )
    if "next_words" in answer:
        return ", ".join(f"{e['word']} ({e['probability']:.2f})" for e in answer["next_words"])
    shares = ", ".join(f"{name} {value:.2f}" for name, value in answer["probabilities"].items())
    said = ", ".join(answer["labels"]) if "labels" in answer else str(answer["label"])
    return f"{said or '–'} ({shares})"


def _short(text: str) -> str:
    """Shortens a text to its beginning."""
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 1]}…"


def print_table(
    title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]], notes: list[str]
) -> None:
    """Prints a table with notes below it; texts are printed unchanged."""
    console, table = Console(), Table(title=Text(title) if title else None)
    for at, column in enumerate(columns):
        table.add_column(column, no_wrap=at == 0)
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
    for note in notes:
        console.print(f"{note}.", highlight=False, markup=False)


def print_facts(lines: Iterable[tuple[str, str]], warnings: Iterable[str]) -> None:
    """Prints names with their texts, and then the warnings, each once."""
    console = Console()
    table = Table(show_header=False, box=None)
    for name, text in lines:
        table.add_row(name, Text(text))
    console.print(table, highlight=False)
    for warning in dict.fromkeys(warnings):
        console.print(f"warning: {warning}", style="yellow", highlight=False, markup=False)
