"""Bases in 8 and 4 bits: close to the whole base, exact gradients through them, adapters that move on."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.closeness import assert_same_logits
from support.families import (
    SHAPES,
    alone,
    clipped,
    examples_of,
    flat,
    gradient,
    load_family,
    one_step,
    random_state,
    record_plan,
    task_of,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedslm.errors import ModelError
from fedslm.models import quantized
from fedslm.models.loaded import LoadedModel
from fedslm.models.quantized import HalfStored, quantize
from fedslm.privacy.plan import WEAKEST_FIRST
from fedslm.tasks.base import Task
from fedslm.training.batches import forward
from fedslm.training.checks import check_private_model

CASES = [
    ("bert", "classification", "mean"),
    ("gpt2", "causal-lm", "native"),
    ("llama", "causal-lm", "native"),
    ("modernbert", "token-classification", "native"),
    ("phi", "causal-lm", "native"),
    ("t5", "seq2seq", "native"),
]
# Largest relative error of the logits of a random base 32 wide; real bases are wider and lose less.
WORST = {"int8": 0.02, "int4": 0.5}


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case), scope="module")
def case(
    request: pytest.FixtureRequest, family_directory: Callable[[str, str], Path]
) -> tuple[Path, str, str]:
    """Where a base lies, its task and pooling."""
    architecture, name, pooling = request.param
    return family_directory(architecture, name), name, pooling


def both(case: tuple[Path, str, str], kind: str, dtype: str) -> tuple[LoadedModel, LoadedModel, Task]:
    """The whole and the quantised base with one and the same adapter."""
    whole, small = load_family(*case), load_family(*case, quantization=kind, dtype=dtype)
    state = random_state(whole)
    for model in (whole, small):
        model.adapter.write(state)
    return whole, small, task_of(case[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised_base_gives_about_the_same(case, kind: str, dtype: str) -> None:
    """The same keys, the same files, nearly the same logits; 4 bits are not better than 8."""
    whole, small, task = both(case, kind, dtype)
    assert whole.adapter.parameters.keys() == small.adapter.parameters.keys()
    assert whole.base_sha256 == small.base_sha256
    assert {p.dtype for p in small.adapter.parameters.values()} == {torch.float32}
    with torch.no_grad():
        expected, found = (
            forward(m, task, examples_of(4, name=case[1]))[0].float() for m in (whole, small)
        )
    error = float((found - expected).norm() / expected.norm())
    assert 0 < error < WORST[kind] + 0.02 * (dtype == "bfloat16")


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_gradients_of_each_record_equal_autograd(case, kind: str) -> None:
    """Through a quantised base the private step's sum is that of clipped autograd gradients."""
    _, small, task = both(case, kind, "float32")
    check_private_model(small.adapter.network)
    examples = examples_of(4, name=case[1])
    gradients = [gradient(small, task, each) for each in examples]
    clip = float(np.median([np.linalg.norm(each) for each in gradients]))
    expected = sum(clipped(each, clip) for each in gradients)
    for passes in WEAKEST_FIRST:
        plan = record_plan(clip=clip, passes=passes)
        exact = one_step(small, task, plan, alone(examples), shapes=SHAPES).exact
        np.testing.assert_allclose(exact, expected, atol=2e-5)


@pytest.mark.parametrize("kind", ["none", "int8", "int4"])
def test_half_precision_bases_are_clipped_in_full(
    family_directory: Callable[[str, str], Path], kind: str
) -> None:
    """Gradients through a half-precision base are near the whole base's, and clipped exactly."""
    directory = family_directory("llama", "causal-lm")
    whole, small, task = both((directory, "causal-lm", "native"), kind, "bfloat16")
    example = examples_of(1, name="causal-lm")[0]
    exact = one_step(small, task, record_plan(clip=1e-3), [[example]]).exact
    assert np.linalg.norm(exact) == pytest.approx(1e-3, rel=1e-3)
    whole = load_family(directory, "causal-lm")
    truth = gradient(whole, task, example)
    assert float(exact @ truth) / np.linalg.norm(exact) / np.linalg.norm(truth) > (
        0.8 if kind == "int4" else 0.99
    )
    assert {p.dtype for p in small.adapter.parameters.values()} == {torch.float32}


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_checkpointing_gives_the_same_gradient(
    family_directory: Callable[[str, str], Path], kind: str
) -> None:
    """Activations computed again through quantised layers are the same activations."""
    directory, task = family_directory("llama", "causal-lm"), task_of("causal-lm")
    example = examples_of(1, name="causal-lm")[0]
    found = [
        gradient(
            load_family(directory, "causal-lm", quantization=kind, gradient_checkpointing=forget),
            task,
            example,
        )
        for forget in (False, True)
    ]
    np.testing.assert_allclose(*found, atol=1e-6)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_adapter_of_a_quantised_base_fits_the_whole_one(case, kind: str, tmp_path: Path) -> None:
    """Saved on the quantised base, PEFT loads it on the whole base: the same logits as trained there."""
    import transformers
    from peft import PeftModel

    from fedslm.models.pooling import MeanPoolingClassifier

    whole, small, task = both(case, kind, "float32")
    small.adapter.save(tmp_path)
    directory, name, pooling = case
    with torch.no_grad():
        expected, batch = forward(whole, task, examples_of(3, name=name), keep_all=True)
    auto = {
        "classification": transformers.AutoModel,
        "token-classification": transformers.AutoModelForTokenClassification,
        "causal-lm": transformers.AutoModelForCausalLM,
        "seq2seq": transformers.AutoModelForSeq2SeqLM,
    }[name]
    options = {"num_labels": 3} if name == "token-classification" else {}
    base = auto.from_pretrained(directory, **options)
    if pooling == "mean":
        base = MeanPoolingClassifier(base, 3)
    plain = PeftModel.from_pretrained(base, tmp_path).eval()
    inputs = {key: value for key, value in batch.items() if key.endswith(("input_ids", "mask"))}
    with torch.no_grad():
        assert_same_logits(plain(**inputs).logits, expected)


def stored_bytes(model: LoadedModel) -> int:
    """Bytes of all parameters but the adapter's."""
    own = {id(parameter) for parameter in model.adapter.parameters.values()}
    rest = [p for p in model.adapter.network.parameters() if id(p) not in own]
    return sum(parameter.numel() * parameter.element_size() for parameter in rest)


def test_weights_are_really_small(family_directory: Callable[[str, str], Path]) -> None:
    """Eight bits take a quarter of the bytes in linear layers, four an eighth; embeddings take half."""
    directory = family_directory("llama", "causal-lm")
    found = {
        kind: stored_bytes(load_family(directory, "causal-lm", quantization=kind))
        for kind in ("none", "int8", "int4")
    }
    tables = 2 * 1744 * 32 * 4  # embedding and output
    layers = found["none"] - tables
    for kind, share in (("int8", 1 / 4), ("int4", 1 / 8)):
        assert found[kind] == pytest.approx(tables / 2 + layers * share, rel=0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/maps")
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_no_file_of_the_base_stays_mapped(
    family_directory: Callable[[str, str], Path], kind: str, tmp_path: Path
) -> None:
    """Also of a base that is stored as it is computed: its tables are copied out of the file."""
    source = family_directory("llama", "causal-lm")
    network = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    network.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path)
    model = load_family(tmp_path, "causal-lm", quantization=kind, dtype="bfloat16")
    gc.collect()
    assert model.dtype == torch.bfloat16
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_training_after_evaluation(
    family_directory: Callable[[str, str], Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What evaluation leaves behind in a process is of use in training, and the answers stay the same."""
    monkeypatch.setattr(quantized, "_ROOMS", quantized._Rooms())  # as in a new process
    directory, task = family_directory("llama", "causal-lm"), task_of("causal-lm")
    model = load_family(directory, "causal-lm", quantization=kind)
    examples = examples_of(3, name="causal-lm")
    model.adapter.write(random_state(model))
    with torch.inference_mode():
        before, _ = forward(model, task, examples)
    assert one_step(model, task, record_plan(), alone(examples)).exact.any()
    model.adapter.write(random_state(model))
    with torch.inference_mode():
        torch.testing.assert_close(forward(model, task, examples)[0], before, atol=0, rtol=0)


@pytest.mark.parametrize("bias", [True, False])
def test_half_stored_output_equals_a_whole_one(bias: bool) -> None:
    """Logits and gradients are those of the rounded weight in full precision, over several pieces."""
    torch.manual_seed(0)
    plain = torch.nn.Linear(16, 9000, bias=bias)
    plain.weight.data = plain.weight.data.bfloat16()
    half = HalfStored(plain)
    inputs = torch.randn(2, 3, 16, requires_grad=True)
    expected = torch.nn.functional.linear(inputs, plain.weight.float(), plain.bias)
    found = half(inputs)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    one, other = (torch.autograd.grad((out * weights).sum(), inputs)[0] for out in (found, expected))
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_a_device_that_cannot_is_a_clear_error(family_directory: Callable[[str, str], Path]) -> None:
    """What the library cannot do there is said with the option and the remedy."""
    from fedslm.config import TaskConfig
    from fedslm.models import networks

    task = TaskConfig(name="causal-lm", max_length=32)
    network = networks.from_files(family_directory("llama", "causal-lm"), task, 0, 0, "auto")
    elsewhere = torch.device("xpu")  # torch is built without it
    with pytest.raises(ModelError, match=r'quantization="int8" does not work on xpu.*"none"'):
        quantize(network, "int8", torch.float32, elsewhere)


def test_activations_are_not_rounded(family_directory: Callable[[str, str], Path]) -> None:
    """In 8 bits a layer is linear in its input, in training and in evaluation alike."""
    model = load_family(family_directory("llama", "causal-lm"), "causal-lm", quantization="int8")
    layer = model.adapter.network.get_submodule(
        "base_model.model.model.layers.0.mlp.up_proj.base_layer"
    )
    inputs = torch.randn(3, 32)
    for mode in (True, False):
        layer.train(mode)
        torch.testing.assert_close(layer(inputs * 1000), layer(inputs) * 1000, atol=1e-2, rtol=1e-4)
        dequantised = flat([layer(torch.eye(32))]).reshape(32, -1)
        np.testing.assert_allclose(layer(inputs).detach(), inputs @ dequantised, atol=1e-4)
