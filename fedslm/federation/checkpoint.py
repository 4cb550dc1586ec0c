"""A run's directory: its config, its history, and the state to resume from after a crash.

config.toml config.json     the resolved config and its hash
data/                       the simulation's shards and the public evaluation split
frozen.safetensors          the tensors that no round changes, shared by hash
rounds.jsonl                one line for each round
nodes/                      each simulated client's own directory: ledger, keys, policy
statements.jsonl            the signed spend statements that the server received
checkpoint/                 the state after the last round
adapter/ report.json report.md     written at the end
error.txt                   the error that ended the server's side of a run on real nodes, if any
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fedslm import config as configuration
from fedslm import layout
from fedslm.aggregation.server import ServerState
from fedslm.config import Config, former
from fedslm.errors import ConfigError, FedslmError, PrivacyError, RunError, Unusable
from fedslm.privacy.lines import is_index
from fedslm.privacy.statement import Statement, read_statement
from fedslm.records import (
    AdapterState,
    RoundRecord,
    epsilon_as_json,
    epsilon_of_json,
    is_count,
    is_number,
)
from fedslm.storage import (
    json_text,
    load_adapter,
    locked,
    make_run_directory,
    save_adapter,
    write_text,
)

# Made by the Python API.
_MADE_BEFORE = (layout.GIVEN, layout.GIVEN_BASE, layout.TRAIN_TOML, layout.HOLDOUT)
_PARTS = ("moving", "memory", "control")
_BLOCK_BYTES = 4096
_LOCK_SECONDS = 1.0  # a process that only checks whether a run is active holds it briefly


@dataclass(frozen=True)
class Checkpoint:
    """The state after a round; everything random is derived from seed and round.

    Attributes:
        round: Last finished round; 0 before the first.
        server: The state of aggregation: the moving tensors, turn and moments.
        metrics_before: Public metrics of the initial adapter.
        metrics: Public metrics of the adapter.
        failed_in_row: Number of consecutive rounds without enough replies, up to this one.
        statements: Client index to the last spend statement that it signed.
        epsilons: Client index to epsilon from that statement; empty without privacy.
    """

    round: int
    server: ServerState
    metrics_before: Mapping[str, float]
    metrics: Mapping[str, float]
    failed_in_row: int = 0
    statements: Mapping[int, Statement] = field(default_factory=dict)
    epsilons: Mapping[int, float] = field(default_factory=dict)

    def after(self, record: RoundRecord, **changes: Any) -> Checkpoint:
        """The state after one further round."""
        metrics = record.metrics or self.metrics
        return replace(self, round=record.round, metrics=metrics, **changes)


@dataclass(frozen=True)
class RunDirectory:
    """A run's directory on disk.

    Attributes:
        path: Absolute path.
        run_id: Random identifier of the run.
    """

    path: Path
    run_id: str
    config_sha256: str = ""

    @classmethod
    def create(cls, path: Path, config: Config) -> RunDirectory:
        """Creates a new run directory.

        Raises:
            ConfigError: Its path cannot be written as text.
            RunError: It holds more than what is made before a run, or cannot be written.
        """
        path = make_run_directory(path, may_hold=_MADE_BEFORE)
        run_id = secrets.token_hex(8)
        write_text(path / layout.CONFIG_TOML, configuration.to_toml(config))
        values = {
            "run_id": run_id,
            "config_sha256": config.sha256(),
            "config": config.model_dump(mode="json"),
        }
        write_text(path / layout.CONFIG_JSON, json_text(values, indent=2))
        return cls(path, run_id, config.sha256())

    @classmethod
    def open(cls, path: Path, expected: Config | None = None) -> tuple[RunDirectory, Config]:
        """Opens a run directory; one of an earlier version can only be read.

        Args:
            path: The directory.
            expected: Refuse the directory if it was created with another config.

        Raises:
            RunError: It is not a run directory, was edited, or belongs to another config.
        """
        path = path.expanduser().absolute()
        try:
            values = json.loads((path / layout.CONFIG_JSON).read_text(encoding="utf-8"))
            run_id, sha256 = str(values["run_id"]), values["config_sha256"]
            config = configuration.from_mapping(former.with_new_names(values["config"]))
        except FileNotFoundError:
            raise Unusable(f"{path} is not a run directory: it has no config.json") from None
        except KeyError as error:
            raise Unusable(f"{path} is not a run directory: its config.json lacks {error}") from error
        except (OSError, ValueError, TypeError, ConfigError) as error:
            raise Unusable(f"{path} is not a run directory: {error}") from error
        if sha256 not in (config.sha256(), *former.former_sha256s(config)):
            raise Unusable(f"{path}/config.json was edited after the run began; start a new run")
        if expected is not None and expected.sha256() != config.sha256():
            raise Unusable(
                f"{path} was made with another config (hash {sha256[:12]}, now "
                f"{expected.sha256()[:12]}); omit the config to continue with the run's own"
            )
        return cls(path, run_id, str(sha256)), config

    def check_continues(self, config: Config) -> None:
        """Refuses a run of an earlier version: its ledgers hold another hash of the config."""
        if self.config_sha256 != config.sha256():
            message = "was begun by an earlier version: it can be read, but not continued"
            raise Unusable(f"{self.path} {message}; start a new run")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Locks out other processes while this one runs.

        Raises:
            RunError: Another process has the lock.
        """
        problem = f"{self.path} is in use by another process"
        with locked(self.path / ".lock", _LOCK_SECONDS, problem):
            yield

    @property
    def has_checkpoint(self) -> bool:
        """True if there is a checkpoint to resume from."""
        return (self.path / layout.CHECKPOINT / layout.CHECKPOINT_STATE).exists()

    @property
    def data(self) -> Path:
        """The simulation's data."""
        return self.path / layout.DATA

    @property
    def nodes(self) -> Path:
        """The simulated nodes' own directories."""
        return self.path / layout.NODES

    @property
    def frozen(self) -> Path:
        """The frozen tensors."""
        return self.path / layout.FROZEN

    def save(self, checkpoint: Checkpoint, record: RoundRecord | None = None) -> None:
        """Writes a round's line, then the checkpoint that makes the round count.

        Raises:
            RunError: The disk is full, for instance; the previous checkpoint stays valid.
        """
        if record is not None:
            self._append(layout.ROUNDS, [_line(record)])
            self._append(layout.STATEMENTS, self._unseen(checkpoint))
        directory, server = self.path / layout.CHECKPOINT, checkpoint.server
        files = {}
        for part in _PARTS:
            tensors: AdapterState = getattr(server, part)
            name = f"{part}-{checkpoint.round:05d}.safetensors"
            if tensors:
                save_adapter(directory / name, tensors)
                files[part] = {"name": name, "sha256": tensors.sha256()}
        values = {
            "round": checkpoint.round,
            "turn": server.turn,
            "norms": dict(server.norms),
            "files": files,
            "metrics_before": dict(checkpoint.metrics_before),
            "metrics": dict(checkpoint.metrics),
            "failed_in_row": checkpoint.failed_in_row,
            "statements": {k: v.to_json() for k, v in checkpoint.statements.items()},
            "epsilons": {k: epsilon_as_json(v) for k, v in checkpoint.epsilons.items()},
        }
        write_text(directory / layout.CHECKPOINT_STATE, json_text(values, indent=2))
        for old in directory.glob("*.safetensors"):
            if old.name not in {file["name"] for file in files.values()}:
                old.unlink()

    def load(self) -> Checkpoint | None:
        """Reads the last checkpoint and removes the lines of rounds that it does not cover.

        Returns:
            The checkpoint; None if the run never reached its first one.

        Raises:
            RunError: The checkpoint is damaged.
        """
        directory = self.path / layout.CHECKPOINT
        if not self.has_checkpoint:
            return None
        try:
            values = json.loads((directory / layout.CHECKPOINT_STATE).read_text(encoding="utf-8"))
            server = _server_state(directory, values)
            statements = {int(k): read_statement(text) for k, text in values["statements"].items()}
            checkpoint = Checkpoint(
                round=int(values["round"]),
                server=server,
                metrics_before=metrics_of(values["metrics_before"]),
                metrics=metrics_of(values["metrics"]),
                failed_in_row=int(values["failed_in_row"]),
                statements=statements,
                epsilons=_epsilons(values),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, FedslmError) as error:
            raise RunError(f"the checkpoint in {directory} is damaged: {error}") from error
        self._forget_after(checkpoint.round)
        return checkpoint

    def last_statements(self) -> dict[int, tuple[Statement, float | None]]:
        """The last spend statement that each client signed, and epsilon from it; empty before any.

        Epsilon is None if the checkpoint does not hold it.

        Raises:
            RunError: The checkpoint is damaged.
        """
        if not self.has_checkpoint:
            return {}
        path = self.path / layout.CHECKPOINT / layout.CHECKPOINT_STATE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            epsilons = _epsilons(values)
            return {
                int(client): (read_statement(text), epsilons.get(int(client)))
                for client, text in values["statements"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError, PrivacyError) as error:
            raise RunError(f"the checkpoint in {path.parent} is damaged: {error}") from error

    def _forget_after(self, round: int) -> None:
        """Removes the lines of later rounds, and a torn one; does not rewrite a file without any."""
        path, records = self.path / layout.ROUNDS, self.records()
        kept = [record for record in records if record.round <= round]
        is_whole = path.exists() and _torn_bytes(path) == 0
        if kept != records or not is_whole:
            write_text(path, "".join(_line(record) + "\n" for record in kept))

    def records(self) -> list[RoundRecord]:
        """Reads ``rounds.jsonl``; a torn last line is left out."""
        path = self.path / layout.ROUNDS
        try:
            return [_record(item) for item in _whole_lines(path)]
        except (OSError, ValueError, TypeError, KeyError, AttributeError, PrivacyError) as error:
            raise RunError(f"{path} is damaged: {error}") from error

    def statements(self) -> list[tuple[int, Statement]]:
        """Every statement that the server received, with its client, in order.

        Raises:
            RunError: The file is damaged.
        """
        path = self.path / layout.STATEMENTS
        try:
            values = _whole_lines(path)
            if not all(is_index(item["client"]) for item in values):
                raise ValueError("client must be a whole number >= 0")
            return [(item["client"], read_statement(item["statement"])) for item in values]
        except (OSError, ValueError, TypeError, KeyError, PrivacyError) as error:
            raise RunError(f"{path} is damaged: {error}") from error

    def _unseen(self, checkpoint: Checkpoint) -> list[str]:
        """Lines for the statements of a checkpoint's last round that are not in the file yet."""
        return [
            json_text({"client": client, "statement": statement.to_json()})
            for client, statement in checkpoint.statements.items()
            if statement.round == checkpoint.round
        ]

    def _append(self, name: str, lines: list[str]) -> None:
        """Appends synced lines to a file; drops a torn last line of an earlier crash."""
        path = self.path / name
        try:
            torn = _torn_bytes(path) if path.exists() else 0
            if torn:
                os.truncate(path, path.stat().st_size - torn)
            with path.open("ab") as file:
                file.write("".join(f"{line}\n" for line in lines).encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(f"{path} cannot be written: {error}") from error


def _whole_lines(path: Path) -> list[Any]:
    """The values of a file's lines, without a torn last line; none if there is no file."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _torn_bytes(path: Path) -> int:
    """Bytes after a file's last newline: 0 unless a crash tore a line. Reads only the end."""
    with path.open("rb") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end > 0:
            begin = max(0, end - _BLOCK_BYTES)
            file.seek(begin)
            found = file.read(end - begin).rfind(b"\n")
            if found >= 0:
                return size - (begin + found + 1)
            end = begin
    return size


def metrics_of(values: Mapping[str, Any]) -> dict[str, float]:
    """Reads stored metrics: null stands for a value that was not finite.

    >>> metrics_of({"accuracy": 0.5, "loss": None})
    {'accuracy': 0.5, 'loss': nan}
    """
    return {name: math.nan if value is None else float(value) for name, value in values.items()}


def _epsilons(values: Mapping[str, Any]) -> dict[int, float]:
    """Reads a checkpoint's map from client to epsilon; empty in one of an older version."""
    return {int(client): _epsilon(each) for client, each in values.get("epsilons", {}).items()}


def _epsilon(value: object) -> float:
    """Reads an epsilon of a run's file; older versions wrote null for an infinite one."""
    return math.inf if value is None else epsilon_of_json(value)


def _line(record: RoundRecord) -> str:
    """A round as a line of JSON."""
    return json_text({**asdict(record), "epsilon": epsilon_as_json(record.epsilon)})


def _record(values: Mapping[str, Any]) -> RoundRecord:
    """Reads a round's line; older versions did not write ``left_out`` and ``unknown``."""
    for name in ("round", "cohort", "completed", "failed", "late", "refused"):
        if not is_index(values[name]):
            raise ValueError(f"{name}={values[name]!r} must be a whole number >= 0")
    changes = {
        "metrics": metrics_of(values["metrics"]),
        "epsilon": _epsilon(values["epsilon"]),
        "reasons": tuple(values["reasons"]),
        "left_out": tuple(values.get("left_out", ())),
        "unknown": tuple(values.get("unknown", ())),
    }
    return RoundRecord(**{**values, **changes})


def _server_state(directory: Path, values: Mapping[str, Any]) -> ServerState:
    """Reads the tensors that a checkpoint lists, and checks them against their hashes."""
    parts = {}
    for part, file in values["files"].items():
        if part not in _PARTS:
            raise ValueError(f"unknown part {part!r}")
        parts[part] = load_adapter(directory / Path(file["name"]).name)
        if parts[part].sha256() != file["sha256"]:
            raise ValueError(f"the file of part {part!r} does not match its hash")
    norms = values["norms"]
    known = isinstance(norms, dict) and set(norms) <= {"all", "odd", "even"}
    if not (known and is_count(values["turn"]) and all(map(is_number, norms.values()))):
        raise ValueError("turn must be a count, and norms numbers by kind")
    return ServerState(turn=values["turn"], norms=norms, **parts)
