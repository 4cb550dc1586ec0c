"""Tests of the configuration; what no single section can see is in test_validation.py."""

from __future__ import annotations

import json
import math
import tomllib
import typing
from pathlib import Path
from typing import Any

import annotated_types
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from support.tiny import BASE, changed, problems

from fedslm import validation
from fedslm.config import Config, from_flat, from_mapping, from_toml, to_toml, with_overrides
from fedslm.deployment.settings import read_federation, read_node
from fedslm.errors import ConfigError
from fedslm.privacy.policy import EXAMPLE, read_policy

ROOT = Path(__file__).parents[1]
SIMULATIONS = sorted((ROOT / "simulations").rglob("*.toml"))
FIELDS: dict[str, FieldInfo] = {
    f"{section}.{key}": field
    for section, outer in Config.model_fields.items()
    for key, field in typing.cast(Any, outer.annotation).model_fields.items()
}


def _out_of_range() -> list[tuple[str, float, float]]:
    """(key, value just outside, bound) for every bound of every number."""
    cases: list[tuple[str, float, float]] = []
    for key, field in FIELDS.items():
        for bound in field.metadata:
            match bound:
                case annotated_types.Ge(ge=limit):
                    cases.append((key, typing.cast(Any, limit) - 1, typing.cast(Any, limit)))
                case annotated_types.Le(le=limit):
                    cases.append((key, typing.cast(Any, limit) + 1, typing.cast(Any, limit)))
                case annotated_types.Gt(gt=limit):
                    cases.append((key, typing.cast(Any, limit), typing.cast(Any, limit)))
                case annotated_types.Lt(lt=limit):
                    cases.append((key, typing.cast(Any, limit), typing.cast(Any, limit)))
    return cases


def _choices(field: FieldInfo) -> tuple[str, ...]:
    """The choices of a Literal field, else nothing."""
    is_literal = typing.get_origin(field.annotation) is typing.Literal
    return typing.get_args(field.annotation) if is_literal else ()


@pytest.mark.parametrize(("key", "value", "bound"), _out_of_range())
def test_a_number_out_of_range_names_key_value_and_bound(key: str, value: float, bound: float) -> None:
    """Whatever number is out of its range, its error says which, what it was and what is allowed."""
    message = problems(changed((key, value)))[key]
    assert f"value {json.dumps(value)}:" in message
    assert str(bound) in message.split(":", 1)[1]


def test_most_numbers_have_a_bound() -> None:
    """The test above looks at the whole configuration, not at nothing."""
    assert len({key for key, _, _ in _out_of_range()}) >= 25


@pytest.mark.parametrize("key", [key for key, field in FIELDS.items() if _choices(field)])
def test_an_unknown_choice_names_all_choices(key: str) -> None:
    """A word that is not a choice is refused, with the word and every choice."""
    message = problems(changed((key, "nonsense")))[key]
    assert '"nonsense"' in message
    assert all(f"'{choice}'" in message for choice in _choices(FIELDS[key]))


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("privacy.delta", 2, "1/(10·records"),
        ("privacy.epsilon", 0, "1 to 8"),
        ("privacy.epsilon", -1.0, "1 to 8"),
        ("privacy.sample_rate", 1.5, "batch_size /"),
        ("privacy.unit", "hospital", 'use "record", "user" (or "patient")'),
        ("training.local_steps", 0, "10 to 50"),
        ("federation.num_clients", 0, "count the hospitals"),
    ],
)
def test_an_error_says_what_to_do(key: str, value: object, remedy: str) -> None:
    """Where a good value is known, the error names it."""
    assert remedy in problems(changed((key, value)))[key]


@pytest.mark.parametrize(
    "key", ["privacy.epsilon", "privacy.clip_norm", "privacy.noise_multiplier", "lora.alpha"]
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_number_is_infinite_or_nan(key: str, value: object) -> None:
    """NaN and infinity compare oddly, so they never get in."""
    assert "finite" in problems(changed((key, value)))[key]


@pytest.mark.parametrize("key", ["privacy.epsilon", "federation.rounds"])
def test_a_truth_value_is_no_number(key: str) -> None:
    """``epsilon = true`` is a slip and must not mean a budget of 1."""
    assert key in problems(changed((key, True)))


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "5", "often", "", None])
def test_rounds_between_evaluations_are_a_number_or_auto(value: object) -> None:
    """Anything else is one problem, with both ways to write it."""
    with pytest.raises(ConfigError) as caught:
        from_mapping(changed(("federation.evaluate_every", value)))
    (problem,) = caught.value.problems
    assert problem.key == "federation.evaluate_every"
    shown = json.dumps(value)
    assert problem.message == f'value {shown}: should be a whole number >= 1, or "auto"'


@pytest.mark.parametrize("value", ["auto", 1, 7])
def test_rounds_between_evaluations_survive_toml(value: object, tmp_path: Path) -> None:
    """A number and "auto" are written to TOML as they are."""
    config = from_mapping(changed(("federation.evaluate_every", value)))
    assert config.federation.evaluate_every == value
    (tmp_path / "c.toml").write_text(to_toml(config))
    assert from_toml(tmp_path / "c.toml") == config


def test_several_problems_are_reported_at_once() -> None:
    """One run of the check shows everything that is wrong."""
    values = changed(("lora.rank", 0), ("privacy.delta", 2), ("task.nmae", "x"), ("engine.name", "gpu"))
    del values["model"]
    found = problems(values)
    assert set(found) == {"lora.rank", "privacy.delta", "task.nmae", "engine.name", "model"}


def test_the_text_of_the_error_counts_and_lists() -> None:
    """The printed error has one line for each problem."""
    with pytest.raises(ConfigError, match=r"^2 problems in the configuration\n") as caught:
        from_mapping(changed(("lora.rank", 0), ("lora.alpha", 0)))
    assert [line.split(":")[0] for line in str(caught.value).splitlines()[1:]] == [
        "  lora.rank",
        "  lora.alpha",
    ]


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("privacy.epsilonn", "epsilon"),
        ("training.local_step", "local_steps"),
        ("federation.client_per_round", "clients_per_round"),
        ("trainin.local_steps", "training"),
    ],
)
def test_a_misspelt_key_is_refused_with_the_nearest(key: str, meant: str) -> None:
    """No key is ignored silently: a misspelling is an error that names what was meant."""
    found = problems(changed((key, 3)))
    assert any(f"did you mean {meant!r}?" in message for message in found.values())


@pytest.mark.parametrize(
    ("key", "value", "meant"),
    [
        ("aggregation.method", "FFA", "ffa"),
        ("aggregation.method", "fedsb", "fed-sb"),
        ("attack.kind", "signflip", "sign-flip"),
        ("personalization.method", "finetune", "fine-tune"),
    ],
)
def test_a_misspelt_choice_is_refused_once_with_the_nearest(key: str, value: str, meant: str) -> None:
    """One problem, which names what was meant."""
    found = problems(changed((key, value)))
    assert list(found) == [key]
    assert found[key].endswith(f"did you mean {meant!r}?")


def test_a_choice_that_is_like_no_other_gets_no_guess() -> None:
    """In earlier versions "batched" meant the opposite of "isolated", its nearest neighbour."""
    (message,) = problems(changed(("privacy.passes", "batched"))).values()
    assert "'shared', 'fixed' or 'isolated'" in message
    assert "did you mean" not in message


def test_a_key_like_no_other_lists_what_is_known() -> None:
    """Where nothing is near, all keys of the section are listed."""
    assert "known: rank, alpha" in problems(changed(("lora.zzzzzz", 3)))["lora.zzzzzz"]


def test_a_section_that_is_no_section_is_refused() -> None:
    """``model = "demo"`` instead of ``[model]`` is an error of ours."""
    assert "model" in problems({**changed(), "model": "demo"})


def test_a_config_cannot_be_changed() -> None:
    """A run cannot change its own config."""
    with pytest.raises(ValidationError):
        from_mapping(BASE).run.seed = 3  # type: ignore[misc]


_PRINTABLE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x7f"), max_size=12)
_NAMES = st.lists(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters=",\x7f"), min_size=1)
    .map(str.strip)
    .filter(bool),
    max_size=3,
)
_POSITIVE = st.floats(min_value=1e-12, max_value=1e12, allow_nan=False)


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """Any valid config, with texts as odd as they come."""
    return from_mapping(
        changed(
            ("run.seed", draw(st.integers(0, 2**62))),
            ("run.directory", draw(_PRINTABLE)),
            ("model.revision", draw(_PRINTABLE)),
            ("lora.target_modules", draw(_NAMES)),
            ("lora.alpha", draw(_POSITIVE)),
            ("data.source", draw(_PRINTABLE.filter(bool))),
            ("data.text_column", draw(_PRINTABLE)),
            ("data.label_column", draw(_PRINTABLE.filter(bool))),
            ("task.labels", draw(_NAMES)),
            ("training.learning_rate", draw(_POSITIVE)),
            ("privacy.epsilon", draw(st.none() | _POSITIVE)),
            ("privacy.delta", draw(st.none() | st.floats(1e-300, 0.1))),
            ("privacy.unit", draw(st.sampled_from(["record", "patient", "none"]))),
            ("privacy.unit_column", draw(_PRINTABLE)),
            ("privacy.max_records_per_unit", draw(st.none() | st.integers(1, 10**9))),
            ("privacy.overlapping", draw(st.booleans())),
            ("privacy.metric_noise_multiplier", draw(st.none() | _POSITIVE)),
            ("engine.policy", draw(_PRINTABLE)),
            ("federation.clients_per_round", draw(st.none() | st.integers(1, 10**9))),
            ("engine.workers", draw(st.integers(-1, 64))),
        )
    )


@given(config=configs())
@settings(max_examples=60, deadline=None)
def test_toml_round_trip(config: Config) -> None:
    """What is written as TOML reads back as the same config."""
    assert from_mapping(tomllib.loads(to_toml(config))) == config


def test_toml_round_trip_of_an_absent_value() -> None:
    """A value that is absent on purpose stays absent, also where the default is another."""
    config = from_mapping(changed(("task.name", "causal-lm"), ("data.label_column", "")))
    assert config.data.label_column is None
    assert from_mapping(tomllib.loads(to_toml(config))) == config


def test_flat_round_trip_of_an_absent_value() -> None:
    """The same for Flower's flat form."""
    config = from_mapping(changed(("task.name", "causal-lm"), ("data.label_column", "")))
    assert from_flat(config.flat()) == config


def test_toml_round_trip_of_a_delete_character() -> None:
    """U+007F is legal in JSON text but not in TOML: it needs an escape."""
    config = from_mapping(changed(("data.text_column", "note\x7f")))
    assert from_mapping(tomllib.loads(to_toml(config))) == config


@given(config=configs())
@settings(max_examples=60, deadline=None)
def test_flat_round_trip(config: Config) -> None:
    """Flower's flat run config carries the whole config, in scalars only."""
    flat = config.flat()
    assert set(flat) == set(FIELDS)
    assert all(isinstance(value, str | int | float | bool) for value in flat.values())
    assert from_flat(flat) == config


def test_a_class_name_with_a_comma_is_not_split_silently() -> None:
    """The flat form separates names by commas: such a name survives or is refused."""
    labels = ("chest pain, acute", "other")
    try:
        config = from_mapping(changed(("task.labels", list(labels))))
        again = from_flat(config.flat())
    except ConfigError:
        return
    assert again.task.labels == labels


def test_flat_keys_without_a_section_are_refused() -> None:
    """A flat key must be dotted."""
    with pytest.raises(ConfigError, match="rounds: is not known"):
        from_flat({**from_mapping(BASE).flat(), "rounds": 3})


def test_the_flower_app_offers_every_key() -> None:
    """``flwr run -c`` overrides only keys that exist: pyproject.toml has them all, and is valid."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    nested = project["tool"]["flwr"]["app"]["config"]
    flat = {f"{section}.{key}": value for section in nested for key, value in nested[section].items()}
    config = from_flat(flat)
    assert list(flat) == list(config.flat())
    validation.check(config)


def test_overrides_are_toml_or_else_text() -> None:
    """Numbers, lists and quoted text are read as TOML; anything else is text."""
    overrides = [
        "training.local_steps=20",
        "privacy.epsilon = 2.5",
        'task.labels=["a", "b"]',
        'run.name="quoted"',
        "data.text_column=a=b",
        "lora.target_modules=query,value",
        "attack.kind=nan",
        "attack.trigger=2026-11-25",
    ]
    config = from_mapping(with_overrides(BASE, overrides))
    assert (config.attack.kind, config.attack.trigger) == ("nan", "2026-11-25")
    assert (config.training.local_steps, config.privacy.epsilon) == (20, 2.5)
    assert (config.task.labels, config.run.name) == (("a", "b"), "quoted")
    assert config.data.text_column == "a=b"
    assert config.lora.target_modules == ("query", "value")


def test_the_last_override_counts_and_the_values_stay() -> None:
    """Overrides apply in order, to a copy."""
    before = json.dumps(BASE)
    merged = with_overrides(BASE, ["privacy.epsilon=1", "privacy.epsilon=2"])
    assert merged["privacy"]["epsilon"] == 2
    assert json.dumps(BASE) == before


@pytest.mark.parametrize("override", ["rounds=3", "federation.rounds", "=3", "federation.=3", ""])
def test_an_override_without_section_key_or_value_is_refused(override: str) -> None:
    """An override that is not section.key=value is an error that shows one."""
    with pytest.raises(ConfigError, match=r"training\.local_steps=20"):
        with_overrides(BASE, [override])


def test_an_override_of_an_unknown_key_is_refused() -> None:
    """Overrides are as strict as the file."""
    with pytest.raises(ConfigError, match="did you mean 'rounds'"):
        from_mapping(with_overrides(BASE, ["federation.round=3"]))


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), (b"[run\n", "cannot be read as TOML"), (b"\xff\xfe", "cannot be read")],
)
def test_an_unreadable_file_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    """A file that is missing, is no TOML or is no text gives an error with its path."""
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        from_toml(path)
    assert str(path) in str(caught.value)


def test_a_byte_order_mark_is_left_out(tmp_path: Path) -> None:
    """A file that an editor on Windows wrote is read as any other: a config, and the files of a deployment."""
    path = tmp_path / "run.toml"
    path.write_text(to_toml(from_mapping(BASE)), encoding="utf-8-sig")
    assert from_toml(path) == from_mapping(BASE)
    (tmp_path / "federation.toml").write_text('name = "f"\nhost = "h"\n', encoding="utf-8-sig")
    assert read_federation(tmp_path).host == "h"
    (tmp_path / "node.toml").write_text('name = "n"\nsource = "s"\n', encoding="utf-8-sig")
    assert read_node(tmp_path).source == "s"
    (tmp_path / "policy.toml").write_text(EXAMPLE, encoding="utf-8-sig")
    assert read_policy(tmp_path / "policy.toml").unit == "user"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "metrics_port = 0",
            "node.toml: metrics_port: value 0: should be greater than or equal to 1; meaning: ",
        ),
        ("thread = 2", "node.toml: thread: is not known; did you mean 'threads'?"),
        ('profile = "fone"', "did you mean 'phone'?; meaning: Kind of machine"),
        ("[conditions]\nhour = 2", "node.toml: conditions.hour: is not known; did you mean 'hours'?"),
    ],
)
def test_files_of_a_deployment_are_explained_as_a_config_is(
    tmp_path: Path, line: str, message: str
) -> None:
    """File, dotted key, value, bound, meaning, and the nearest key or value."""
    (tmp_path / "node.toml").write_text(f'name = "n"\nsource = "s"\n{line}\n')
    with pytest.raises(ConfigError) as caught:
        read_node(tmp_path)
    assert message in str(caught.value)


def test_a_directory_is_no_config(tmp_path: Path) -> None:
    """A directory instead of a file gives an error of ours."""
    with pytest.raises(ConfigError, match="cannot be read"):
        from_toml(tmp_path)


def _other(field: FieldInfo, value: Any) -> Any:
    """A value that differs."""
    if len(choices := _choices(field)) == 1:
        pytest.skip("this key has one value only")
    if choices:
        return next(choice for choice in reversed(choices) if choice != value)
    match value:
        case bool():
            return not value
        case None:
            return "x" if "str" in str(field.annotation) else 3
        case str():
            return f"{value}x"
        case tuple():
            return (*value, "z")
        case _:
            return value + 1


@pytest.mark.parametrize("key", list(FIELDS))
def test_the_hash_covers_what_determines_the_result(key: str) -> None:
    """Every field changes the hash, but for where the run computes and what it is called.

    What becomes of the adapter afterwards does not change it, unless the small model learns back. How a
    sum is formed counts where clients share the noise.
    """
    config = from_mapping(BASE).resolved()
    section, name = key.split(".")
    if section == "secure_aggregation":
        privacy = config.privacy.model_copy(update={"noise": "distributed"})
        config = config.model_copy(update={"privacy": privacy})
    part = getattr(config, section)
    other = part.model_copy(update={name: _other(FIELDS[key], getattr(part, name))})
    unhashed = ("run.name", "run.directory", "privacy.units_per_client")
    ignored = section == "engine" or key in unhashed
    afterwards = section == "distill" and name != "mutual_steps"
    same = config.model_copy(update={section: other}).sha256() == config.sha256()
    assert same is (ignored or afterwards)
    if afterwards:
        back, backs = (
            config.model_copy(update={section: each.model_copy(update={"mutual_steps": 2})})
            for each in (part, other)
        )
        assert back.sha256() != backs.sha256()


@pytest.mark.parametrize(("unit", "method"), [("record", "ffa"), ("none", "fedit")])
def test_resolving_replaces_auto(unit: str, method: str) -> None:
    """Method "auto" becomes ffa under privacy and fedit without, and the hash does not notice."""
    config = from_mapping(changed(("privacy.unit", unit)))
    resolved = config.resolved()
    assert resolved.aggregation.method == method
    assert resolved.resolved() == resolved
    assert resolved.sha256() == config.sha256()


@pytest.mark.parametrize(
    ("unit", "passes", "dtype", "expected"),
    [
        ("record", "shared", "auto", "float32"),
        ("record", "fixed", "auto", "auto"),
        ("none", "shared", "auto", "auto"),
        ("record", "fixed", "bfloat16", "bfloat16"),
    ],
)
def test_shared_passes_are_float32(unit: str, passes: str, dtype: str, expected: str) -> None:
    """Each machine decides what "auto" means, unless units share passes; what was named stays."""
    values = (("privacy.unit", unit), ("privacy.passes", passes), ("model.dtype", dtype))
    config = from_mapping(changed(*values))
    assert config.resolved().model.dtype == expected
    assert config.resolved().sha256() == config.sha256()


@pytest.mark.parametrize("method", ["fedit", "ffa"])
def test_resolving_keeps_a_choice(method: str) -> None:
    """A method that was named stays."""
    config = from_mapping(changed(("aggregation.method", method)))
    assert config.resolved().aggregation == config.aggregation


def test_a_starts_from_public_records_only_where_asked() -> None:
    """Public records alone change nothing: what EVA needs (a lower alpha) is not what the seeded start needs."""
    config = from_mapping(changed(("data.public_split", "public"), ("aggregation.method", "ffa")))
    assert config.resolved().lora.initial == "orthonormal"


def test_ranks_are_written_in_three_ways() -> None:
    """A list, Flower's text, or one number; what is no whole number is refused by its key."""
    for value in ([4, 8], "4, 8"):
        config = from_mapping(changed(("lora.client_ranks", value)))
        assert config.lora.client_ranks == (4, 8)
        assert from_flat(config.flat()).lora.client_ranks == (4, 8)
    assert from_mapping(changed(("lora.client_ranks", 4))).lora.client_ranks == (4,)
    for value in ("4, x", [4, 0], [4.5]):
        with pytest.raises(ConfigError, match=r"lora\.client_ranks"):
            from_mapping(changed(("lora.client_ranks", value)))


@pytest.mark.parametrize("path", SIMULATIONS, ids=lambda path: path.name)
def test_the_simulations_are_valid(path: Path) -> None:
    """Every config that is shipped can be used and raises no warning."""
    config = from_toml(path)
    validation.check(config)
    assert validation.warnings(config) == []


def test_there_are_simulations() -> None:
    """The test above looks at something."""
    assert SIMULATIONS


@pytest.mark.parametrize("word", ["user", "patient"])
def test_a_patient_is_a_user(word: str) -> None:
    """Both words are one unit: the config, its hash and its TOML are the same."""
    of = {"unit": word, "unit_column": "who", "max_records_per_unit": 2}
    made = from_mapping({**BASE, "privacy": {**BASE["privacy"], **of}})
    assert made.privacy.unit == "user"
    assert 'unit = "user"' in to_toml(made)


def test_a_key_of_an_earlier_version_has_one_clear_line() -> None:
    """The error names the new key; nothing is guessed."""
    (found,) = problems(changed(("aggregation.hostile", 1))).items()
    assert found == ("aggregation.hostile", "was renamed: write aggregation.num_byzantine")
