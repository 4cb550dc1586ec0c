"""Deltas beside LoRA and cores inside it: the right function, exact gradients, off with the adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.extras import fold, load_with, random_deltas, random_whole
from support.families import examples_of, own_columns, record_plan, task_of

from fedslm.adapter_keys import key_of, layers_of, part_of
from fedslm.config import LoraConfig
from fedslm.errors import ModelError
from fedslm.models.loaded import LoadedModel
from fedslm.models.networks import checkpoint_activations
from fedslm.models.peft_export import plain
from fedslm.records import AdapterState
from fedslm.tasks.base import Task
from fedslm.training.batches import forward
from fedslm.training.local import enter_training
from fedslm.training.shapes import Pass
from fedslm.training.steps import PrivateStep, stepping

CASES = [("bert", "classification"), ("gpt2", "causal-lm")]
LORA = LoraConfig(rank=3, alpha=12.0)
HARMLESS = 1e-5


@pytest.fixture(params=CASES, ids=lambda case: case[0])
def case(
    request: pytest.FixtureRequest, family_directory: Callable[[str, str], Path]
) -> tuple[Path, str]:
    """Where a base lies, and its task."""
    return family_directory(*request.param), request.param[1]


def logits(model: LoadedModel, name: str, count: int = 4) -> torch.Tensor:
    """Logits of a padded batch."""
    with torch.no_grad():
        return forward(model, task_of(name), examples_of(count, name=name), keep_all=True)[0]


def test_a_delta_is_a_change_of_the_weights(case: tuple[Path, str]) -> None:
    """Logits with deltas are those of a base with D_B·D_A in its weights, for Linear and Conv1D alike."""
    directory, name = case
    model, folded = load_with(directory, name, LORA), load_with(directory, name, LORA)
    state, deltas = random_whole(model), random_deltas(model)
    model.adapter.write(state)
    without = logits(model, name)
    model.adapter.write(state.merged(deltas))
    folded.adapter.write(state)
    fold(folded, deltas)
    torch.testing.assert_close(logits(model, name), logits(folded, name), atol=HARMLESS, rtol=1e-5)
    assert not torch.allclose(logits(model, name), without, atol=1e-2)


def test_a_whole_adapter_brings_its_deltas_and_no_others(case: tuple[Path, str]) -> None:
    """A whole state without deltas drops them, a partial one leaves them, ranks may change, 0 is none."""
    directory, name = case
    model = load_with(directory, name, LORA)
    state, deltas = random_whole(model), random_deltas(model)
    model.adapter.write(state)
    bare = logits(model, name)
    model.adapter.write(state.merged(deltas))
    full = logits(model, name)
    model.adapter.write(state.select({next(iter(state))}))
    assert torch.equal(logits(model, name), full)
    half = random_deltas(model, seed=1, every=2)
    model.adapter.write(state.merged(half))
    assert len(model.adapter.deltas) == len(half) / 2 < len(deltas) / 2
    model.adapter.write(deltas)
    assert torch.equal(logits(model, name), full)
    none = {k: v[:0] if part_of(k) == "delta_A" else v[:, :0] for k, v in deltas.tensors.items()}
    model.adapter.write(AdapterState(none))
    assert len(model.adapter.deltas) == 0
    assert torch.equal(logits(model, name), bare)
    model.adapter.write(deltas)
    model.adapter.write(state)
    assert torch.equal(logits(model, name), bare)


@pytest.mark.parametrize("wrong", ["lone", "unknown", "width", "inner", "flat"])
def test_a_delta_that_does_not_fit_is_refused_whole(
    wrong: str, family_directory: Callable[[str, str], Path]
) -> None:
    """One factor alone, an unknown layer or a shape that does not fit is an error; nothing is written."""
    model = load_with(family_directory("bert", "classification"), "classification", LORA)
    before = model.adapter.read()
    layer = layers_of(before)[0]
    width, height = before[key_of(layer, "lora_A")].shape[1], len(before[key_of(layer, "lora_B")])
    down, up = np.ones((2, width), np.float32), np.ones((height, 2), np.float32)
    given: dict[str, tuple[str, Any, Any]] = {
        "lone": (layer, down, None),
        "unknown": ("base_model.model.nowhere", down, up),
        "width": (layer, down[:, 1:], up),
        "inner": (layer, down, up[:, 1:]),
        "flat": (layer, down[0], up),
    }
    name, one, other = given[wrong]
    pair = {key_of(name, "delta_A"): one, key_of(name, "delta_B"): other}
    state = AdapterState({key: value for key, value in pair.items() if value is not None})
    with pytest.raises(ModelError, match="delta"):
        model.adapter.write(random_whole(model).merged(state))
    assert model.adapter.read().sha256() == before.sha256()
    assert len(model.adapter.deltas) == 0


def per_record(model: LoadedModel, task: Task, state: AdapterState, size: int) -> np.ndarray:
    """Gradients of five records through the private step from a state, ``size`` records in a pass."""
    trained = training_at(model, state)
    rows = []
    plan = record_plan(passes="shared")
    with stepping(model, task, plan, torch.optim.SGD(trained, lr=1.0), size) as step:
        assert isinstance(step, PrivateStep)
        examples = examples_of(5, name=task_name(task))
        for start in range(0, len(examples), size):
            some = tuple(examples[start : start + size])
            rows.append(own_columns(step, step.rows(Pass(some, tuple(range(len(some)))))))
    return np.concatenate(rows)


def training_at(model: LoadedModel, state: AdapterState, part: str = "") -> list[torch.nn.Parameter]:
    """Puts a model into training mode at a state; the trained parameters."""
    model.adapter.write(state)
    keys = [key for key in model.adapter.parameters if part in part_of(key)]
    model.adapter.train_only(set(keys))
    enter_training(model)
    return [model.adapter.parameters[key] for key in keys]


def task_name(task: Task) -> str:
    """The kind of example that a task reads."""
    return "classification" if task.labels else "causal-lm"


def autograd(model: LoadedModel, task: Task) -> list[dict[str, np.ndarray]]:
    """Each of the five records' gradients by plain autograd, on a batch of one."""
    found = []
    for example in examples_of(5, name=task_name(task)):
        model.adapter.network.zero_grad()
        out, batch = forward(model, task, [example])
        task.per_example_loss(out, batch).sum().backward()
        found.append(
            {k: p.grad.double().numpy() for k, p in model.adapter.parameters.items() if p.requires_grad}
        )
    return found


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "forgotten"])
def test_gradients_of_each_record_pass_through_deltas(
    checkpointed: bool, case: tuple[Path, str]
) -> None:
    """With deltas, private gradients are autograd's on a base that has them in its weights."""
    directory, name = case
    model, folded, task = (
        load_with(directory, name, LORA),
        load_with(directory, name, LORA),
        task_of(name),
    )
    state, deltas = random_whole(model), random_deltas(model)
    fold(folded, deltas)
    training_at(folded, state)
    expected = [np.concatenate([g.ravel() for g in each.values()]) for each in autograd(folded, task)]
    if checkpointed:
        checkpoint_activations(model.adapter.network.get_base_model())  # type: ignore[operator]
    for size in (1, 5):
        found = per_record(model, task, state.merged(deltas), size)
        np.testing.assert_allclose(found, expected, atol=HARMLESS)
    assert min(np.linalg.norm(each) for each in expected) > 1e-3
    assert set(model.adapter.read()) == set(state)
    down, up = next(iter(model.adapter.deltas._pairs.values()))
    assert not down.requires_grad
    assert down.grad is None is up.grad


def test_what_is_written_without_gradients_can_train(
    family_directory: Callable[[str, str], Path],
) -> None:
    """Deltas that an evaluation wrote, in inference mode, are good for a training step after it."""
    name = "classification"
    model, task = load_with(family_directory("bert", name), name, LORA), task_of(name)
    state = random_whole(model).merged(random_deltas(model))
    with torch.inference_mode():
        model.adapter.write(state)
        logits(model, name)
    model.adapter.train_only(set(model.adapter.parameters))
    enter_training(model)
    assert all(np.isfinite(g).all() for each in autograd(model, task) for g in each.values())


@pytest.mark.parametrize("core", [False, True], ids=["delta", "core"])
def test_with_the_adapter_off_the_base_answers_alone(core: bool, case: tuple[Path, str]) -> None:
    """Inside the block there is neither delta nor core; after it all is as before."""
    import transformers

    directory, name = case
    model = load_with(directory, name, LORA, core=core)
    model.adapter.write(random_whole(model).merged(random_deltas(model)))
    adapted = logits(model, name)
    frozen = {key for key in model.adapter.parameters if part_of(key) in ("lora_A", "lora_B")}
    model.adapter.train_only(set(model.adapter.parameters) - frozen)
    with model.adapter.disabled():
        alone = logits(model, name)
    assert {k for k, p in model.adapter.parameters.items() if not p.requires_grad} == frozen
    assert torch.equal(logits(model, name), adapted)
    if name == "causal-lm":
        base = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
        batch = task_of(name).collate(examples_of(4, name=name), 0)
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            torch.testing.assert_close(alone, base(**inputs).logits)
    else:  # the head is the adapter's: without it the base's own, random one answers
        fresh = load_with(directory, name, LORA)
        fresh.adapter.network.load_state_dict(
            {k: v for k, v in model.adapter.network.state_dict().items() if "original_module" in k},
            strict=False,
        )
        with fresh.adapter.disabled():
            torch.testing.assert_close(alone, logits(fresh, name))


@pytest.mark.parametrize(
    "options",
    [{"dtype": "bfloat16"}, {"quantization": "int8"}, {"quantization": "int4"}],
    ids=lambda options: next(iter(options.values())),
)
def test_smaller_bases_take_deltas(
    options: dict[str, str], family_directory: Callable[[str, str], Path]
) -> None:
    """On a bfloat16 or quantised base a delta is what the same numbers in a wider LoRA are."""
    directory, name = family_directory("llama", "causal-lm"), "causal-lm"
    model = load_with(directory, name, LORA, **options)
    state = random_whole(model).merged(random_deltas(model))
    model.adapter.write(state)
    as_lora, shape = plain(state, LORA)
    wider = load_with(directory, name, shape, **options)
    wider.adapter.write(as_lora)
    exact = 0.05 if "dtype" in options else HARMLESS
    found = logits(model, name)
    torch.testing.assert_close(found, logits(wider, name), atol=exact, rtol=exact)
    model.adapter.write(random_whole(model))
    assert (logits(model, name) - found).abs().max() > 0.2


def test_a_delta_is_not_dropped_out(family_directory: Callable[[str, str], Path]) -> None:
    """LoRA's dropout is no business of the delta's: with B = 0 training mode changes nothing."""
    lora = LORA.model_copy(update={"dropout": 0.5})
    model = load_with(family_directory("llama", "causal-lm"), "causal-lm", lora)
    state = random_whole(model)
    zero = {k: np.zeros_like(v) if part_of(k) == "lora_B" else v for k, v in state.tensors.items()}
    model.adapter.write(AdapterState(zero).merged(random_deltas(model)))
    expected = logits(model, "causal-lm")
    model.adapter.train_only(set(model.adapter.parameters))
    enter_training(model)
    assert torch.equal(logits(model, "causal-lm"), expected)


def test_gradients_of_each_record_in_a_core(case: tuple[Path, str]) -> None:
    """With R·A as a plain adapter's A′, each record's gradient of R is (∂L/∂A′)·Aᵀ; deltas beside it."""
    directory, name = case
    model, task = load_with(directory, name, LORA, core=True), task_of(name)
    deltas = random_deltas(model)
    state = random_whole(model).merged(deltas)
    by_hand, _ = plain(state.select(set(state) - set(deltas)), LORA)
    reference = load_with(directory, name, LORA)
    training_at(reference, by_hand.merged(deltas))
    expected = [
        np.concatenate(
            [
                (each[key_of(layer, "lora_A")] @ state[key_of(layer, "lora_A")].T.astype(float)).ravel()
                for layer in layers_of(by_hand)
            ]
        )
        for each in autograd(reference, task)
    ]
    trained = training_at(model, state, "lora_R")
    with stepping(
        model, task, record_plan(passes="shared"), torch.optim.SGD(trained, lr=1.0), 5
    ) as step:
        assert isinstance(step, PrivateStep)
        five = tuple(examples_of(5, name=name))
        found = own_columns(step, step.rows(Pass(five, tuple(range(5)))))
    np.testing.assert_allclose(found, expected, atol=HARMLESS)
    assert min(np.linalg.norm(each) for each in expected) > 1e-3


def test_a_core_is_a_named_square_parameter(family_directory: Callable[[str, str], Path]) -> None:
    """Every layer has L.lora_R.weight of shape (rank, rank), zero when attached; plain layers have none."""
    directory = family_directory("gpt2", "causal-lm")
    shapes = load_with(directory, "causal-lm", LORA, core=True).adapter.read().shapes
    layers = layers_of(shapes)
    assert [shapes[key_of(layer, "lora_R")] for layer in layers] == [(3, 3)] * len(layers)
    plain_keys = set(load_with(directory, "causal-lm", LORA).adapter.parameters)
    assert set(shapes) - plain_keys == {key_of(layer, "lora_R") for layer in layers}
