"""The search on public records: what it reads, how it continues, and what it concludes."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.commands import assert_clear, run
from support.tiny import make_rows, write_rows

from fedslm import config as configuration
from fedslm import validation
from fedslm.config import Config
from fedslm.data.sources import load
from fedslm.errors import ConfigError, DataError, FedslmError, Unusable
from fedslm.recipes import RECIPES, completed
from fedslm.tuning import outcome, public
from fedslm.tuning.search import Options, Result, Trial, search
from fedslm.tuning.setting import noise_of, prepared, trial_config
from fedslm.tuning.space import SPACES, candidates, keys_of

RATE = "training.learning_rate"


def values_of(public_file: Path, **sections: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A private config whose private and evaluation records are not on this machine."""
    values: dict[str, dict[str, Any]] = {
        "model": {"base": "demo", "device": "cpu"},
        "data": {"source": "/not/here", "public_source": str(public_file)},
        "task": {"name": "classification", "max_length": 24},
        "privacy": {"unit": "record", "epsilon": 8.0, "units_per_client": 20},
        "federation": {"num_clients": 2, "rounds": 2},
        "engine": {"workers": 0},
    }
    for section, changes in sections.items():
        values[section] = {**values.get(section, {}), **changes}
    return values


def config_of(public_file: Path, **sections: dict[str, Any]) -> Config:
    """The same as a config."""
    return configuration.from_mapping(values_of(public_file, **sections))


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of public records."""
    path = tmp_path_factory.mktemp("public") / "public.jsonl"
    write_rows(path, make_rows(45, 5))
    return path


@pytest.fixture(scope="module")
def searched(records: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two finished trials, the second by a second call; tests copy it."""
    directory = tmp_path_factory.mktemp("searched") / "tune"
    config = config_of(records)
    first: list[Trial] = []
    search(config, Options(directory, trials=1, on_trial=first.append))
    lines = (directory / "trials.jsonl").read_text()
    assert [(each.number, each.again) for each in first] == [(0, False)]
    (directory / "trials" / "0001" / "data").mkdir(parents=True)  # as a crash leaves it
    second: list[Trial] = []
    search(config, Options(directory, minutes=5, trials=2, on_trial=second.append))
    assert (directory / "trials.jsonl").read_text().startswith(lines)
    assert (second[0].number, second[0].again) == (1, False)
    assert not [path for path in (directory / "trials").iterdir() if path.is_dir()]
    return directory


def with_trials(directory: Path, right: dict[int, int]) -> Path:
    """Puts trials with made-up scores in place of those that ran: number to right answers of 100."""
    state = json.loads((directory / "tune.json").read_text())
    config = configuration.from_mapping(state["config"]).model_dump()
    axes = SPACES[state["recipe"]]
    own = {key: config[key.partition(".")[0]][key.partition(".")[2]] for key in keys_of(axes)}
    order = candidates(own, axes, seed=0)
    trials = [(number, again, hits) for number, hits in right.items() for again in (False, True)]
    lines = []
    for number, again, hits in trials:
        trial = Trial(number, again, order[number], hits / 100, 1.0, 0.1)
        lines.append(json.dumps({**vars(trial)}) + "\n")
        correct = np.arange(100) < hits
        classes = np.stack([correct, ~correct], axis=1).astype(float)
        name = f"{number:04d}{'-again' if again else ''}.npz"
        scores = {"actual": np.eye(2)[np.zeros(100, int)], "guessed": classes, "right": classes}
        ones = np.ones(100)
        np.savez(
            directory / "trials" / name,
            records=ones,
            correct=correct.astype(float),
            loss=ones,
            **scores,
        )
    (directory / "trials.jsonl").write_text("".join(lines))
    return directory


@pytest.fixture
def concluded(searched: Path, records: Path, tmp_path: Path) -> Callable[[dict[int, int]], Result]:
    """Concludes from made-up trials, without running any."""

    def conclude(right: dict[int, int]) -> Result:
        directory = with_trials(shutil.copytree(searched, tmp_path / "tune"), right)
        ran: list[Trial] = []
        options = Options(directory, trials=len(right), on_trial=ran.append)
        result = search(config_of(records), options)
        assert ran == []
        outcome.write(result, directory, outcome.command(result, Path("my.toml"), ["run.seed=0"]))
        return result

    return conclude


def test_trials_are_on_public_records_only(searched: Path, records: Path) -> None:
    """Where the private records are not even there, trials run, and no record is on both sides."""
    trials = [json.loads(line) for line in (searched / "trials.jsonl").read_text().splitlines()]
    assert all(0 <= each["value"] <= 1 for each in trials)
    train, held_out = (
        load(str(searched / "public"), side)["text"] for side in (public.TRAIN, public.HELD_OUT)
    )
    given = {row["text"] for row in load(str(records), "train")}
    assert set(train).isdisjoint(held_out)
    assert set(train) | set(held_out) <= given
    assert 0.2 < len(set(held_out)) / len(given) < 0.45
    assert not [*searched.rglob("ledger*")]


def test_another_config_is_refused(searched: Path, records: Path, tmp_path: Path) -> None:
    """A directory continues only its own search, and holds nothing else."""
    for changes in ({"federation": {"rounds": 3}}, {"privacy": {"units_per_client": 21}}):
        with pytest.raises(Unusable, match=r"trials of another config .*--directory"):
            search(config_of(records, **changes), Options(searched, trials=2))
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(Unusable, match=r"holds other files; choose another"):
        search(config_of(records), Options(tmp_path, trials=1))


def test_the_best_on_the_held_out_records_wins(
    concluded: Callable[[dict[int, int]], Result], records: Path, tmp_path: Path
) -> None:
    """Its values are the fragment, which completes the config; the command has them too."""
    result = concluded({0: 50, 1: 40, 2: 90, 3: 60})
    assert (result.best.number, result.is_better, result.headline) == (2, True, "accuracy")
    assert [row[0] for row in outcome.rows(result)] == ["2", "3", "0", "1"]
    fragment = tomllib.loads((tmp_path / "tune" / "recipe.toml").read_text())
    dotted = {f"{name}.{key}": value for name, keys in fragment.items() for key, value in keys.items()}
    assert dotted == result.best.values
    merged = configuration.with_overrides(
        values_of(records, task={"labels": ["bone", "heart"]}), dotted
    )
    made = completed(configuration.from_mapping(merged)).config
    validation.check(made)
    assert made.training.learning_rate == result.best.values[RATE]
    assert f"--set {RATE}={result.best.values[RATE]}" in (tmp_path / "tune" / "tune.md").read_text()
    assert "0.5000 in trial 0, 0.9000 in trial 2" in (tmp_path / "tune" / "recipe.toml").read_text()


@pytest.mark.parametrize(
    ("right", "words"),
    [
        ({0: 60, 1: 60, 2: 50}, "no trial is better than trial 0: the recipe's own settings stay"),
        ({0: 60, 1: 61}, "not clearly better"),
        ({0: 60}, "only trial 0 ran"),
    ],
)
def test_own_settings_stay(
    right: dict[int, int],
    words: str,
    concluded: Callable[[dict[int, int]], Result],
    tmp_path: Path,
) -> None:
    """Within the margin nothing is recommended: the fragment is empty, and the command plain."""
    result = concluded(right)
    assert not result.is_better
    assert words in outcome.verdict(result)
    assert tomllib.loads((tmp_path / "tune" / "recipe.toml").read_text()) == {}
    line = outcome.command(result, Path("my.toml"), ["run.seed=0"])
    assert line == "fedslm simulate my.toml --set run.seed=0"


@pytest.mark.parametrize("units", [10, 700, 20_000])
def test_a_step_has_the_noise_of_the_real_run(units: int, records: Path, tmp_path: Path) -> None:
    """Noise over expected signal, and the step's length, are those of the real run, whatever its size."""
    config = config_of(records, privacy={"units_per_client": units}, federation={"rounds": 8})
    setting = prepared(config, tmp_path / "tune")
    sides, real = setting.sides, setting.config
    assert sides.per_client <= units
    trial = trial_config(setting, {}, tmp_path / "trial")
    shown = sides.per_client * sides.copies
    assert shown <= units * (1 + 1 / sides.per_client)
    assert trial.privacy.noise_multiplier is not None
    assert min(shown, units) / trial.privacy.noise_multiplier == pytest.approx(units / noise_of(real))
    expected = shown / trial.training.batch_size
    assert expected == pytest.approx(units / real.training.batch_size, rel=0.1)
    assert trial.privacy.sample_rate == real.privacy.sample_rate
    validation.check(trial)
    assert any(f"stand in for {units}" in note for note in setting.notes()) == (units > 15)


def test_a_user_is_on_one_side(records: Path, tmp_path: Path) -> None:
    """With users as units, no user's records are on both sides, or at two clients."""
    config = config_of(records, privacy={"unit": "user", "unit_column": "patient"})
    setting = prepared(config, tmp_path)
    train = load(str(tmp_path / "public"), public.TRAIN)
    held_out = load(str(tmp_path / "public"), public.HELD_OUT)
    assert set(train["patient"]).isdisjoint(held_out["patient"])
    places = set(zip(train[public.UNIT], train[public.CLIENT], strict=True))
    assert len(places) == len(set(train[public.UNIT])) == setting.sides.trained * setting.sides.copies
    assert trial_config(setting, {}, tmp_path / "t").privacy.unit_column == public.UNIT


def test_what_cannot_be_searched(notes: Path, tmp_path: Path) -> None:
    """Without public records, privacy or a public size; and the private and evaluation splits."""
    cases: list[tuple[type[FedslmError], str, dict[str, dict[str, Any]]]] = [
        (ConfigError, r"data\.public_source: is missing.*--public", {"data": {"public_source": ""}}),
        (ConfigError, r"privacy\.unit: value", {"privacy": {"unit": "none"}}),
        (ConfigError, r"privacy\.units_per_client: is required", {"privacy": {"units_per_client": ""}}),
        (DataError, "is the private training split", {"data": {"source": str(notes / "train.jsonl")}}),
        (DataError, "is the evaluation split", {"data": {"evaluation_source": str(notes)}}),
        (
            ConfigError,
            r"task\.head: value .public.*cannot also start",
            {"task": {"head": "public", "pooling": "normalized"}},
        ),
        (DataError, "too few for federation.num_clients=80", {"federation": {"num_clients": 80}}),
    ]
    for kind, words, changes in cases:
        name = "test.jsonl" if "evaluation" in words else "train.jsonl"
        with pytest.raises(kind, match=words):
            search(config_of(notes / name, **changes), Options(tmp_path / "tune"))
    assert not (tmp_path / "tune" / "tune.json").exists()


def test_files_of_others_are_not_opened(records: Path, tmp_path: Path) -> None:
    """Private and evaluation records that nobody could read stop nothing."""
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_bytes(b"\xff not a record")
        with pytest.raises(DataError):
            load(str(tmp_path), name.removesuffix(".jsonl"))
    setting = prepared(config_of(records, data={"source": str(tmp_path)}), tmp_path / "tune")
    assert setting.labels == ("bone", "heart")


def test_spaces_are_data() -> None:
    """Each recipe has one; trial 0 is its own, no combination comes twice, and no rate is above 1."""
    assert set(SPACES) == {recipe.name for recipe in RECIPES}
    for axes in SPACES.values():
        own = {key: 0.75 if key == "privacy.sample_rate" else 4 for key in keys_of(axes)}
        order = candidates(own, axes, seed=1)
        assert order[0] == own
        assert len({tuple(each.items()) for each in order}) == len(order) > 20
        assert all(each.get("privacy.sample_rate", 0) <= 1 for each in order)
        assert candidates(own, axes, seed=1) == order != candidates(own, axes, seed=2)


def test_the_command(
    searched: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It continues, prints one JSON line or a table, says how to continue, and refuses clearly."""
    directory = with_trials(shutil.copytree(searched, tmp_path / "tune"), {0: 50, 1: 90})
    file = tmp_path / "my.toml"
    values = values_of(records)
    values["data"].pop("public_source")
    lines = (
        f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
        for name, keys in values.items()
    )
    file.write_text("\n".join(lines))
    call = ("tune", str(file), "--directory", str(directory), "--trials", "2")
    given = ("--public", str(records))
    found = run(*call, *given, "--json")
    assert found.exit_code == 0, found.output
    answer = json.loads(found.stdout)
    assert (answer["best_trial"], answer["is_better"], answer["trials"]) == (1, True, 2)
    assert answer["overrides"]
    assert answer["command"].startswith(f"fedslm simulate {file} --set training.learning_rate=")
    table = run(*call, *given).stdout
    assert "not a privacy promise" in table
    assert str(directory / "recipe.toml") in table
    assert_clear(run(*call), "ConfigError", "data.public_source: is missing")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fedslm.tuning.search.search", interrupted)
    stopped = run(*call, *given)
    assert stopped.exit_code == 130
    assert f"continue with: fedslm tune {file} --directory {directory}" in stopped.stderr
