"""Tests of a base model and of public records that a caller gives to `fedslm.simulate`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.tiny import make_rows
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
)

import fedslm
from fedslm.config import Config
from fedslm.errors import ConfigError

Make = Callable[..., Config]
TRAIN, EVALUATION, PUBLIC = make_rows(60, 0), make_rows(30, 1), make_rows(20, 2)
SMALL = {"federation": {"num_clients": 3, "rounds": 1, "evaluate_every": 1}}


@pytest.fixture(scope="module")
def base(family_directory: Callable[[str, str], Path]) -> Path:
    """A base of random weights."""
    return family_directory("bert", "classification")


@pytest.fixture
def pair(base: Path) -> tuple[Any, Any]:
    """The base and its tokenizer, loaded."""
    return AutoModel.from_pretrained(base), AutoTokenizer.from_pretrained(base)


def config_of(make: Make, directory: Path, **more: Any) -> Config:
    """A tiny run; its adapter is on all layers."""
    return make(directory, lora={"rank": 2, "target_modules": "all-linear"}, **SMALL, **more)


def test_a_loaded_pair_trains_as_its_directory(
    config_in: Make, tmp_path: Path, base: Path, pair: tuple[Any, Any]
) -> None:
    """The same metrics; the caller's model is left in training mode and unchanged, and predictions work."""
    network, tokenizer = pair
    network.train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    result = fedslm.simulate(config_of(config_in, tmp_path / "pair"), model=(network, tokenizer))
    named = fedslm.simulate(config_of(config_in, tmp_path / "named"), model=base)
    assert result.metrics_after == named.metrics_after
    assert result.report["adapter_sha256"] == named.report["adapter_sha256"]
    assert network.training
    assert all(value.equal(before[name]) for name, value in network.state_dict().items())
    assert result.predict(["chest pain"])[0]["label"] in ("heart", "bone")


def one_data_set(directory: Path, base: Any) -> fedslm.RunResult:
    """A tiny run of `fedslm.train`."""
    few = {"federation.rounds": 1, "task.max_length": 24, "engine.workers": 0}
    return fedslm.train(
        TRAIN, base=base, epsilon=3, evaluation=EVALUATION, directory=directory, overrides=few
    )


def test_one_data_set_takes_a_loaded_pair(
    tmp_path: Path, base: Path, pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`fedslm.train` chooses what it chooses for the directory, and leaves the model as it was.

    The pair is in training mode and of half the precision; the config that was written runs again.
    """
    network, tokenizer = pair
    network.train().to(torch.bfloat16)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    result = one_data_set(tmp_path / "pair", (network, tokenizer))
    named = one_data_set(tmp_path / "named", base)
    assert result.report["recipe"] == named.report["recipe"]
    assert 0 < result.epsilon <= 3
    assert result.epsilon == named.epsilon
    assert network.training
    assert all(value.equal(before[name]) for name, value in network.state_dict().items())
    assert result.predict(["chest pain"])[0]["label"] in ("heart", "bone")
    toml = tmp_path / "pair" / "train.toml"
    assert "base/ has the model that was given" in toml.read_text()
    monkeypatch.chdir(tmp_path)
    again = fedslm.simulate(toml, overrides={"run.directory": str(tmp_path / "again")})
    assert again.metrics_before == result.metrics_before


def test_public_records_in_memory_are_those_of_a_file(config_in: Make, tmp_path: Path) -> None:
    """A start from public inputs (lora.initial) is the same from memory as from a file."""
    lora = {"rank": 2, "alpha": 2.0, "target_modules": ["3.output.dense"], "initial": "eva"}
    file = tmp_path / "public.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in PUBLIC))
    found = []
    for name, given in (("file", {"data.public_source": str(file)}), ("memory", {})):
        config = config_in(tmp_path / name, lora=lora, **SMALL)
        records = None if given else PUBLIC
        result = fedslm.simulate(config, overrides=given, public=records)
        found.append(result.report["adapter_sha256"])
    assert found[0] == found[1]
    plain = fedslm.simulate(config_in(tmp_path / "plain", **SMALL))
    assert plain.report["adapter_sha256"] != found[0]


def test_public_records_are_not_the_private_ones(config_in: Make, tmp_path: Path) -> None:
    """The same object, a copy and a generator are refused, and nothing is left."""
    config = config_in(tmp_path / "run", **SMALL)
    cases = [
        (TRAIN, "public: is train itself"),
        ([dict(row) for row in TRAIN], "public: has the records of train, which are private"),
        ((row for row in PUBLIC), "public: .*it can be read only once"),
    ]
    for records, part in cases:
        with pytest.raises(ConfigError, match=part):
            fedslm.simulate(config, train=TRAIN, evaluation=EVALUATION, public=records)
    assert not (tmp_path / "run").exists()


def test_what_is_no_base_is_named(
    config_in: Make, tmp_path: Path, base: Path, pair: tuple[Any, Any]
) -> None:
    """Each with its remedy, and nothing is left."""
    network, tokenizer = pair
    headed = AutoModelForSequenceClassification.from_pretrained(base)
    adapted = get_peft_model(AutoModel.from_pretrained(base), LoraConfig(target_modules="all-linear"))
    with torch.device("meta"):
        empty = BertModel(BertConfig(num_hidden_layers=1))
    cases = [
        (network, "value of type BertModel: should be a hub name, a directory, or"),
        ((tokenizer, network), "where its transformers model should be"),
        ((network, "tokenizer"), "has a str where its transformers tokenizer should be"),
        ((headed, tokenizer), "which has a task's head already: give its base, model.bert"),
        ((adapted, tokenizer), r"holds an adapter: give its merge_and_unload\(\)"),
        ((empty, tokenizer), 'has weights on device "meta"'),
    ]
    for model, part in cases:
        with pytest.raises(ConfigError, match=f"model: .*{part}"):
            fedslm.simulate(config_of(config_in, tmp_path / "run"), model=model)
        with pytest.raises(ConfigError, match=f"base: .*{part}"):
            one_data_set(tmp_path / "run", model)
    assert not (tmp_path / "run").exists()
