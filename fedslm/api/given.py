"""Records in memory become files of a run: what they change in its config, and when they go."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedslm import layout
from fedslm.config import Config, from_mapping, with_overrides
from fedslm.data import given
from fedslm.data.columns import Wanted, needed, needed_to_share
from fedslm.data.given import Part
from fedslm.data.layouts import laid_out
from fedslm.data.sources import refuse_private
from fedslm.errors import ConfigError, Problem, RunError
from fedslm.models.given import GivenBase
from fedslm.simulation import run_path
from fedslm.storage import make_run_directory

_TRAIN, _EVALUATION, _PUBLIC = "train.arrow", "evaluation.arrow", "public.arrow"
_MOST_PROBLEMS = 5
_MOST_SHARED, _FEW = 0.9, 10  # a part that shares more than this share of 10 or more records is a copy


@dataclass(frozen=True)
class InMemory:
    """Records that a caller gave.

    Attributes:
        train: The private records: one part, or one for each client; empty if none were given.
        evaluation: The records to evaluate on: one part; empty if none were given.
        public: The public records that training may use: one part; empty if none were given.
        are_clients: Whether the parts of ``train`` are clients.
    """

    train: tuple[Part, ...] = ()
    evaluation: tuple[Part, ...] = ()
    public: tuple[Part, ...] = ()
    are_clients: bool = False

    @classmethod
    def of(cls, train: object = None, evaluation: object = None, public: object = None) -> InMemory:
        """Checks what a caller gave.

        Raises:
            ConfigError: An argument has another type or is empty, or private records are public too.
        """
        are_clients = isinstance(train, Mapping)
        private: list[Part] = []
        if isinstance(train, Mapping):
            private = given.clients_of(train, "train")
        elif train is not None:
            private = given.parts_of(train, "train")
        evaluated = [] if evaluation is None else given.parts_of(evaluation, "evaluation")
        learned = [] if public is None else given.parts_of(public, "public")
        for one in (*evaluated, *learned):
            if same := next((each.key for each in private if each.value is one.value), None):
                message = (
                    f"is {same} itself: train is private and {one.key} is public, so a record "
                    f"cannot be in both; give other records"
                )
                raise ConfigError([Problem(one.key, message)])
        return cls(tuple(private), tuple(evaluated), tuple(learned), are_clients)

    @property
    def has_any(self) -> bool:
        """Whether there are records."""
        return bool(self.train or self.evaluation or self.public)

    def changes(self, sections: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """Returns the config keys that make a run read these records.

        Args:
            sections: The config without them.
            folder: Directory of their files.

        Raises:
            ConfigError: The config says something else about the clients, or no records are public.
        """
        own = _section(sections, "data")
        changes: dict[str, Any] = {}
        if self.train:
            source = own.get("source")
            changes["data.source"] = str(folder / _TRAIN)
            changes["data.train_query"] = None
            for key in ("evaluation", "public") if source else ():
                if not own.get(f"{key}_source") and (key == "evaluation" or own.get("public_split")):
                    changes[f"data.{key}_source"] = source  # what the config meant until now
            if not (self.evaluation or source or own.get("evaluation_source")):
                message = "is missing: give the public records on which the rounds are evaluated"
                raise ConfigError([Problem("evaluation", message)])
        if self.evaluation:
            changes["data.evaluation_source"] = str(folder / _EVALUATION)
            changes["data.evaluation_query"] = None
        if self.public:
            changes |= {"data.public_source": str(folder / _PUBLIC), "data.public_split": None}
        if self.are_clients:
            changes |= self._clients(own, _section(sections, "federation"))
        return changes

    def _clients(self, data: Mapping[str, Any], federation: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the keys that make each part a client."""
        count, problems = len(self.train), []
        if federation.get("num_clients", count) != count:
            message = f"value {federation['num_clients']}: train has {count} clients; leave it out"
            problems.append(Problem("federation.num_clients", message))
        if data.get("partition", "natural") != "natural":
            message = (
                f"value {data['partition']!r}: train names the clients already; leave it out, or "
                f"give all records as one data set"
            )
            problems.append(Problem("data.partition", message))
        if problems:
            raise ConfigError(problems)
        return {"data.partition": "natural", "federation.num_clients": count}

    def write(self, config: Config, folder: Path) -> None:
        """Writes the columns that a run reads.

        Raises:
            ConfigError: A column is missing, or has the name of the column for the clients.
            DataError: A column cannot be read.
        """
        there = self.evaluation[0].columns if self.evaluation else None
        data, task = laid_out(config.data, config.task, config.run.seed, there)
        columns = needed(data, task)
        private = {**columns, **needed_to_share(data, config.privacy)}
        client = private.pop("data.natural_column", "") if self.are_clients else ""
        released = (*self.evaluation, *self.public)
        problems = [*given.missing(self.train, private), *given.missing(released, columns)]
        problems += [
            Problem(
                each.key,
                f"has a column {client!r} already, the name of the column for the clients; rename "
                f"it, or set data.natural_column to another name",
            )
            for each in self.train
            if client and client in each.columns
        ]
        if problems or (problems := list(self._copies(config, columns))):
            raise ConfigError(problems[:_MOST_PROBLEMS])
        for parts, name, wanted in (
            (self.train, _TRAIN, private),
            (self.evaluation, _EVALUATION, columns),
            (self.public, _PUBLIC, columns),
        ):
            if parts:
                column = client if name == _TRAIN else ""
                given.write(parts, folder / name, Wanted(wanted), column)

    def _copies(self, config: Config, columns: Mapping[str, str]) -> Iterator[Problem]:
        """Yields a problem for each part that is a copy: epsilon counts each client, and only them."""
        wanted, seen = Wanted(columns), set[bytes]()
        privacy = config.privacy
        overlapping = privacy.overlapping or privacy.unit != "record"  # users are checked later
        for part in self.train:
            records = given.records_of(part, wanted)
            if not overlapping and _are_copied(records, seen):
                yield Problem(
                    part.key,
                    "has the records of other clients: epsilon would hold for each client, and not for "
                    "a record; give each record to one client, or set privacy.overlapping = true",
                )
            seen |= records
        for part in (*self.evaluation, *self.public):
            if _are_copied(given.records_of(part, wanted), seen):
                use = "metrics on" if part in self.evaluation else "what is learned from"
                yield Problem(
                    part.key,
                    f"has the records of train, which are private: {use} them is released without "
                    f"noise; give other records",
                )


def _are_copied(records: set[bytes], seen: set[bytes]) -> bool:
    """Whether nearly all of a part's records were seen in other parts."""
    return len(records) >= _FEW and len(records & seen) > _MOST_SHARED * len(records)


def check_public(sections: Mapping[str, Any], config: Config) -> None:
    """Refuses public sources that were the private ones before records in memory replaced them.

    Args:
        sections: The config without the records in memory.
        config: The config with them.

    Raises:
        DataError: A public source shares a file, a query or a name with the private split.
    """
    own = _section(sections, "data")
    if source := own.get("source"):
        before = {"source": str(source), "train_query": own.get("train_query")}
        before["train_split"] = own.get("train_split", "train")
        refuse_private(config.data.model_copy(update=before), config.data)


@contextmanager
def placed(
    sections: Mapping[str, Any], data: InMemory, base: GivenBase | None = None
) -> Iterator[Config]:
    """Writes records and a loaded model below the run directory, and yields the config that reads them.

    If the block fails before the run has begun, the files are removed.

    Raises:
        FedslmError: The config, the records, the model or the run directory cannot be used.
    """

    def config_in(directory: Path) -> Config:
        changes = data.changes(sections, directory / layout.GIVEN)
        changes |= base.changes(directory / layout.GIVEN_BASE) if base else {}
        return from_mapping(with_overrides(sections, changes))

    draft = config_in(Path())
    is_loaded = base is not None and base.is_loaded
    if not (data.has_any or is_loaded):
        yield draft
        return
    check_public(sections, draft)
    with started(run_path(draft)) as directory:
        config = config_in(directory)
        if data.has_any:
            data.write(config, given_folder(directory))
        if base and is_loaded:
            base.write(directory / layout.GIVEN_BASE)
        yield config


@contextmanager
def started(path: Path) -> Iterator[Path]:
    """Makes a run directory for files that are there before the run; yields its absolute path.

    If the block fails before the run has begun, the directory is removed.

    Raises:
        RunError: The directory exists, or cannot be made.
    """
    directory = make_run_directory(path)
    try:
        yield directory
    except BaseException:
        if not (directory / layout.CONFIG_JSON).exists():
            for name in (layout.DATA, layout.GIVEN_BASE):
                shutil.rmtree(directory / name, ignore_errors=True)
            for name in (layout.TRAIN_TOML, layout.HOLDOUT):
                (directory / name).unlink(missing_ok=True)
            with suppress(OSError):  # it holds the logs of a run
                directory.rmdir()
        raise


def given_folder(directory: Path) -> Path:
    """Makes the directory for given records, which only its owner can read.

    Raises:
        RunError: It cannot be made.
    """
    folder = directory / layout.GIVEN
    try:
        for each in (folder.parent, folder):
            each.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder} cannot be made: {error}") from error
    return folder


def _section(sections: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Returns a section; empty if it is missing or is not one, which is reported later."""
    found = sections.get(name, {})
    return found if isinstance(found, Mapping) else {}
