"""Tests of what goes with what: every refused combination, told with its reason and what is nearest."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from fedslm import validation
from fedslm.aggregation.compatibility import CONFLICTS, KEYS, choices, conflicts
from fedslm.aggregation.methods import METHODS
from fedslm.config import Config, from_mapping
from fedslm.errors import ConfigError

BASE: dict[str, Any] = {
    "model": {"base": "demo"},
    "data": {"source": "demo"},
    "task": {"name": "classification"},
    "privacy": {"unit": "none"},
    "federation": {"num_clients": 20},
    "aggregation": {"method": "fedit"},
}
PRIVATE = {"unit": "record", "epsilon": 8.0, "delta": 1e-5, "clip_norm": 1.0, "sample_rate": 0.1}
PATIENT = {**PRIVATE, "unit": "user", "unit_column": "p", "max_records_per_unit": 2}
# How a config says what stands on an axis.
SAID: dict[tuple[str, str], dict[str, dict[str, Any]]] = {
    ("unit", "record"): {"privacy": PRIVATE},
    ("unit", "user"): {"privacy": PATIENT},
    ("ranks", "several"): {"lora": {"rank": 8, "client_ranks": [4, 8]}},
    ("share sent", "all"): {},
    ("share sent", "some"): {"compression": {"keep_fraction": 0.5}},
    ("error feedback", "yes"): {"compression": {"error_feedback": True}},
}


def config_with(chosen: dict[str, str]) -> Config:
    """A config that makes these choices."""
    values = {section: dict(content) for section, content in BASE.items()}
    for axis, value in chosen.items():
        said = SAID.get((axis, value))
        if said is None:
            section, key = KEYS[axis].split(".")  # type: ignore[index]
            said = {section: {key: value}}
        for section, content in said.items():
            values[section] = {**values.get(section, {}), **content}
    if chosen.get("rule", "mean") != "mean":
        values["aggregation"]["num_byzantine"] = 1
    return from_mapping(values)


REFUSED = [
    (number, dict(zip(conflict.where, values, strict=True)))
    for number, conflict in enumerate(CONFLICTS)
    for values in itertools.product(*(sorted(each) for each in conflict.where.values()))
]


@pytest.mark.parametrize(
    ("number", "chosen"), REFUSED, ids=[f"{n}-{'-'.join(c.values())}" for n, c in REFUSED]
)
def test_a_refused_combination_names_the_option_and_the_nearest(
    number: int, chosen: dict[str, str]
) -> None:
    """The config is refused at the option to change, with the reason and the nearest valid choice."""
    conflict = CONFLICTS[number]
    with pytest.raises(ConfigError) as caught:
        validation.check(config_with(chosen))
    text = str(caught.value)
    assert KEYS[conflict.axis] in text
    assert conflict.reason in text
    assert conflict.nearest in text


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("privacy", [{"unit": "none"}, PRIVATE, PATIENT], ids=lambda p: p["unit"])
def test_every_method_has_a_valid_place(method: str, privacy: dict[str, Any]) -> None:
    """With one rank, the mean and whole updates every method goes with no, record and patient privacy."""
    values = {**BASE, "privacy": privacy, "aggregation": {"method": method}}
    validation.check(from_mapping(values))


@pytest.mark.parametrize("conflict", CONFLICTS, ids=lambda c: c.axis)
def test_a_conflict_names_things_that_there_are(conflict: Any) -> None:
    """Each row says something, about axes that a config has, and its axis is one of them."""
    assert conflict.axis in conflict.where
    assert conflict.reason
    assert conflict.nearest
    assert all(conflict.where.values())
    if "method" in conflict.where:
        assert conflict.where["method"] <= set(METHODS)


def test_choices_read_the_config() -> None:
    """Every axis follows the config."""
    config = config_with(
        {"method": "ffa", "unit": "record", "ranks": "several", "upload": "int8", "drift": "fedprox"}
    ).resolved()
    found = choices(
        config.lora, config.training, config.privacy, config.aggregation, config.compression
    )
    assert found == {
        "method": "ffa",
        "unit": "record",
        "noise": "local",
        "rule": "mean",
        "weights": "uniform",
        "ranks": "several",
        "server optimizer": "fedavg",
        "drift": "fedprox",
        "local optimizer": "adamw",
        "upload": "int8",
        "share sent": "all",
        "error feedback": "no",
    }
    assert not list(conflicts(found))


@pytest.mark.parametrize(
    ("changes", "key", "reason"),
    [
        ({"lora": {"rank": 4, "client_ranks": [4, 8]}}, "lora.client_ranks", "exceeds lora.rank=4"),
        ({"aggregation": {"num_byzantine": 2}}, "aggregation.num_byzantine", "not the mean"),
        (
            {"aggregation": {"method": "ffa", "rule": "bulyan", "num_byzantine": 5}},
            "aggregation.num_byzantine",
            "needs 23 clients in a round",
        ),
        ({"lora": {"initial": "eva"}}, "lora.initial", "set data.public_split"),
        (
            {"personalization": {"method": "fine-tune"}},
            "data.validation_fraction",
            "is required to measure personalization",
        ),
        ({"attack": {"kind": "nan", "clients": 21}}, "attack.clients", "exceeds"),
        ({"attack": {"kind": "nan"}}, "attack.clients", "contradicts"),
        (
            {"attack": {"kind": "backdoor", "clients": 1}, "task": {"name": "causal-lm"}},
            "attack.kind",
            'is for task.name="classification"',
        ),
        (
            {"attack": {"kind": "scale", "clients": 1}, "privacy": PRIVATE},
            "attack.kind",
            "signed for",
        ),
    ],
)
def test_numbers_that_do_not_fit_are_refused(changes: dict[str, Any], key: str, reason: str) -> None:
    """What is a matter of numbers, not of names, is refused by its option too."""
    with pytest.raises(ConfigError) as caught:
        validation.check(from_mapping({**BASE, **changes}))
    assert key in str(caught.value)
    assert reason in str(caught.value)
