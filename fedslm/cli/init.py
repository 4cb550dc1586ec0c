"""``fedslm init``: a first config for one's own data, and its first plan."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer

from fedslm import config as configuration
from fedslm.cli.answers import print_facts
from fedslm.cli.console import ERRORS, TRAIN, clear_errors, complete
from fedslm.cli.data import remarks, seen
from fedslm.cli.questions import NEEDED, answered, check_given, column_of, task_of
from fedslm.config import Config
from fedslm.config.tasks import TASKS
from fedslm.data.database import refuse_password
from fedslm.drafting.draft import Wish, text_of, values_of
from fedslm.errors import DataError, PrivacyError, TrainingError, Unusable, plural
from fedslm.storage import write_text

if TYPE_CHECKING:
    from datasets import Dataset

    from fedslm.drafting.survey import Column

init_app = typer.Typer()
_PRIVATE = (
    "The counts above come from the private records: they stay on this screen. Only names of columns "
    "and the number of clients are written."
)
_TASK = "What is learned; default: a guess, from the columns and the base."
# Config keys, and the options that set them.
_OPTIONS = {
    "data.source": "--data",
    "data.train_split": "--train-split",
    "data.train_query": "--query",
    "data.evaluation_source": "--evaluation",
    "data.evaluation_split": "--evaluation-split",
    "data.evaluation_query": "--evaluation-query",
    "data.text_column": "--text",
    "data.label_column": "--label",
    "data.natural_column": "--client-column",
    "task.name": "--task",
    "model.base": "--base",
    "privacy.unit": "--unit",
    "privacy.unit_column": "--unit",
    "privacy.epsilon": "--epsilon",
    "federation.num_clients": "--clients",
}
_SHOWN_CLASSES = 12


@init_app.command("init", rich_help_panel=TRAIN)
def init(
    path: Annotated[Path, typer.Argument(help="The file to write.", metavar="[FILE]")] = Path(
        "fedslm.toml"
    ),
    data: Annotated[str | None, typer.Option(help=NEEDED["data"])] = None,
    text: Annotated[str | None, typer.Option(help="Column with the input; default: a guess.")] = None,
    label: Annotated[str | None, typer.Option(help="Column with the target; default: a guess.")] = None,
    task: Annotated[str | None, typer.Option(help=_TASK, click_type=click.Choice(list(TASKS)))] = None,
    base: Annotated[str | None, typer.Option(help=NEEDED["base"])] = None,
    epsilon: Annotated[float | None, typer.Option(help=NEEDED["epsilon"])] = None,
    unit: Annotated[str | None, typer.Option(help=NEEDED["unit"])] = None,
    clients: Annotated[
        int | None,
        typer.Option(min=1, help="Simulated clients; default: those in --client-column, else 1."),
    ] = None,
    client_column: Annotated[
        str | None, typer.Option(help="Column that names the client of a record.")
    ] = None,
    evaluation: Annotated[str | None, typer.Option(help=NEEDED["evaluation"])] = None,
    train_split: Annotated[str, typer.Option(help="Private split of --data.")] = "train",
    evaluation_split: Annotated[str, typer.Option(help="Public split.")] = "test",
    query: Annotated[str | None, typer.Option(help=NEEDED["query"])] = None,
    evaluation_query: Annotated[str | None, typer.Option(help=NEEDED["evaluation_query"])] = None,
    timing: Annotated[
        bool, typer.Option(help="Time passes of the base for some seconds, to estimate a run's time.")
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it exists.")] = False,
) -> None:
    """Write a config for your own data, and show its first privacy plan.

    What no option gives is asked for on a terminal, and is an error elsewhere. Nothing is trained, and
    nothing is written except FILE.

    Example: `fedslm init my.toml --data notes.csv --evaluation public.csv --unit patient --epsilon 3`
    """
    given = {key: value for key, value in locals().items() if key not in ("path", "timing", "force")}
    with clear_errors(_OPTIONS):
        _check_target(path, force=force)
        check_given(given)
        wish, private = _described(given)
        config, content = _drafted(wish, private, path)
        plan = _plan(config, len(private) if timing else None)
        write_text(path, content)
        print_facts(plan, [])
        _say_next(path)


def _check_target(path: Path, *, force: bool) -> None:
    """Refuses a file that exists or cannot be written, before anything is asked.

    Raises:
        Unusable: The file exists, or is in a directory that cannot be written.
    """
    if path.is_dir():
        raise Unusable(f"FILE={str(path)!r} is a directory; give the name of a file in it")
    if path.exists() and not force:
        raise Unusable(f"FILE={str(path)!r} exists; choose another name, or replace it with --force")
    above = next(each for each in path.absolute().parents if each.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise Unusable(f"FILE={str(path)!r} cannot be written: {above} is not a writable directory")


def _described(given: dict[str, Any]) -> tuple[Wish, Dataset]:
    """Reads the private records, and finds the columns and the number of clients.

    Raises:
        DataError: The data cannot be read, or has no such column.
    """
    from fedslm.data.sources import load
    from fedslm.drafting.survey import columns_of

    values = answered(given, ("data", "query"))
    source = values["data"]
    refuse_password(source)
    private = load(source, values["train_split"], values["query"])
    columns = columns_of(private)
    ERRORS.print(f"{source}: {plural(len(private), 'record')}")
    for column in columns:
        ERRORS.print(f"  {column.name}: {column.text}")
    values = answered(values)
    task = task_of(values, columns)
    wish = Wish(**{**values, "task": task, "clients": values["clients"] or 1})
    options = {
        "--text": wish.text,
        "--label": wish.label,
        "--unit": wish.unit_column,
        "--client-column": wish.client_column,
    }
    _check_columns(options, columns)
    if any(column.name == wish.unit for column in columns) and wish.unit_column is None:
        raise DataError(
            f"--unit={wish.unit} is a column of the data too: rename the column, and give its new name "
            f"if it names the person"
        )
    wish = _with_columns(wish, columns)
    return _with_clients(wish, private, given["clients"]), private


def _check_columns(options: dict[str, str | None], columns: Sequence[Column]) -> None:
    """Refuses columns that the data does not have.

    Raises:
        DataError: Names the option and the columns.
    """
    there = [column.name for column in columns]
    for option, name in options.items():
        if name is not None and name not in there:
            extra = ', or "record" or "none"' if option == "--unit" else ""
            raise DataError(
                f"{option}={name!r} is not a column of the data; it has {', '.join(there)}{extra}"
            )


def _with_columns(wish: Wish, columns: Sequence[Column]) -> Wish:
    """Fills in the columns that were not named: by a known layout, or by a guess, which is said.

    Raises:
        DataError: No column looks like the one that is needed.
    """
    from fedslm.drafting.survey import layout_of, targets_in, texts_in

    if wish.text is None and wish.label is None and (found := layout_of(wish.task, columns)):
        ERRORS.print(f"columns: {', '.join(found)}, a layout that the task knows")
        return wish
    taken = [wish.unit_column, wish.client_column]
    text = wish.text or column_of("text", texts_in(wish.task, columns, [*taken, wish.label]), columns)
    label, kind = wish.label, TASKS[wish.task].label
    if kind == "turns" and _has_turns(text, columns):
        kind = "none"
    if label is None and kind != "none":
        label = column_of("label", targets_in(wish.task, columns, [*taken, text]), columns)
    return replace(wish, text=text, label=label)


def _has_turns(name: str, columns: Sequence[Column]) -> bool:
    """Whether a column holds conversations, which have their answers in them."""
    return any(each.kind == "turns" for each in columns if each.name == name)


def _with_clients(wish: Wish, private: Dataset, clients: int | None) -> Wish:
    """Counts the clients in their column, unless their number was given.

    Raises:
        DataError: There are fewer units than clients, or a unit would be at several clients.
    """
    from fedslm.drafting.survey import people_in

    if wish.client_column is not None and wish.client_column == wish.unit_column:
        raise DataError(
            f"--client-column={wish.client_column} is the column of --unit too: each person would be a "
            f"client, and the file would hold their number; use --clients N"
        )
    if wish.client_column is not None:
        there = people_in(private, wish.client_column, "--client-column")
        clients = there if clients is None else clients
        if clients > there:
            raise DataError(
                f"--clients={clients} must be at most {there}, the values of --client-column"
            )
    wish = replace(wish, clients=clients or 1)
    units = len(private)
    if wish.unit_column is not None:
        units = people_in(private, wish.unit_column, "--unit")
        what = f"different values of {wish.unit_column}"
        ERRORS.print(f"people: {units} {what}, {len(private) / max(1, units):.1f} records each")
        if wish.client_column is None and wish.clients > 1 and units < len(private):
            raise DataError(
                f"--clients={wish.clients} would divide the records of one {wish.unit_column} among "
                f"several clients: name their client with --client-column, or use --clients 1"
            )
    if units < wish.clients:
        raise DataError(f"--clients={wish.clients} must be at most {units}, one unit for each client")
    return wish


def _drafted(wish: Wish, private: Dataset, path: Path) -> tuple[Config, str]:
    """Makes the config and its text, and checks both as `fedslm config check --data` does.

    Raises:
        FedslmError: The config cannot be used with this data and this base.
    """
    from fedslm.cli.model import trained_parameters
    from fedslm.data.federated import load_what_is_public
    from fedslm.drafting.survey import classes_in, lengths_of
    from fedslm.models.base import check_early, resolve_config
    from fedslm.simulation import with_layout

    first = configuration.from_mapping(values_of(wish, path.stem))
    resolve_config(first.model)
    check_early(first.model, first.lora, private=wish.unit != "none")
    laid = with_layout(first)
    trained_parameters(laid.resolved())  # refuses a base that cannot do the task
    classes = classes_in(private, laid.data, laid.task)
    if classes:
        shown = ", ".join(f"{name} {count}" for name, count in classes.most_common(_SHOWN_CLASSES))
        more = ", …" if len(classes) > _SHOWN_CLASSES else ""
        ERRORS.print(f"classes: {len(classes)} ({shown}{more})")
    public = load_what_is_public(laid.data, laid.task, laid.run.seed)
    lengths = lengths_of(public.evaluation, laid.data, laid.task, laid.model)
    ERRORS.print(f"lengths of public records: {lengths.text}")
    values = values_of(wish, path.stem, lengths.max_length)
    config = with_layout(configuration.from_mapping(values))
    for line in remarks(seen(config), config):
        ERRORS.print(line)
    ERRORS.print(_PRIVATE)
    return config, text_of(values, path)


def _plan(config: Config, records: int | None) -> list[tuple[str, str]]:
    """The first plan of a config: what is promised, whether it leaves something to learn, and the time.

    Args:
        config: The config.
        records: Number of private records; None: the time is not estimated.

    Raises:
        PrivacyError: No plan keeps this epsilon.
    """
    from fedslm.privacy.calibration import noise_of
    from fedslm.rendering import spent

    try:
        made = complete(config).config
        privacy, rounds = made.privacy, made.federation.rounds
        noise = noise_of(privacy, made.training, rounds)
    except PrivacyError as error:
        raise PrivacyError(
            f"{error}. What could help: more units at each client, a larger privacy.delta, or fewer "
            f"steps (federation.rounds · training.local_steps)"
        ) from None
    if privacy.unit == "none" or privacy.epsilon is None:
        none = "none: anybody who gets the adapter may learn about single records"
        return [("privacy", none), *_time(made, records)]
    unit = "record" if privacy.unit_column is None else f"value of {privacy.unit_column}"
    budget = f"ε = {spent(privacy.epsilon)} at δ = {privacy.delta:g} for one {unit}"
    steps = rounds * made.training.local_steps
    lines = [
        ("privacy", f"{budget}, at each client"),
        ("clients", str(made.federation.num_clients)),
        ("noise", f"noise multiplier {noise:g} in each of {plural(steps, 'step')}"),
    ]
    return [*lines, *_outlook(made), *_time(made, records)]


def _time(config: Config, records: int | None) -> list[tuple[str, str]]:
    """The line about the time of a run."""
    from fedslm.cli.plan import estimate

    if records is None:
        return [("time", "not estimated (--no-timing)")]
    ERRORS.print("timing passes of the base; --no-timing leaves this out …")
    try:
        return [("time", estimate(config, records))]
    except TrainingError as error:
        return [("time", f"unknown: {error}")]


def _outlook(config: Config) -> list[tuple[str, str]]:
    """Whether the run can learn; the size of a hub's base is read from its config.json."""
    from fedslm.cli.model import trained_parameters
    from fedslm.recipes import expected

    found = expected(config, trained_parameters(config.resolved()))
    if found is None:
        return []
    if not found.learns:
        ERRORS.print(found.text, style="red")
        return []
    return [("signal", found.text)]


def _say_next(path: Path) -> None:
    """Says what was written, and what to run."""
    file = shlex.quote(str(path))
    typer.echo(f"wrote {path}; next:")
    typer.echo(f"  fedslm config show {file}         # every value")
    typer.echo(f"  fedslm simulate {file} --plan     # workers, memory and time")
    typer.echo(f"  fedslm simulate {file}")
