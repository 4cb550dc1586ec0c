"""What a recipe fills in, what it leaves to the user, and that the result runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from support.tiny import write_base

from fedslm import config as configuration
from fedslm import simulation, validation
from fedslm.config import Config
from fedslm.config.base import TaskName
from fedslm.config.tasks import TASKS
from fedslm.errors import ConfigError, DataError
from fedslm.inference.evaluation import EvaluationOptions, evaluate, own_rows
from fedslm.inference.trained import load_trained, open_run
from fedslm.privacy.calibration import calibrate
from fedslm.recipes import RECIPES, completed, read_recipe
from fedslm.recipes.facts import base_of, size_class
from fedslm.recipes.table import as_table

MECHANISM = {"delta": 1e-3, "clip_norm": 0.5, "sample_rate": 0.5}


def config_of(source: Path, **sections: dict[str, Any]) -> Config:
    """A config that leaves out everything but what no recipe can know."""
    values: dict[str, dict[str, Any]] = {
        "model": {"base": "demo", "device": "cpu"},
        "data": {"source": str(source), "partition": "natural"},
        "task": {"name": "classification", "max_length": 24},
        "privacy": {"unit": "record", "epsilon": 8.0},
        "federation": {"num_clients": 3},
        "engine": {"workers": 0},
    }
    for section, changes in sections.items():
        values[section] = {**values.get(section, {}), **changes}
    return configuration.from_mapping(values)


def test_a_complete_config_stays(notes: Path) -> None:
    """Without privacy, or with the mechanism set, not one value changes; nothing is read."""
    for privacy in ({"unit": "none"}, {"unit": "record", "epsilon": 8.0, **MECHANISM}):
        config = config_of(notes / "missing").model_copy(
            update={
                "privacy": configuration.section_from(configuration.PrivacyConfig, "privacy", privacy)
            }
        )
        made = completed(config)
        assert made.config is config
        assert (made.recipe, made.text, made.as_json()) == (None, "", {})


def test_an_epsilon_is_never_assumed(notes: Path) -> None:
    """Without epsilon and noise the config stays incomplete, and is refused."""
    config = config_of(notes, privacy={"epsilon": ""})
    assert completed(config).config is config
    with pytest.raises(ConfigError, match=r"privacy\.epsilon"):
        validation.check(config)


def test_features(notes: Path) -> None:
    """All of a classifier's settings, valid, and with the rate that bounds a logit's noise."""
    made = completed(config_of(notes))
    config = made.config
    validation.check(config)
    assert made.recipe is not None
    assert made.recipe.name == "features"
    assert config.task.pooling == "normalized"
    assert config.privacy.sample_rate == 1.0
    assert config.training.batch_size == made.units
    assert config.lora.target_modules == (base_of(config.model).last,)
    # the second source of the rate: the deviation that T noisy steps add to a logit
    width, steps = base_of(config.model).width, config.federation.rounds
    privacy = config.privacy
    assert privacy.epsilon is not None
    assert privacy.delta is not None
    assert privacy.clip_norm is not None
    noise = calibrate(privacy.epsilon, privacy.delta, 1.0, steps)
    momentum = 1 / (1 - config.aggregation.server_momentum)
    if config.aggregation.server_optimizer == "fedavg":
        momentum = 1.0
    each = config.training.learning_rate * momentum * noise * privacy.clip_norm
    each /= config.training.batch_size * math.sqrt(config.federation.num_clients)
    assert each * math.sqrt(width * steps) <= 2.2 * 1.01


def test_little_signal_means_little_noise(notes: Path) -> None:
    """Where noise bounds the rate, the deviation of a logit is its least: 1."""
    made = completed(config_of(notes, privacy={"epsilon": 0.1})).config
    privacy, federation = made.privacy, made.federation
    noise = calibrate(0.1, privacy.delta or 0.0, 1.0, federation.rounds)
    momentum = 1.0
    if made.aggregation.server_optimizer == "fedavgm":
        momentum = 1 / (1 - made.aggregation.server_momentum)
    each = made.training.learning_rate * momentum * noise * (privacy.clip_norm or 0.0)
    each /= made.training.batch_size * math.sqrt(federation.num_clients)
    deviation = each * math.sqrt(base_of(made.model).width * federation.rounds)
    assert deviation == pytest.approx(1.0, rel=0.02)


def test_own_values_win_and_are_said(notes: Path) -> None:
    """A key that the user sets keeps its value, and the text names it; derived values follow it."""
    tight = {"epsilon": 0.1}  # so that noise bounds the rate, not the number of classes
    own = {"federation": {"rounds": 3}, "privacy": {"delta": 1e-5, **tight}, "lora": {"rank": 4}}
    made = completed(config_of(notes, **own))
    assert (made.config.federation.rounds, made.config.privacy.delta) == (3, 1e-5)
    assert made.own == {"federation.rounds": 3, "privacy.delta": 1e-5, "lora.rank": 4}
    assert "federation.rounds = 3 (your own value)" in made.text
    other = completed(config_of(notes, privacy=tight)).config
    # noise bounds rate times rounds, so fewer rounds take larger steps
    assert made.config.training.learning_rate > other.training.learning_rate
    assert completed(made.config).config is made.config  # nothing is left to complete


def test_a_public_size_replaces_a_look_at_the_data(notes: Path) -> None:
    """units_per_client wins over the data's own size; real nodes must give it."""
    made = completed(config_of(notes, privacy={"units_per_client": 700}))
    assert (made.units, made.config.training.batch_size) == (700, 700)
    assert made.config.privacy.delta == 1e-4
    deployed = config_of(notes, engine={"name": "deployed", "workers": -1})
    with pytest.raises(ConfigError, match=r"privacy\.units_per_client.*public estimate"):
        completed(deployed)


def test_users_are_counted(notes: Path) -> None:
    """With users as units, a client's size is its number of users, and a user's records are bounded."""
    records = completed(config_of(notes)).units
    made = completed(config_of(notes, privacy={"unit": "user", "unit_column": "patient"}))
    assert made.units < records
    assert made.config.privacy.max_records_per_unit == 8
    validation.check(made.config)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_a_recipe(task: TaskName, notes: Path, tmp_path: Path) -> None:
    """Whatever the task, a config without a mechanism becomes one that is valid."""
    family = {"decoder": "llama", "encoder-decoder": "t5"}.get(TASKS[task].network, "bert")
    base = write_base(tmp_path / "base", family, task)
    data = {"rejected_column": "worse"} if TASKS[task].has_rejected else {}
    labels = {"labels": ["O", "B-heart"]} if TASKS[task].classes != "none" else {}
    config = config_of(
        notes,
        model={"base": str(base), "device": "cpu"},
        data={**data, **({"label_column": ""} if task == "causal-lm" else {})},
        task={"name": task, **labels},
        privacy={"units_per_client": 100},
    )
    made = completed(config)
    validation.check(made.config)
    assert made.recipe is not None
    assert task in made.recipe.tasks


def test_recipes_are_data() -> None:
    """Names are unique, each has its evidence, and each value is a key of the config."""
    assert len({recipe.name for recipe in RECIPES}) == len(RECIPES)
    for recipe in RECIPES:
        assert recipe.evidence
        for key in recipe.values:
            section, _, name = key.partition(".")
            kind = Config.model_fields[section].annotation
            assert kind is not None
            assert name in kind.model_fields, key


def test_a_size_class_hides_one_unit() -> None:
    """One unit more or less changes nothing but at the borders, of which there are six a decade."""
    borders = [n for n in range(1, 100_000) if size_class(n) != size_class(n + 1)]
    assert len(borders) <= 6 * 5
    for units in (1, 7, 231, 99_999):
        assert 0.5 < size_class(units) / units < 2


def test_a_run_completes_itself(notes: Path, tmp_path: Path) -> None:
    """A run says in its directory and report what the recipe chose; it learns, and resumes as itself."""
    config = config_of(
        notes, run={"name": "own", "directory": str(tmp_path / "run")}, federation={"rounds": 2}
    )
    report = simulation.simulate(config)
    assert report["stopped"] == ""
    told = read_recipe(tmp_path / "run")
    assert report["recipe"] == told
    assert told["name"] == "features"
    assert told["own"] == {"federation.rounds": 2}
    assert "## Recipe" in (tmp_path / "run" / "report.md").read_text()
    assert told["counted"]
    assert (
        "not covered by ε: the size class" in (tmp_path / "run" / "adapter" / "README.md").read_text()
    )
    assert simulation.finished(tmp_path / "run", config) is not None
    assert 0 < report["epsilon"] <= 8.0


def test_the_page_has_the_table() -> None:
    """docs/recipes.md shows the recipes as they are."""
    page = Path(__file__).parents[2] / "docs" / "recipes.md"
    assert as_table() in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "own",
    [
        {"task": {"pooling": "mean"}},
        {"task": {"pooling": "native"}},
        {"aggregation": {"method": "flexlora"}},
        {"aggregation": {"method": "fed-sb"}},
        {"aggregation": {"method": "auto"}},
        {"aggregation": {"method": "ffa"}, "lora": {"client_ranks": [2, 4]}},
        {"training": {"optimizer": "adamw", "local_steps": 5}},
        {"privacy": {"epsilon": "", "noise_multiplier": 3.0}},
        {"privacy": {"sample_rate": 0.1}},
        {"federation": {"clients_per_round": 2}},
    ],
    ids=str,
)
def test_a_recipe_never_contradicts_its_user(notes: Path, own: dict[str, dict[str, Any]]) -> None:
    """Whatever the user sets, what the recipe adds is valid next to it."""
    task = {"max_length": 24, **own.pop("task", {})}
    config = config_of(notes, task=task, **own)
    if own.get("privacy", {}).get("noise_multiplier"):
        config = config_of(notes, privacy={"noise_multiplier": 3.0, "epsilon": 50.0})
    validation.check(completed(config).config)


def test_another_kind_of_base_is_said(notes: Path, tmp_path: Path) -> None:
    """The nearest recipe is used for a decoder, and the text says what it was measured on."""
    base = write_base(tmp_path / "base", "llama", "classification")
    made = completed(config_of(notes, model={"base": str(base), "device": "cpu"}))
    assert "this base is not an encoder" in made.text
    assert "not an encoder" not in completed(config_of(notes)).text


def test_a_step_has_the_size_that_the_user_sets(notes: Path) -> None:
    """The sample rate follows a batch size of the user's own: the divisor stays what a step draws."""
    made = completed(config_of(notes, training={"batch_size": 5}))
    assert made.config.privacy.sample_rate == pytest.approx(5 / made.units)
    other = completed(config_of(notes, aggregation={"method": "auto"}))
    assert other.config.aggregation.method == "head"


def test_a_rate_is_derived_only_for_what_it_was_derived_for(notes: Path) -> None:
    """AdamW, or an adaptive server, keeps the default rate, and the text says so."""
    for own in ({"training": {"optimizer": "adamw"}}, {"aggregation": {"server_optimizer": "fedadam"}}):
        made = completed(config_of(notes, **own))
        assert "training.learning_rate" not in made.chosen
        assert "training.learning_rate is left to you" in made.text


def test_a_counted_size_is_said_not_to_be_covered(notes: Path) -> None:
    """Where the size comes from the private split, the text and the report say that ε omits it."""
    assert "epsilon does not cover" in completed(config_of(notes)).text
    given = completed(config_of(notes, privacy={"units_per_client": 20}))
    assert "does not cover" not in given.text
    with pytest.raises(ConfigError, match="units_per_client"):
        completed(config_of(notes), deployed=True)  # `fedslm server run`, before engine.name is set


def test_the_rate_counts_what_a_metric_takes_of_the_budget(notes: Path) -> None:
    """A metric leaves less for training, so more noise and a smaller rate."""
    tight = {"epsilon": 0.1, "units_per_client": 20}
    plain = completed(config_of(notes, privacy=tight)).config
    metric = completed(config_of(notes, privacy={**tight, "metric_noise_multiplier": 300.0})).config
    assert metric.training.learning_rate < plain.training.learning_rate


def test_public_records_start_the_head(notes: Path, tmp_path: Path) -> None:
    """With public records the recipe fits the first head to them, and an evaluation finds it again."""
    data = {"source": str(notes), "partition": "natural", "public_split": "public"}
    (notes / "public.jsonl").write_text((notes / "train.jsonl").read_text(), encoding="utf-8")
    directory = tmp_path / "run"
    config = config_of(
        notes, run={"name": "own", "directory": str(directory)}, data=data, federation={"rounds": 1}
    )
    report = simulation.simulate(config)
    assert report["recipe"]["chosen"]["task.head"] == "public"
    trained = load_trained(open_run(directory))
    found = evaluate(trained, own_rows(trained.run), lambda _done, _total: None, EvaluationOptions())
    before = found.metrics["loss"].base.value
    assert before == pytest.approx(report["metrics_before"]["loss"], rel=1e-3)
    (directory / "data" / "public.parquet").unlink()
    with pytest.raises(DataError, match=r"public\.parquet is not there"):
        evaluate(
            load_trained(open_run(directory)),
            own_rows(trained.run),
            lambda *_: None,
            EvaluationOptions(),
        )


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ({"head": "public"}, "needs public records: set data.public_split"),
        ({"head": "public", "pooling": "mean"}, "needs task.name"),
    ],
)
def test_a_start_without_what_it_needs(notes: Path, head: dict[str, Any], said: str) -> None:
    """A head from public records needs those records and normalized features."""
    task = {"name": "classification", "max_length": 24, "pooling": "normalized", **head}
    with pytest.raises(ConfigError, match=said):
        validation.check(completed(config_of(notes, task=task)).config)
