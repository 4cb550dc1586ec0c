"""Adapters with deltas and cores as ordinary LoRA adapters, read by PEFT alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support.closeness import assert_same_logits
from support.extras import load_with, random_deltas, random_whole
from support.families import LABELS, examples_of, task_of

from fedslm.adapter_keys import key_of, layers_of, part_of
from fedslm.config import LoraConfig
from fedslm.errors import ModelError
from fedslm.models.loaded import LoadedModel
from fedslm.models.peft_export import plain, save_plain
from fedslm.records import AdapterState
from fedslm.training.batches import forward

FAMILIES = [("bert", "classification"), ("gpt2", "causal-lm"), ("t5", "seq2seq")]
KINDS = {  # has a core, has deltas on every n-th layer, rsLoRA
    "neither": (False, 0, False),
    "rslora": (False, 0, True),
    "delta": (False, 1, False),
    "delta-rslora": (False, 2, True),
    "core": (True, 0, False),
    "core-delta-rslora": (True, 1, True),
}


def adapted(directory: Path, name: str, kind: str) -> tuple[LoadedModel, AdapterState, LoraConfig]:
    """A model, its whole adapter of a kind, and what it was attached with."""
    core, every, rslora = KINDS[kind]
    lora = LoraConfig(rank=3, alpha=12.0, rslora=rslora)
    model = load_with(directory, name, lora, core=core)
    state = random_whole(model)
    if every:
        state = state.merged(random_deltas(model, every=every))
    model.adapter.write(state)
    return model, state, lora


def fresh_base(directory: Path, name: str) -> Any:
    """The base by transformers alone."""
    if name == "classification":
        return transformers.AutoModelForSequenceClassification.from_pretrained(
            directory, num_labels=len(LABELS)
        )
    if name == "seq2seq":
        return transformers.AutoModelForSeq2SeqLM.from_pretrained(directory)
    return transformers.AutoModelForCausalLM.from_pretrained(directory)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family[0])
def test_peft_alone_loads_what_was_saved(
    kind: str,
    family: tuple[str, str],
    family_directory: Callable[[str, str], Path],
    tmp_path: Path,
) -> None:
    """PeftModel.from_pretrained on a fresh base gives our logits, merged or not."""
    from peft import PeftModel

    directory, name = family_directory(*family), family[1]
    model, state, lora = adapted(directory, name, kind)
    written = save_plain(model.adapter, state, lora, tmp_path)
    assert written.sha256() == plain(state, lora)[0].sha256()
    with torch.no_grad():
        expected, batch = forward(model, task_of(name), examples_of(4, name=name), keep_all=True)
    inputs = {key: value for key, value in batch.items() if key.endswith(("input_ids", "mask"))}
    loaded = PeftModel.from_pretrained(fresh_base(directory, name), tmp_path).eval()
    with torch.no_grad():
        assert_same_logits(loaded(**inputs).logits, expected)
        merged = loaded.merge_and_unload()
        assert_same_logits(merged(**inputs).logits, expected)
        bare = merged(**{**inputs, "input_ids": inputs["input_ids"].flip(0)}).logits
    assert not torch.allclose(bare, expected, atol=1e-2)


@pytest.mark.parametrize("kind", ["delta-rslora", "core", "core-delta-rslora"])
def test_the_plain_adapter_attaches_as_what_it_says(
    kind: str, family_directory: Callable[[str, str], Path]
) -> None:
    """Attached with the returned config, the plain state fits, scales alike and gives our logits."""
    directory, name = family_directory("gpt2", "causal-lm"), "causal-lm"
    model, state, lora = adapted(directory, name, kind)
    as_lora, shape = plain(state, lora)
    assert shape.scaling == pytest.approx(lora.scaling, rel=1e-12)
    assert {part_of(key) for key in as_lora} == {"lora_A", "lora_B"}
    again = load_with(directory, name, shape)
    again.adapter.write(as_lora)
    examples, task = examples_of(4, name=name), task_of(name)
    with torch.no_grad():
        ours, theirs = forward(model, task, examples)[0], forward(again, task, examples)[0]
    assert_same_logits(theirs, ours)


def test_what_is_plain_stays_as_it_is(
    family_directory: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """Without core or delta nothing changes, and the files are byte for byte those that PEFT writes."""
    directory, name = family_directory("bert", "classification"), "classification"
    model, state, lora = adapted(directory, name, "rslora")
    same, shape = plain(state, lora)
    assert same is state
    assert shape is lora
    model.adapter.save(tmp_path / "ours")
    save_plain(model.adapter, state, lora, tmp_path / "plain")
    files = sorted(path.name for path in (tmp_path / "ours").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "plain").iterdir())
    for file in files:
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


def test_the_config_says_the_new_rank_and_the_old_base(
    family_directory: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """Rank and alpha are the plain adapter's, everything else is as without a delta; the model is left alone."""
    directory, name = family_directory("gpt2", "causal-lm"), "causal-lm"
    model, state, lora = adapted(directory, name, "delta")
    save_plain(model.adapter, state, lora, tmp_path / "delta")
    bare = state.select(set(model.adapter.parameters))
    model.adapter.write(bare)
    model.adapter.save(tmp_path / "bare")
    with_delta, without = (
        json.loads((tmp_path / each / "adapter_config.json").read_text()) for each in ("delta", "bare")
    )
    changed = {key for key in without if with_delta[key] != without[key]}
    assert changed == {"r", "lora_alpha"}
    assert (without["r"], with_delta["r"]) == (3, 8)  # the largest delta has rank 5
    assert with_delta["lora_alpha"] / with_delta["r"] == lora.scaling
    assert without["base_model_name_or_path"] == str(directory)


def test_peft_is_not_given_what_it_does_not_know(
    family_directory: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """Saving a delta or a core the ordinary way would lose it silently: refused, nothing written."""
    directory = family_directory("gpt2", "causal-lm")
    for kind in ("delta", "core"):
        model, _, _ = adapted(directory, "causal-lm", kind)
        with pytest.raises(ModelError, match="save_plain"):
            model.adapter.save(tmp_path / kind)
        assert not (tmp_path / kind).exists()


@pytest.mark.parametrize("lost", ["lora_B", "delta_A", "delta_B", "lora_A"])
def test_half_an_adapter_is_refused(
    lost: str, family_directory: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """A factor without its other half is an error and leaves no files, never a smaller adapter."""
    model, state, lora = adapted(family_directory("gpt2", "causal-lm"), "causal-lm", "delta")
    key = key_of(layers_of(state)[0], lost)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"without the other|no LoRA factor"):
        save_plain(model.adapter, state.select(set(state) - {key}), lora, tmp_path / "out")
    bare = state.select(set(model.adapter.parameters) - {key_of(layers_of(state)[0], "lora_B")})
    with pytest.raises(ModelError, match="lacks or has too much"):
        save_plain(model.adapter, bare, lora, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scaling", [0.5, 1.0, 4.0])
def test_the_product_is_kept_at_every_scaling(scaling: float) -> None:
    """s·B′·A′ = s·B·R·A + D_B·D_A at alpha / rank of 1/2, 1 and 4, with and without a core."""
    generator = np.random.default_rng(0)
    shapes = {
        "lora_A": (3, 7),
        "lora_B": (5, 3),
        "lora_R": (3, 3),
        "delta_A": (4, 7),
        "delta_B": (5, 4),
    }
    lora = LoraConfig(rank=3, alpha=3 * scaling)
    for core in (True, False):
        tensors = {
            part: generator.standard_normal(shape).astype(np.float32)
            for part, shape in shapes.items()
            if core or part != "lora_R"
        }
        whole = AdapterState({f"q.{part}.weight": value for part, value in tensors.items()})
        state, shape = plain(whole, lora)
        own = tensors["lora_B"] @ tensors.get("lora_R", np.eye(3)) @ tensors["lora_A"]
        expected = scaling * own + tensors["delta_B"] @ tensors["delta_A"]
        found = shape.scaling * (state["q.lora_B.weight"] @ state["q.lora_A.weight"])
        np.testing.assert_allclose(found, expected, atol=1e-5)
