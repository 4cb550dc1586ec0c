"""Private fine-tuning on one data set, without a federation: a run with one client."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedslm import layout, simulation
from fedslm.api.given import InMemory, check_public, given_folder, started
from fedslm.api.result import RunResult, result_of
from fedslm.api.runs import checked_observers
from fedslm.config import Config, TaskName, from_mapping, with_overrides
from fedslm.config.commented import commented_toml
from fedslm.config.tasks import TASKS
from fedslm.data import given
from fedslm.data.columns import Wanted, needed, needed_to_share
from fedslm.data.layouts import laid_out
from fedslm.data.sources import EMBEDDED, columns_in, load
from fedslm.data.split import split_in_two
from fedslm.errors import ConfigError, Problem
from fedslm.federation.observers import Observer
from fedslm.models.given import GivenBase
from fedslm.storage import expand, json_text, write_text

# Keys that an argument of `train` sets; and the only ones of [federation] that one client has.
ARGUMENTS = {
    "model.base": "base",
    "data.source": "train",
    "data.evaluation_source": "evaluation",
    "data.text_column": "text",
    "data.label_column": "label",
    "task.name": "task",
    "privacy.unit": "unit",
    "privacy.unit_column": "unit",
    "privacy.epsilon": "epsilon",
    "privacy.delta": "delta",
    "run.directory": "directory",
}
_ROUNDS = ("rounds", "evaluate_every", "max_failed_rounds", "round_deadline_seconds")
_OF_CLIENTS = (
    "data.partition",
    "data.natural_column",
    "data.shards_per_client",
    "data.dirichlet_alpha",
    "engine.nodes",
)
_SECTIONS_OF_CLIENTS = ("attack", "personalization")


@dataclass(frozen=True)
class Wish:
    """What a caller of :func:`train` asks for; attributes as its arguments."""

    train: Any
    base: str | Path | tuple[Any, Any]
    epsilon: float
    text: str = "text"
    label: str | None = "label"
    task: TaskName = "classification"
    unit: str = "record"
    delta: float | None = None
    evaluation: Any = None
    holdout: float | None = None
    directory: Path | str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)


def train(
    train: Any,
    *,
    base: str | Path | tuple[Any, Any],
    epsilon: float,
    text: str = "text",
    label: str | None = "label",
    task: TaskName = "classification",
    unit: str = "record",
    delta: float | None = None,
    evaluation: Any = None,
    holdout: float | None = None,
    directory: Path | str | None = None,
    overrides: Mapping[str, Any] | None = None,
    observers: Sequence[Observer] = (),
) -> RunResult:
    """Fine-tunes a model on one private data set, with differential privacy and without a federation.

    It is a run with one client: the same training, ledger, report, model card and audit as in
    :func:`fedslm.simulate`. A recipe sets what is not given here (docs/recipes.md).

    Formal guarantees:
        * Epsilon covers the training records: one record, or all records of one person with ``unit``.
        * It does not cover evaluation records. They are treated as public: the report has metrics on
          them, and class names come from them. Records of ``holdout`` are such records.

    Args:
        train: Private records: the path of a file, a directory, a hub name or "demo"; or in memory, a
            ``datasets.Dataset``, a list of dicts or a pandas frame.
        base: The base model: a hub name, a directory, "demo", or a pair of a transformers model and its
            tokenizer, as ``model`` of :func:`fedslm.simulate`.
        epsilon: The privacy budget. Smaller is more private; there is no default.
        text: Column with the input.
        label: Column with the target; None for a task without one.
        task: What is learned; one of the seven tasks of docs/configuration.md.
        unit: "record", or the column that names the person of each record: then epsilon covers all
            records of a person.
        delta: Failure probability; None: the recipe's, well below 1 / number of units.
        evaluation: Public records to evaluate on: in memory, or a source as for ``train``. May be left
            out if ``train`` is a source with a split "test".
        holdout: Instead: share of ``train``, in (0, 1), that is set aside and **treated as public**.
            With a person as the unit, no person is on both sides. Only for records that may be public.
        directory: A new run directory; None: ``runs/NAME``.
        overrides: Further config keys, such as ``{"task.max_length": 128}``.
        observers: As for :func:`fedslm.simulate`.

    Raises:
        FedslmError: An argument, the data, the model or the run directory cannot be used.

    >>> import fedslm, tempfile
    >>> place = tempfile.TemporaryDirectory()
    >>> small = {"federation.rounds": 1, "data.max_evaluation_records": 50, "engine.workers": 0}
    >>> result = fedslm.train(
    ...     "demo", base="demo", epsilon=3, directory=f"{place.name}/run", overrides=small
    ... )
    >>> 0 < result.epsilon <= 3, (result.directory / "train.toml").exists()
    (True, True)
    """
    told = checked_observers(observers)
    more = {} if overrides is None else overrides
    if not isinstance(more, Mapping):
        raise _wrong("overrides", f"value of type {type(more).__name__}: should be a mapping")
    wish = Wish(
        train=train,
        base=base,
        epsilon=epsilon,
        text=text,
        label=label,
        task=task,
        unit=unit,
        delta=delta,
        evaluation=evaluation,
        holdout=holdout,
        directory=directory,
        overrides=more,
    )
    with prepared(wish) as config:
        return result_of(simulation.simulate(config, told))


@contextmanager
def prepared(wish: Wish) -> Iterator[Config]:
    """Writes what a run needs into its directory, and yields its config.

    If the block fails before the run has begun, the directory is removed.

    Raises:
        FedslmError: As :func:`train`.
    """
    _check(wish)
    data = InMemory.of(_in_memory(wish.train), _in_memory(wish.evaluation))
    base = GivenBase.of(wish.base, "base")
    if base is None:
        raise _wrong("base", "is required: a hub name, a directory, or a loaded pair")
    chosen = with_overrides(_sections(wish), wish.overrides)
    own = with_overrides(chosen, base.changes(Path(layout.GIVEN_BASE)))
    draft = from_mapping(_with_source(own, wish, data, Path(layout.GIVEN)))
    if data.train or wish.holdout is not None:
        check_public(own, draft)
    with started(simulation.run_path(draft)) as directory:
        folder = directory / layout.GIVEN
        own = with_overrides(chosen, base.changes(directory / layout.GIVEN_BASE))
        sections = _with_source(own, wish, data, folder)
        config = from_mapping(sections)
        _check_unit(wish, _columns(config, own["data"], data))
        if data.train or data.evaluation or wish.holdout is not None:
            given_folder(directory)
        if wish.holdout is None:
            data.write(config, folder)
        else:
            _split(config, own, data, wish)
            write_text(directory / layout.HOLDOUT, json_text(wish.holdout))
        if base.is_loaded:
            base.write(directory / layout.GIVEN_BASE)
        header = _header(wish, directory)
        write_text(directory / layout.TRAIN_TOML, commented_toml(_portable(sections), header))
        yield config


def _check(wish: Wish) -> None:
    """Refuses arguments that contradict each other.

    Raises:
        ConfigError: All problems.
    """
    problems = []
    if wish.epsilon is None:  # from Python, without a type checker
        problems.append(Problem("epsilon", "is required: choose the budget; 1 to 8 is common"))
    if not isinstance(wish.unit, str) or wish.unit in ("none", ""):
        message = (
            f'value {wish.unit!r}: give "record", or the column that names the person of each record; '
            f'to train without privacy, use simulate with unit = "none" in [privacy]'
        )
        problems.append(Problem("unit", message))
    if wish.holdout is not None and wish.evaluation is not None:
        problems.append(Problem("holdout", "is set together with evaluation; give one of them"))
    is_share = isinstance(wish.holdout, float) and 0 < wish.holdout < 1
    if wish.holdout is not None and not is_share:
        problems.append(Problem("holdout", f"value {wish.holdout!r} must be in (0, 1), such as 0.1"))
    if not isinstance(wish.task, str):
        problems.append(Problem("task", f"value {wish.task!r}: should be one of {', '.join(TASKS)}"))
    if isinstance(wish.train, Mapping):
        problems.append(Problem("train", "is a mapping; for several clients use fedslm.simulate"))
    if wish.evaluation is None and wish.holdout is None and not _has_splits(wish.train):
        message = (
            "is missing: give public records to evaluate on; or set holdout=0.1, if that share of "
            "the records may be treated as public"
        )
        problems.append(Problem("evaluation", message))
    problems += _misplaced(wish.overrides)
    if problems:
        raise ConfigError(problems)


def _misplaced(overrides: Mapping[str, Any]) -> Iterator[Problem]:
    """Yields a problem for each key that an argument sets, or that only several clients need."""
    for key in (str(each).strip() for each in overrides):
        section, _, name = key.partition(".")
        if key in ARGUMENTS:
            yield Problem(key, f"is set by the argument {ARGUMENTS[key]}")
        elif key in _OF_CLIENTS or section in _SECTIONS_OF_CLIENTS:
            yield Problem(key, "is for several clients; use simulate")
        elif section == "federation" and name not in _ROUNDS:
            message = f"is for several clients; use simulate; here may be {', '.join(_ROUNDS)}"
            yield Problem(key, message)


def _sections(wish: Wish) -> dict[str, dict[str, Any]]:
    """Returns what the arguments say, as sections of a config; None where they say nothing."""
    privacy: dict[str, Any] = {"unit": "record"}
    if wish.unit != "record":
        privacy = {"unit": "user", "unit_column": wish.unit}
    directory = None if wish.directory is None else str(Path(wish.directory).expanduser().absolute())
    has_label = wish.label is not None and (wish.task not in TASKS or TASKS[wish.task].label != "none")
    data = {
        "source": _source(wish.train),
        "evaluation_source": _source(wish.evaluation),
        "text_column": wish.text,
        "label_column": wish.label if has_label else "",
    }
    return {
        "run": {"name": _name(wish), **({"directory": directory} if directory else {})},
        "model": {},  # by GivenBase.changes
        "data": {key: value for key, value in data.items() if value is not None},
        "task": {"name": wish.task},
        "privacy": {
            **privacy,
            "epsilon": wish.epsilon,
            **({} if wish.delta is None else {"delta": wish.delta}),
        },
        "federation": {"num_clients": 1},
    }


def _with_source(
    sections: Mapping[str, Any], wish: Wish, data: InMemory, folder: Path
) -> dict[str, Any]:
    """Returns the sections with the place of the records that are written below the run directory."""
    if wish.holdout is None:
        return with_overrides(sections, data.changes(sections, folder))
    split = {"data.source": str(folder), "data.train_split": "train", "data.evaluation_split": "test"}
    return with_overrides(sections, {**split, "data.train_query": None})


def _split(config: Config, sections: Mapping[str, Any], data: InMemory, wish: Wish) -> None:
    """Writes both sides of ``holdout`` into the directory that the config reads.

    Raises:
        ConfigError: A column is missing.
        DataError: The records cannot be read, or there are too few units.
    """
    folder, seed, own = Path(config.data.source), config.run.seed, sections["data"]
    split = own.get("train_split", "train")
    found, task = laid_out(config.data, config.task, seed, _columns(config, own, data))
    columns = {**needed(found, task), **needed_to_share(found, config.privacy)}
    if problems := given.missing(data.train, columns):
        raise ConfigError(problems)
    wanted = Wanted(columns)
    if data.train:
        records = given.read(data.train, folder, wanted)
    else:
        query_text = own.get("train_query")
        records = load(own["source"], split, query_text, seed=seed, scratch=folder, wanted=wanted)
    unit = config.privacy.unit_column
    split_in_two(records, folder, unit=unit, fraction=wish.holdout or 0.0, seed=seed)
    for path in folder.glob("*.parquet"):
        path.chmod(0o600)


def _columns(config: Config, own: Mapping[str, Any], data: InMemory) -> Sequence[str]:
    """Names of the private records' columns."""
    if data.train:
        return data.train[0].columns
    split, query_text = own.get("train_split", "train"), own.get("train_query")
    return columns_in(own["source"], split, query_text, seed=config.run.seed)


def _check_unit(wish: Wish, columns: Sequence[str]) -> None:
    """Refuses a unit that could be meant in two ways: epsilon would cover less than was meant.

    Raises:
        ConfigError: There is a column with the name "record".
    """
    if wish.unit == "record" and "record" in columns:
        message = (
            "value 'record' is a column of the data too, and would mean one row, not one value of that "
            "column; rename the column, and give its new name if it names the person"
        )
        raise _wrong("unit", message)


def _header(wish: Wish, directory: Path) -> list[str]:
    """Returns the comment at the top of the config."""
    lines = [
        "Private fine-tuning without a federation: one client has all records.",
        f"Run it again: fedslm simulate {shlex.quote(str(directory / layout.TRAIN_TOML))} "
        f"--set run.name=again",
        "A recipe sets what is not here; config.toml has every value of this run.",
    ]
    if wish.holdout is not None:
        lines.append(f"{wish.holdout:g} of the units were held out as public; epsilon excludes them.")
    if wish.holdout is not None or _in_memory(wish.train) is not None:
        lines.append("data/given has a copy of the private records: delete data/ when you are done.")
    if not isinstance(wish.base, str | Path):
        lines.append("base/ has the model that was given: this config and the adapter need it.")
    return lines


def _portable(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the sections without the directory, so that the run can be repeated elsewhere."""
    kept = {section: dict(values) for section, values in sections.items()}
    kept["run"].pop("directory", None)
    return kept


def _name(wish: Wish) -> str:
    """A name for the run: that of its directory, or of the file."""
    named = wish.directory if wish.directory is not None else wish.train
    text = Path(str(named)).expanduser().absolute().name if isinstance(named, str | Path) else ""
    stem = text if wish.directory is not None else text.partition(".")[0]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.") or "train"


def _source(value: Any) -> str | None:
    """Returns a source as a config names it, a local path in full; None for records in memory."""
    if not isinstance(value, str | Path):
        return None
    text = str(value)
    path = Path(expand(text))
    return str(path.absolute()) if text not in EMBEDDED and path.exists() else text


def _in_memory(value: Any) -> Any:
    """Returns records in memory; None for a source."""
    return None if isinstance(value, str | Path) else value


def _has_splits(value: Any) -> bool:
    """Whether a source may have a split for the evaluation: it is no file and not in memory."""
    return isinstance(value, str | Path) and not Path(expand(str(value))).is_file()


def _wrong(key: str, message: str) -> ConfigError:
    """The error for an argument."""
    return ConfigError([Problem(key, message)])
