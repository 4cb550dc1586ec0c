"""Tests of a run's directory."""

from __future__ import annotations

import json
import math
import resource
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.checkpoints import CONFIG, after, assert_same, record, server, statement

from fedslm import config as configuration
from fedslm import simulation
from fedslm.aggregation.server import ServerState
from fedslm.config import Config
from fedslm.config.former import former_sha256s, with_new_names
from fedslm.errors import FedslmError, RunError
from fedslm.federation.checkpoint import Checkpoint, RunDirectory
from fedslm.records import AdapterState, RoundRecord


def test_create_writes_the_config(directory: RunDirectory) -> None:
    """What was asked lies in the directory, and reads back."""
    assert configuration.from_toml(directory.path / "config.toml") == CONFIG
    again, config = RunDirectory.open(directory.path)
    assert (again, config) == (directory, CONFIG)


def test_every_run_has_its_own_identifier(tmp_path: Path) -> None:
    """Two runs of one config are two runs."""
    runs = [RunDirectory.create(tmp_path / name, CONFIG).run_id for name in "ab"]
    assert len(set(runs)) == 2


def test_create_takes_an_empty_directory(tmp_path: Path) -> None:
    """A directory that is there and empty will do."""
    (tmp_path / "run").mkdir()
    assert RunDirectory.create(tmp_path / "run", CONFIG).path == tmp_path / "run"


def test_create_refuses_a_directory_with_anything_in_it(tmp_path: Path) -> None:
    """No run is overwritten: the error says how to continue it, and nothing is touched."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match=r"exists; continue it with --resume"):
        RunDirectory.create(tmp_path / "run", CONFIG)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_create_refuses_a_file(tmp_path: Path) -> None:
    """A file in the place of the directory is an error of ours."""
    (tmp_path / "run").write_text("")
    with pytest.raises(RunError, match="cannot be made"):
        RunDirectory.create(tmp_path / "run", CONFIG)


def changed(section: str, **values: Any) -> Config:
    """The config with one section changed."""
    part = getattr(CONFIG, section).model_copy(update=values)
    return CONFIG.model_copy(update={section: part})


def test_open_accepts_what_does_not_matter(directory: RunDirectory) -> None:
    """A run may go on with other workers and under another name."""
    for config in (CONFIG, changed("engine", workers=2), changed("run", name="other")):
        assert RunDirectory.open(directory.path, config)[0] == directory


@pytest.mark.parametrize(
    "config",
    [changed("training", learning_rate=0.5), changed("run", seed=1), changed("federation", rounds=11)],
    ids=["training", "seed", "rounds"],
)
def test_open_refuses_another_config(directory: RunDirectory, config: Config) -> None:
    """A run goes on as it began, or not at all."""
    with pytest.raises(RunError, match="made with another config"):
        RunDirectory.open(directory.path, config)


def edited(directory: RunDirectory, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edits config.json."""
    path = directory.path / "config.json"
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    "edit",
    [
        lambda values: values["config"]["training"].update(learning_rate=0.5),
        lambda values: values["config"]["privacy"].update(epsilon=99.0),
        lambda values: values["config"].pop("lora") and values["config"].update(lora={"rank": 2}),
        lambda values: values.update(config_sha256="0" * 64),
        lambda values: values["config"].update(nonsense={}),
        lambda values: values["config"]["privacy"].update(unit="user"),
        lambda values: values["config"]["privacy"].update(unit="nobody"),
        lambda values: values.pop("config"),
        lambda values: values.pop("config_sha256"),
        lambda values: values.pop("run_id"),
        lambda values: values.update(config=5),
    ],
)
def test_open_refuses_an_edited_config(
    directory: RunDirectory, edit: Callable[[dict[str, Any]], object]
) -> None:
    """A config that was edited after the run began is an error of ours, whatever was edited."""
    edited(directory, edit)
    with pytest.raises(FedslmError):
        RunDirectory.open(directory.path)


@pytest.mark.parametrize("content", [None, "", "{", "5", "[]", "null", '"x"', "\x00"])
def test_open_refuses_what_is_no_run_directory(directory: RunDirectory, content: str | None) -> None:
    """A directory without a readable config.json is no run directory."""
    path = directory.path / "config.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(RunError, match="is not a run directory"):
        RunDirectory.open(directory.path)


def test_a_run_without_a_checkpoint_starts_anew(directory: RunDirectory) -> None:
    """Before the first checkpoint there is nothing to go on from."""
    assert directory.load() is None
    assert directory.records() == []


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_round_trip(directory: RunDirectory, rounds: int) -> None:
    """The last state and every round's line read back as they were."""
    state = after(directory, rounds)
    assert_same(RunDirectory.open(directory.path)[0].load(), state)
    assert directory.records() == [record(number) for number in range(1, rounds + 1)]


def test_figures_that_are_not_finite_are_null_on_disk(directory: RunDirectory) -> None:
    """Metrics without a value, and an infinite epsilon, are JSON on disk and come back as they were."""
    none = {"accuracy": 0.5, "loss": math.nan}
    line = replace(record(1), metrics=none)
    state = Checkpoint(1, server(1), none, none, epsilons={0: math.inf, 1: 0.5})
    directory.save(state, line)
    for name in ("rounds.jsonl", "checkpoint/state.json"):
        json.loads((directory.path / name).read_text(), parse_constant=pytest.fail)
    (read,), loaded = directory.records(), directory.load()
    assert loaded is not None
    for found in (read.metrics, loaded.metrics, loaded.metrics_before):
        assert found["accuracy"] == 0.5
        assert math.isnan(found["loss"])
    assert loaded.epsilons == {0: math.inf, 1: 0.5}


def test_only_the_last_adapter_is_kept(directory: RunDirectory) -> None:
    """Disk use does not grow with the rounds."""
    after(directory, 4)
    names = sorted(path.name for path in (directory.path / "checkpoint").iterdir())
    assert names == [
        "control-00004.safetensors",
        "memory-00004.safetensors",
        "moving-00004.safetensors",
        "state.json",
    ]


def test_lines_beyond_the_checkpoint_are_forgotten(directory: RunDirectory) -> None:
    """A round that was recorded and not checkpointed is run again, and has one line in the end."""
    state = after(directory, 2)
    directory._append("rounds.jsonl", [json.dumps(asdict(record(3)))])
    directory._append("rounds.jsonl", [json.dumps(asdict(record(4)))])
    assert_same(directory.load(), state)
    assert [line.round for line in directory.records()] == [1, 2]
    text = (directory.path / "rounds.jsonl").read_text()
    assert text.endswith("\n")
    assert len(text.splitlines()) == 2


def test_a_torn_last_line_is_left_out_at_every_byte(directory: RunDirectory) -> None:
    """A line that was cut off anywhere does not hide the lines before it."""
    state = after(directory, 2)
    path = directory.path / "rounds.jsonl"
    whole = path.read_bytes()
    directory._append("rounds.jsonl", [json.dumps(asdict(record(3)))])
    content = path.read_bytes()
    for length in range(len(whole), len(content)):
        path.write_bytes(content[:length])
        assert [line.round for line in directory.records()] == [1, 2]
    assert_same(directory.load(), state)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("line", ["nonsense", "5", "{}", "[]"])
def test_a_damaged_line_is_an_error_of_ours(directory: RunDirectory, line: str) -> None:
    """A line that is whole and no record was damaged later: an error without a traceback."""
    after(directory, 2)
    path = directory.path / "rounds.jsonl"
    first, *rest = path.read_text().splitlines(keepends=True)
    path.write_text("".join([first, f"{line}\n", *rest]))
    with pytest.raises(RunError):
        directory.load()


@pytest.mark.parametrize("name", ["rounds.jsonl", "statements.jsonl"])
def test_a_file_that_is_no_text_is_an_error_of_ours(directory: RunDirectory, name: str) -> None:
    """Bytes that are not UTF-8, or something that is no file, are no traceback either."""
    path = directory.path / name
    read = {"rounds.jsonl": directory.records, "statements.jsonl": directory.statements}[name]
    path.write_bytes(b'{"round": "\xff"}\n')
    with pytest.raises(RunError, match="damaged"):
        read()
    path.unlink()
    path.mkdir()
    with pytest.raises(RunError, match="damaged"):
        read()


def test_a_damaged_adapter_is_refused(directory: RunDirectory) -> None:
    """Any flipped or missing byte of the weights is found."""
    after(directory, 1)
    path = directory.path / "checkpoint" / "moving-00001.safetensors"
    content = path.read_bytes()
    for damaged in (content[:-1], content[:-4] + b"\0\0\0\1", content[:20], b""):
        path.write_bytes(damaged)
        with pytest.raises(RunError):
            directory.load()
    path.unlink()
    with pytest.raises(RunError):
        directory.load()


def test_another_rounds_adapter_is_refused(directory: RunDirectory) -> None:
    """A good file in the wrong place is found by its hash."""
    after(directory, 1)
    old = (directory.path / "checkpoint" / "moving-00001.safetensors").read_bytes()
    after(directory, 2)
    (directory.path / "checkpoint" / "moving-00002.safetensors").write_bytes(old)
    with pytest.raises(RunError, match="does not match its hash"):
        directory.load()


def test_a_state_cut_anywhere_is_refused(directory: RunDirectory) -> None:
    """However much of the state is missing, it is not read as another state."""
    after(directory, 1)
    path = directory.path / "checkpoint" / "state.json"
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(RunError, match="damaged"):
            directory.load()


@pytest.mark.parametrize("value", [None, "x", [], {"a": 1}])
@pytest.mark.parametrize("key", ["round", "turn", "norms", "files", "failed_in_row", "statements"])
def test_a_state_with_a_foreign_value_is_refused(
    directory: RunDirectory, key: str, value: object
) -> None:
    """A value of another kind is an error of ours."""
    after(directory, 1)
    path = directory.path / "checkpoint" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(RunError):
        directory.load()


def test_a_full_disk_leaves_the_last_checkpoint(directory: RunDirectory) -> None:
    """A round that does not fit is an error, and the run goes on from the round before."""
    state = after(directory, 1)
    large = AdapterState({"a": np.zeros(100_000, np.float32)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(RunError, match="cannot be written"):
            directory.save(state.after(record(2), server=ServerState(large)), record(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_same(RunDirectory.open(directory.path)[0].load(), state)
    assert [line.round for line in directory.records()] == [1]


def test_metrics_of_a_round_that_was_not_evaluated_are_the_last() -> None:
    """A round without an evaluation keeps the metrics known before it."""
    state = Checkpoint(0, server(0), {"accuracy": 0.2}, {"accuracy": 0.3})
    line = RoundRecord(**{**vars(record(1)), "metrics": {}})
    assert state.after(line).metrics == {"accuracy": 0.3}
    assert state.after(record(1)).metrics == {"accuracy": 0.1}
    assert state.after(record(1)).metrics_before == {"accuracy": 0.2}


def test_statements_are_kept_one_line_each(directory: RunDirectory) -> None:
    """Every statement that the server received stays on disk, with its client, in order."""
    after(directory, 3)
    kept = directory.statements()
    assert kept == [(0, statement(1)), (11, statement(1)), (0, statement(2)), (0, statement(3))]


def test_statements_with_a_torn_last_line_read_up_to_it(directory: RunDirectory) -> None:
    """A line that was cut off anywhere hides no statement before it, and the next write heals it."""
    state = after(directory, 2)
    path = directory.path / "statements.jsonl"
    content = path.read_bytes()
    start = content.rfind(b"\n", 0, -1) + 1
    for length in (start, start + 1, (start + len(content)) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        assert directory.statements() == [(0, statement(1)), (11, statement(1))]
    state = state.after(record(3), statements={0: statement(3)})
    directory.save(state, record(3))
    assert directory.statements()[2:] == [(0, statement(3))]


@pytest.mark.parametrize("change", [b'"index": 7', b'"index": "x"'])
def test_a_statement_that_was_edited_is_refused(directory: RunDirectory, change: bytes) -> None:
    """A statement on disk is checked against its signature, in the checkpoint and in the list."""
    after(directory, 1)
    for path, read in (
        (directory.path / "checkpoint" / "state.json", directory.load),
        (directory.path / "statements.jsonl", directory.statements),
    ):
        quoted = change.replace(b'"', b'\\"')
        content = path.read_bytes()
        edited_content = content.replace(b'\\"index\\": 1', quoted)
        assert edited_content != content
        path.write_bytes(edited_content)
        with pytest.raises(RunError, match="damaged"):
            read()


def as_of_an_earlier_version(directory: RunDirectory) -> None:
    """Rewrites a run's config as versions before the renaming stored it, with the hash that it had then."""
    path = directory.path / "config.json"
    values = json.loads(path.read_text())
    aggregation = values["config"]["aggregation"]
    aggregation["hostile"] = aggregation.pop("num_byzantine")
    if values["config"]["privacy"]["unit"] == "user":
        values["config"]["privacy"]["unit"] = "patient"
    privacy = values["config"]["privacy"]
    privacy["batched"] = privacy.pop("passes") == "shared"  # the config of these tests runs isolated
    values["config_sha256"] = former_sha256s(
        configuration.from_mapping(with_new_names(values["config"]))
    )[0]
    path.write_text(json.dumps(values))


def test_a_run_of_an_earlier_version_is_read_and_not_continued(directory: RunDirectory) -> None:
    """Its config has other names and another hash; an audit needs it, and no round may be added."""
    as_of_an_earlier_version(directory)
    again, config = RunDirectory.open(directory.path)
    assert config == CONFIG
    assert again.config_sha256 == former_sha256s(CONFIG)[0] != CONFIG.sha256()
    with pytest.raises(RunError, match="earlier version: it can be read, but not continued"):
        simulation.resume(directory.path)
    path = directory.path / "config.json"
    path.write_text(path.read_text().replace('"rank": 8', '"rank": 4'))
    with pytest.raises(RunError, match="was edited"):
        RunDirectory.open(directory.path)


def test_the_hash_of_an_earlier_version() -> None:
    """The hash that 27230a0 gave to this config: computed there, once."""
    privacy = {"unit": "patient", "unit_column": "who", "max_records_per_unit": 2, "epsilon": 8.0}
    rest = {"passes": "isolated", "delta": 1e-5, "clip_norm": 1.0, "sample_rate": 0.05}
    sections = {
        "model": {"base": "demo", "dtype": "float32"},  # the default then, and stored
        "data": {"source": "demo"},
        "task": {"name": "classification"},
        "federation": {"evaluate_every": 1},  # its default
    }
    robust = {"aggregation": {"method": "ffa", "rule": "median", "num_byzantine": 1}}
    made = configuration.from_mapping({**sections, **robust, "privacy": {**privacy, **rest}})
    assert former_sha256s(made)[0] == "5a0b4f39c37bf0ddf8fe87baddadaa53de2f1cf24f694ec1e63b0a86fca5c198"
