"""Tests of training on one data set, from Python and by ``fedslm train``: the same run, with one client."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from support.commands import assert_clear, run
from support.tiny import make_rows

import fedslm
from fedslm.api.single import ARGUMENTS
from fedslm.cli.train import OPTIONS
from fedslm.config import from_toml
from fedslm.errors import ConfigError

TRAIN, PUBLIC = make_rows(90, 0), make_rows(40, 1)
SMALL: dict[str, Any] = {"federation.rounds": 1, "engine.workers": 0, "task.max_length": 24}
SET = [part for key, value in SMALL.items() for part in ("--set", f"{key}={value}")]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with notes.csv and public.csv."""
    directory = tmp_path_factory.mktemp("csv")
    pd.DataFrame(TRAIN).to_csv(directory / "notes.csv", index=False)
    pd.DataFrame(PUBLIC).to_csv(directory / "public.csv", index=False)
    return directory


@pytest.fixture(scope="module")
def trained(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the command, for one patient."""
    directory = tmp_path_factory.mktemp("train") / "run"
    done = run(
        *("train", str(files / "notes.csv"), "--unit", "patient", "--epsilon", "3", "--base", "demo"),
        *("--evaluation", str(files / "public.csv"), "--output", str(directory), "--json", *SET),
    )
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["directory"] == str(directory)
    return directory


def test_the_command_trains_for_one_person(trained: Path) -> None:
    """The guarantee is that of the wish: report, card, ledger and audit are those of any run."""
    result = fedslm.resume(trained)
    assert 0 < result.epsilon <= 3
    assert (result.report["plan"]["unit"], len(result.report["clients"])) == ("user", 1)
    assert "patient" in (trained / "train.toml").read_text()
    assert "ε" in (trained / "adapter" / "README.md").read_text()
    assert result.audit(empirical=False)["findings"] == []


def test_its_config_is_short_and_runs_again(trained: Path, tmp_path: Path) -> None:
    """It names what was chosen and no more, and it is a config."""
    again = from_toml(trained / "train.toml", {"run.directory": str(tmp_path / "again")})
    assert again.privacy.model_dump(exclude_unset=True) == {
        "unit": "user",
        "unit_column": "patient",
        "epsilon": 3.0,
    }
    assert again.federation.num_clients == 1
    assert "clip_norm" not in (trained / "train.toml").read_text()
    first = from_toml(trained / "config.toml")
    again = fedslm.Config(**again.model_dump(exclude_unset=True))
    shown = run("config", "show", str(trained / "train.toml"))
    assert shown.exit_code == 0
    assert f"learning_rate = {first.training.learning_rate}" in shown.stdout


def test_memory_and_file_are_the_same_run(files: Path, tmp_path: Path, trained: Path) -> None:
    """From a frame the recipe chooses what it chose for the file."""
    result = fedslm.train(
        pd.DataFrame(TRAIN),
        base="demo",
        epsilon=3,
        unit="patient",
        evaluation=PUBLIC,
        directory=tmp_path / "run",
        overrides=SMALL,
    )
    expected = fedslm.resume(trained)
    assert result.report["recipe"] == expected.report["recipe"]
    assert (result.epsilon, result.delta) == (expected.epsilon, expected.delta)
    page = (tmp_path / "run" / "train.toml").read_text()
    assert "delete data/ when you are done" in page


def test_holdout_divides_people(files: Path, tmp_path: Path) -> None:
    """No person is on both sides, nobody else can read them, and the records of both are all records."""
    result = fedslm.train(
        files / "notes.csv",
        base="demo",
        epsilon=3,
        unit="patient",
        holdout=0.2,
        directory=tmp_path / "run",
        overrides=SMALL,
    )
    folder = result.directory / "data" / "given"
    sides = {each.stem: pd.read_parquet(each) for each in folder.glob("*.parquet")}
    people = {name: set(rows["patient"]) for name, rows in sides.items()}
    assert set(sides) == {"train", "test"}
    assert people["train"].isdisjoint(people["test"])
    assert sum(map(len, sides.values())) == len(TRAIN)
    assert set(sides["train"].columns) == {"text", "label", "patient"}
    assert all(stat.S_IMODE(each.stat().st_mode) == 0o600 for each in folder.iterdir())


BAD = [
    ({"epsilon": None}, "epsilon: is required"),
    ({"evaluation": None}, "evaluation: is missing: give public records"),
    ({"holdout": 0.1}, "holdout: is set together with evaluation"),
    ({"evaluation": None, "holdout": 1.0}, r"holdout: value 1.0 must be in \(0, 1\)"),
    ({"unit": "none"}, "unit: value 'none': give \"record\", or the column"),
    ({"unit": "person"}, r"train: has no column 'person' \(privacy.unit_column\); it has text, label"),
    ({"text": "note"}, r"train: has no column 'note' \(data.text_column\)"),
    ({"task": "clasification"}, "did you mean 'classification'"),
    ({"base": None}, "base: is required: a hub name, a directory, or a loaded pair"),
    ({"base": 3}, "base: value of type int: should be a hub name"),
    ({"base": ("model", "tokenizer")}, "base: has a str where its transformers model should be"),
    ({"epsilon": -1}, "privacy.epsilon"),
    ({"train": {"a": TRAIN}}, "train: is a mapping; for several clients use fedslm.simulate"),
    ({"train": (row for row in TRAIN)}, "it can be read only once"),
    ({"train": PUBLIC}, "evaluation: is train itself"),
    ({"overrides": {"federation.num_clients": 5}}, "federation.num_clients: is for several clients"),
    ({"overrides": {"data.partition": "iid"}}, "data.partition: is for several clients"),
    ({"overrides": {"attack.clients": 1}}, "attack.clients: is for several clients"),
    ({"overrides": {"privacy.unit": "none"}}, "privacy.unit: is set by the argument unit"),
    ({"overrides": ["a.b=1"]}, "overrides: value of type list"),
]


@pytest.mark.parametrize(("changes", "part"), BAD, ids=lambda value: str(value)[:40])
def test_a_wrong_argument_is_named(tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    """With its remedy, and nothing is left."""
    given = {"train": TRAIN, "base": "demo", "epsilon": 3, "evaluation": PUBLIC, **changes}
    with pytest.raises(ConfigError, match=part):
        fedslm.train(given.pop("train"), directory=tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "kind", "parts"),
    [
        (["--evaluation", "{}/public.csv"], "ConfigError", ["--epsilon: is required", "no default"]),
        (["--epsilon", "3"], "ConfigError", ["--evaluation: is missing", "set --holdout=0.1"]),
        (
            ["--epsilon", "3", "--evaluation", "{}/public.csv", "--text", "note"],
            "DataError",
            ["--text='note' is not a column", "text, label, client"],
        ),
        (
            ["--epsilon", "3", "--evaluation", "{}/public.csv", "--unit", "person"],
            "DataError",
            ["--unit='person' is not a column"],
        ),
        (
            ["--epsilon", "3", "--holdout", "0.2", "--unit", "person"],
            "DataError",
            ["--unit='person' is not a column"],
        ),
        (
            ["--epsilon", "3", "--evaluation", "{}/no.csv"],
            "DataError",
            ["--evaluation='", "/no.csv': no such file or directory"],
        ),
        (
            ["--epsilon", "-3", "--evaluation", "{}/public.csv", "--delta", "4"],
            "ConfigError",
            ["--epsilon: value -3.0", "--delta: value 4.0"],
        ),
        (
            ["--epsilon", "3", "--evaluation", "{}/notes.csv"],
            "DataError",
            ["is the private training split", "set --evaluation"],
        ),
        (
            ["--epsilon", "3", "--holdout", "2", "--unit", "none", "--set", "model.base=x"],
            "ConfigError",
            ["--set model.base: use --base"],
        ),
        (
            ["--epsilon", "3", "--holdout", "2", "--unit", "none"],
            "ConfigError",
            ["--holdout: value 2.0", "--unit: value 'none'"],
        ),
        (
            ["--epsilon", "3", "--holdout", "0.2", "--set", "federation.num_clients=2"],
            "ConfigError",
            ["federation.num_clients: is for several clients"],
        ),
    ],
)
def test_a_wrong_option_is_named(
    files: Path, tmp_path: Path, arguments: list[str], kind: str, parts: list[str]
) -> None:
    """The command says what is missing, which columns there are, and leaves nothing."""
    options = [each.format(files) for each in arguments]
    place = ["--base", "demo", "--output", str(tmp_path / "run")]
    assert_clear(run("train", str(files / "notes.csv"), *place, *options), kind, *parts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["{}/no.csv", "--evaluation", "{}/public.csv"], ["FILE='", "/no.csv': no such file"]),
        (["{}/notes.csv", "--holdout", "0.2", "--base", "./no"], ["--base='./no': no such directory"]),
    ],
)
def test_a_wrong_file_or_base_is_named(
    files: Path, tmp_path: Path, arguments: list[str], parts: list[str]
) -> None:
    """The private file has no option; the base has one."""
    options = [each.format(files) for each in arguments]
    place = ["--epsilon", "3", "--output", str(tmp_path / "run")]
    base = [] if "--base" in options else ["--base", "demo"]
    kind = "ModelError" if "--base" in options else "DataError"
    assert_clear(run("train", *options, *base, *place), kind, *parts)


def test_each_argument_has_its_option() -> None:
    """What `fedslm.train` sets in a config has an option by which the command's errors call it."""
    assert set(ARGUMENTS) <= set(OPTIONS)
    options = {option for option in OPTIONS.values() if option != "FILE"}
    help_page = run("train", "--help").stdout
    assert {option for option in options if option not in help_page} == set()


def test_the_report_says_what_was_held_out(files: Path, tmp_path: Path) -> None:
    """One person more moves nobody; report and card name the records that epsilon does not cover."""
    directory = tmp_path / "run"
    fedslm.train(
        files / "notes.csv",
        base="demo",
        epsilon=8,
        unit="patient",
        holdout=0.3,
        directory=directory,
        overrides=SMALL,
    )
    assert json.loads((directory / "holdout.json").read_text()) == 0.3
    for page in (directory / "report.md", directory / "adapter" / "README.md"):
        assert "held out of the private file (0.3 of its units)" in page.read_text()


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"overrides": {" privacy.unit": "none"}}, "is set by the argument unit"),
        ({"holdout": "0.1", "evaluation": None}, "must be in"),
        ({"task": ["classification"]}, "should be one of"),
        (
            {"train": [{**row, "record": row["patient"]} for row in TRAIN]},
            "is a column of the data too",
        ),
    ],
    ids=["space", "text", "list", "record"],
)
def test_no_promise_is_lost_quietly(tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    """An override with a space, a share as text, a task as a list, a column named like the unit."""
    wish = {
        "base": "demo",
        "epsilon": 8,
        "evaluation": PUBLIC,
        "directory": tmp_path / "run",
        **changes,
    }
    records = wish.pop("train", TRAIN)
    with pytest.raises(ConfigError, match=part):
        fedslm.train(records, **wish)
    assert not (tmp_path / "run").exists()
