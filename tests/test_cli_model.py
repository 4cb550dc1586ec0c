"""Tests of ``fedslm model info`` and of what ``fedslm config check`` sees of a base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.commands import DEMO, assert_clear, run

from fedslm.aggregation.methods import METHODS
from fedslm.models import footprint
from fedslm.training import probe

DENSE = ["--set", "task.name=causal-lm", "--set", "task.pooling=native", "--set", "data.label_column="]


@pytest.fixture(autouse=True)
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The speed is not looked at here (test_cli_speed.py): it would take most of the time."""
    speed = probe.Speed({probe.Variant("float32"): 2.0, probe.Variant("bfloat16"): 1.0}, 1, 8, "none")
    monkeypatch.setattr(probe, "measure", lambda trial: speed)


def info(*overrides: str) -> dict:
    """The JSON of ``model info`` on the demo scenario with some values replaced."""
    parts = [part for override in overrides for part in ("--set", override)]
    result = run("model", "info", DEMO, *parts, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_info_of_the_embedded_model() -> None:
    """Family, parameters, bytes of a round and of the cohort, by method."""
    found = info("task.labels=a,b,c")
    assert (found["model_type"], found["family"], found["parameters"]) == ("bert", "BERT", 1_033_216)
    assert (found["classes"], found["classes_assumed"]) == (3, False)
    assert found["method"] == "ffa"
    assert found["bytes_up_per_client"] == 4 * found["trained_parameters"]
    assert found["bytes_per_round"] == 2 * 5 * found["bytes_up_per_client"]
    assert found["bytes_by_method"]["ffa"] == found["bytes_up_per_client"]
    assert found["bytes_by_method"]["fedit"] > found["bytes_by_method"]["ffa"]
    assert found["memory_bytes"]["total"] > found["base_bytes"] == 4 * found["parameters"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_size(method: str) -> None:
    """Bytes and memory are told for each method, Fed-SB's cores included."""
    found = info(f"aggregation.method={method}", "task.labels=a,b,c")
    assert found["method"] == method
    assert found["memory_bytes"]["optimizer"] > 0
    if method == "fed-sb":  # 26 layers of 8 x 8 and a head: next to nothing
        assert found["trained_parameters"] < 5_000


def test_bytes_are_those_of_a_real_round(tmp_path: Path) -> None:
    """What is announced for a round is what a run of one round counts, to a hundredth."""
    sets = [
        f"run.directory={tmp_path / 'run'}",
        "privacy.unit=none",
        "engine.workers=0",
        "lora.rank=2",
        "federation.rounds=1",
        "federation.num_clients=2",
        "training.local_steps=1",
        "training.batch_size=2",
    ]
    found = info(*sets, "task.labels=a,b,c,d,e,f")  # as many classes as the demo's data have
    parts = [part for each in sets for part in ("--set", each)]
    result = run("simulate", DEMO, *parts, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    for key in ("bytes_down", "bytes_up"):
        assert report[key] == pytest.approx(found["bytes_per_round"] / 2, rel=0.01)


def test_info_counts_the_classes_of_the_public_split() -> None:
    """Without a list of classes the public split says how many there are, as it does in a run."""
    found = info()
    assert (found["classes"], found["classes_assumed"]) == (6, False)


@pytest.mark.parametrize(
    ("override", "why"),
    [
        (
            "data.source=some-owner/some-data",
            "the public split is not on this machine; set task.labels",
        ),
        ("data.label_column=diagnosis", "data.label_column='diagnosis' is not a column"),
    ],
)
def test_info_for_people_names_a_guess(override: str, why: str) -> None:
    """Where the public split does not say it, or is not here, the number of classes is a guess, and why."""
    options = ("--set", "model.quantization=int4", "--set", override)
    result = run("model", "info", DEMO, *options)
    assert result.exit_code == 0, result.output
    for part in ("BERT, verified", "2, a guess", "int4, computed in float32", "×4", why):
        assert part in result.stdout


def test_records_in_a_pass_keep_every_limit() -> None:
    """The budget of tokens, the limit on records and the batch, without privacy; a pass has one record."""
    own = ("task.labels=a,b,c", "privacy.unit=none", "model.device=cpu", "training.batch_size=40")
    for length, limit, expected in ((128, 32, 4), (16, 32, 32), (8, 64, 40), (128, 3, 3)):
        sets = (*own, f"task.max_length={length}", f"training.micro_batch_size={limit}")
        assert info(*sets)["records_in_a_pass"] == expected
    isolated = info("task.labels=a,b,c", "privacy.passes=isolated")
    assert isolated["records_in_a_pass"] == 1


def test_smaller_bases_are_smaller() -> None:
    """Precision lowers the base, not what is trained."""
    sizes = {kind: info(f"model.quantization={kind}") for kind in ("none", "int8", "int4")}
    assert sizes["int4"]["base_bytes"] < sizes["int8"]["base_bytes"] < sizes["none"]["base_bytes"]
    assert len({found["trained_parameters"] for found in sizes.values()}) == 1


def test_noise_over_too_many_parameters_is_warned_of() -> None:
    """The budget's own arithmetic, with the number of parameters that the base really has."""
    assert info("privacy.epsilon=8")["warnings"] == info("lora.rank=1")["warnings"] == []
    drowned = info("privacy.epsilon=0.3", "lora.rank=64", "federation.num_clients=1")
    assert any(warning.startswith("this will not learn") for warning in drowned["warnings"])


def test_memory_beyond_the_machine_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base larger than what is there."""
    monkeypatch.setattr(footprint, "_HIDDEN_STATES", 10**9)
    assert any("this machine has" in warning for warning in info()["warnings"])


def test_unproved_bases_are_warned_of_or_refused(tmp_path: Path) -> None:
    """OPT runs without privacy, with a warning; under privacy it is refused, also by config check."""
    import transformers

    transformers.OPTConfig(
        hidden_size=32, num_hidden_layers=1, ffn_dim=64, num_attention_heads=2, word_embed_proj_dim=32
    ).save_pretrained(tmp_path)
    base = ["--set", f"model.base={tmp_path}", *DENSE]
    result = run("model", "info", DEMO, *base, "--set", "privacy.unit=none", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["family"] is None
    assert any("not verified" in warning for warning in found["warnings"])
    for command in (("model", "info"), ("config", "check")):
        assert_clear(run(*command, DEMO, *base), "ModelError", "'opt' is not verified", "llama")


def test_a_missing_base_is_a_clear_error(family_directory: Callable[[str, str], Path]) -> None:
    """Not there; or there, and not for this task."""
    result = run("model", "info", DEMO, "--set", "model.base=/no/such")
    assert_clear(result, "ModelError", "no such directory")
    base = f"model.base={family_directory('bert', 'classification')}"
    result = run("model", "info", DEMO, "--set", base, *DENSE)
    assert_clear(result, "ModelError", "reads forwards")


def test_a_base_that_is_a_file_is_refused(tmp_path: Path) -> None:
    """`config check` says so as `simulate` would; it does not say ok."""
    (tmp_path / "model.safetensors").write_bytes(b"x")
    base = ("--set", f"model.base={tmp_path}/model.safetensors")
    for command in (("config", "check"), ("simulate",)):
        assert_clear(run(*command, DEMO, *base), "ModelError", "is a file; give the directory")


def test_info_says_what_is_computed_once_for_a_record() -> None:
    """The layers below the adapted one, and their size; none where the first layer is adapted."""
    last = ("task.labels=a,b,c", "model.device=cpu", 'lora.target_modules=["1.attention.self.query"]')
    found = info(*last, "task.max_length=64")
    assert 0 < found["cached_layers"] == 1 < found["layers"]
    assert found["cached_bytes_per_record"] == 64 * 128 * 4  # tokens, width of the demo's base, float32
    assert info(*last, "model.dtype=bfloat16", "task.max_length=32")["cached_bytes_per_record"] == 8192
    head = info(*last, "task.max_length=64", "aggregation.method=head", "task.pooling=mean")
    assert head["cached_layers"] == head["layers"]
    assert head["cached_bytes_per_record"] == 128 * 4  # the mean of all tokens
    for none in ("lora.target_modules=all-linear", "model.gradient_checkpointing=true"):
        assert info(*last, none)["cached_bytes_per_record"] == 0
    parts = [part for each in last for part in ("--set", each)]
    result = run("model", "info", DEMO, *parts)
    assert f"1 of {found['layers']} are computed once for a record" in " ".join(result.stdout.split())
