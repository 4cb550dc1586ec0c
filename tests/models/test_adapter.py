"""Adapters: initial state, targets, and round trips through plain PEFT."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from support.closeness import assert_same_logits
from support.extras import load_with
from support.families import LABELS, examples_of, load_family, random_state, task_of

from fedslm.config import LoraConfig, ModelConfig, TaskConfig
from fedslm.errors import ModelError
from fedslm.models.base import DEMO_DIRECTORY, base_sha256, resolve
from fedslm.models.loaded import load
from fedslm.records import AdapterState
from fedslm.training.batches import forward

FAMILIES = [
    ("bert", "classification", "native"),
    ("bert", "classification", "mean"),
    ("gpt2", "causal-lm", "native"),
    ("llama", "causal-lm", "native"),
]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: "-".join(family))
def test_saved_adapter_loads_with_plain_peft(
    family, family_directory: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """PeftModel.from_pretrained on a fresh base gives the same logits, merged or not."""
    import transformers
    from peft import PeftModel

    from fedslm.models.pooling import MeanPoolingClassifier

    architecture, task_name, pooling = family
    directory = family_directory(architecture, task_name)
    model, task = load_family(directory, task_name, pooling), task_of(task_name)
    model.adapter.write(random_state(model))
    model.adapter.save(tmp_path)
    with torch.no_grad():
        expected, batch = forward(model, task, examples_of(4), keep_all=True)
    if task_name == "causal-lm":
        base = transformers.AutoModelForCausalLM.from_pretrained(directory)
    elif pooling == "native":
        base = transformers.AutoModelForSequenceClassification.from_pretrained(
            directory, num_labels=len(LABELS)
        )
    else:
        base = MeanPoolingClassifier(transformers.AutoModel.from_pretrained(directory), len(LABELS))
    plain = PeftModel.from_pretrained(base, tmp_path).eval()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert_same_logits(plain(**inputs).logits, expected)
        merged = plain.merge_and_unload()
        assert_same_logits(merged(**inputs).logits, expected)


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 3.0), (True, 6.0)])
def test_scaling_is_what_the_config_says(
    rslora: bool, scaling: float, family_directory: Callable[[str, str], Path]
) -> None:
    """PEFT scales every layer by alpha / rank, or alpha / √rank with rsLoRA, as ``LoraConfig.scaling``."""
    lora = LoraConfig(rank=4, alpha=12.0, rslora=rslora)
    model = load_with(family_directory("gpt2", "causal-lm"), "causal-lm", lora)
    scalings = [m.scaling["default"] for m in model.adapter.network.modules() if hasattr(m, "lora_A")]
    assert scalings == [scaling] * len(scalings) == [lora.scaling] * 8


def test_unknown_target_names_the_layers(family_directory: Callable[[str, str], Path]) -> None:
    """A target that matches nothing is an error that lists what the model has."""
    directory = family_directory("llama", "causal-lm")
    with pytest.raises(ModelError, match=r"matches no layer.*q_proj"):
        load(
            ModelConfig(base=str(directory)),
            LoraConfig(target_modules=("query",)),
            TaskConfig(name="causal-lm"),
            0,
        )


def test_texts_longer_than_the_model_are_refused_at_once(
    family_directory: Callable[[str, str], Path],
) -> None:
    """max_length beyond the positions is an error before training, not when a long record comes."""
    directory = family_directory("llama", "causal-lm")
    with pytest.raises(ModelError, match="128 positions"):
        load(
            ModelConfig(base=str(directory)),
            LoraConfig(),
            TaskConfig(name="causal-lm", max_length=129),
            0,
        )


def test_base_with_missing_weights_is_refused(tmp_path: Path) -> None:
    """A classifier whose pooler is not in the files would be random on each client: refused."""
    import transformers
    from support.tiny import family_config

    transformers.BertModel(family_config("bert"), add_pooling_layer=False).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(DEMO_DIRECTORY).save_pretrained(tmp_path)
    task = TaskConfig(name="classification", max_length=32)
    with pytest.raises(ModelError, match=r"pooler.*pooling=.mean"):
        load(ModelConfig(base=str(tmp_path)), LoraConfig(), task, 2)
    mean = task.model_copy(update={"pooling": "mean"})
    assert load(ModelConfig(base=str(tmp_path)), LoraConfig(), mean, 2).adapter.parameters


def test_foreign_tensors_are_refused(family_directory: Callable[[str, str], Path]) -> None:
    """A key or a shape that does not fit is an error, not a silent no-op."""
    model = load_family(family_directory("bert", "classification"), "classification")
    key, shape = next(iter(model.adapter.read().shapes.items()))
    with pytest.raises(ModelError, match="does not fit"):
        model.adapter.write(AdapterState({f"_module.{key}": np.zeros(shape, np.float32)}))
    with pytest.raises(ModelError, match="does not fit"):
        model.adapter.write(AdapterState({key: np.zeros((1, 1), np.float32)}))


def test_a_refused_write_leaves_the_adapter(family_directory: Callable[[str, str], Path]) -> None:
    """If one tensor does not fit, none is written."""
    model = load_family(family_directory("bert", "classification"), "classification")
    state = random_state(model)
    model.adapter.write(state)
    *_, last = state
    ones = {key: np.ones_like(value) for key, value in state.tensors.items()}
    with pytest.raises(ModelError, match="does not fit"):
        model.adapter.write(AdapterState({**ones, last: np.ones((1, 1), np.float32)}))
    assert model.adapter.read().sha256() == state.sha256()


@pytest.mark.parametrize("base", ["/no/such/model", "./none", "~/none"])
def test_missing_model_is_a_clear_error(base: str) -> None:
    """A path that does not exist is said to be so, without asking the hub."""
    with pytest.raises(ModelError, match="no such directory"):
        resolve(ModelConfig(base=base))


def test_base_hash_sees_every_byte(
    family_directory: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """Changing one byte of the weights changes the hash of the base model."""
    import shutil

    source = family_directory("bert", "classification")
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    assert base_sha256(copy) == base_sha256(source)
    changed = tmp_path / "changed"
    shutil.copytree(source, changed)
    weights = bytearray((changed / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (changed / "model.safetensors").write_bytes(weights)
    assert base_sha256(changed) != base_sha256(source)


@pytest.mark.parametrize("fails", [False, True])
def test_without_its_adapter_the_base_answers_alone(
    fails: bool, family_directory: Callable[[str, str], Path]
) -> None:
    """Inside the block the logits are the plain base's; after it, also a failed one, A is still frozen."""
    import transformers

    directory = family_directory("llama", "causal-lm")
    model, task = load_family(directory, "causal-lm"), task_of("causal-lm")
    state = random_state(model)
    model.adapter.write(state)
    trained = {key for key in state if "lora_B" in key}
    model.adapter.train_only(trained)
    with torch.no_grad():
        adapted, batch = forward(model, task, examples_of(3), keep_all=True)
    base = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    end = pytest.raises(ZeroDivisionError) if fails else nullcontext()
    with end, torch.no_grad(), model.adapter.disabled():
        torch.testing.assert_close(
            forward(model, task, examples_of(3), keep_all=True)[0], base(**inputs).logits
        )
        assert 1 / (not fails)
    assert {key for key, each in model.adapter.parameters.items() if each.requires_grad} == trained
    with torch.no_grad():
        torch.testing.assert_close(
            forward(model, task, examples_of(3), keep_all=True)[0], adapted, atol=0, rtol=0
        )
    assert not torch.allclose(adapted, base(**inputs).logits)


def test_embedded_model_loads_offline() -> None:
    """The demo model loads for classification and has at most 1.5 million parameters."""
    model = load(ModelConfig(base="demo"), LoraConfig(rank=2), TaskConfig(name="classification"), 6)
    assert sum(p.numel() for p in model.adapter.network.parameters()) < 1_600_000
