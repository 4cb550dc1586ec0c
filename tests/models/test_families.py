"""Every proved architecture with its usual tasks: gradients, round trips, checkpointing, padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support.closeness import assert_same_logits
from support.families import (
    CASES,
    examples_of,
    gradient,
    labels_of,
    load_family,
    own_columns,
    random_state,
    ready,
    record_plan,
    task_of,
)
from support.tiny import CONFIGS

from fedslm.config import LoraConfig, TaskConfig
from fedslm.models.adapter import attach
from fedslm.models.families import PROVED
from fedslm.models.loaded import LoadedModel
from fedslm.models.networks import _class_for, checkpoint_activations, inner, on_meta
from fedslm.models.pooling import MeanPoolingClassifier
from fedslm.tasks.base import Task
from fedslm.training.batches import forward
from fedslm.training.checks import check_private_model
from fedslm.training.per_record import ClosedForm
from fedslm.training.shapes import Pass
from fedslm.training.steps import PrivateStep, stepping

HARMLESS = 1e-5


@dataclass(frozen=True)
class Case:
    """A loaded model, its task and where its base lies."""

    model: LoadedModel
    task: Task
    directory: Path
    name: str
    pooling: str


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case), scope="module")
def case(request: pytest.FixtureRequest, family_directory: Callable[[str, str], Path]) -> Case:
    """One architecture with one of its tasks."""
    architecture, name, pooling = request.param
    directory = family_directory(architecture, name)
    return Case(load_family(directory, name, pooling), task_of(name), directory, name, pooling)


def per_record(case: Case, size: int) -> np.ndarray:
    """Gradients of five records through the private step, ``size`` records in a pass."""
    ready(case.model)
    parameters = list(case.model.adapter.parameters.values())
    rows = []
    with stepping(
        case.model, case.task, record_plan(passes="shared"), torch.optim.SGD(parameters, lr=1.0), size
    ) as step:
        assert isinstance(step, PrivateStep)
        assert isinstance(step._gradients, ClosedForm)
        examples = examples_of(5, name=case.name)
        for start in range(0, len(examples), size):
            some = tuple(examples[start : start + size])
            rows.append(own_columns(step, step.rows(Pass(some, tuple(range(len(some)))))))
    return np.concatenate(rows)


@contextmanager
def checkpointed(case: Case) -> Iterator[None]:
    """Forgets activations inside the block."""
    network = case.model.adapter.network.get_base_model()  # type: ignore[operator]
    checkpoint_activations(network)
    try:
        yield
    finally:
        inner(network).activation_checkpointing_disable()
        inner(network).disable_input_require_grads()


def test_every_proved_family_is_tried_here() -> None:
    """The list that privacy relies on is the list of these tests."""
    assert {architecture for architecture, _, _ in CASES} == set(PROVED) == set(CONFIGS)


def test_gradients_of_each_record_equal_autograd(case: Case) -> None:
    """Alone, in a padded batch, and with activations computed again: always the record's own gradient."""
    check_private_model(case.model.adapter.network)
    expected = [gradient(case.model, case.task, each) for each in examples_of(5, name=case.name)]
    assert all(np.linalg.norm(each) > 1e-3 for each in expected)
    for size in (1, 5):
        np.testing.assert_allclose(per_record(case, size), expected, atol=HARMLESS)
    with checkpointed(case):
        np.testing.assert_allclose(per_record(case, 5), expected, atol=HARMLESS)
        plain = gradient(case.model, case.task, examples_of(5, name=case.name)[0])
    np.testing.assert_allclose(plain, expected[0], atol=HARMLESS)


def test_checkpointing_really_computes_again(case: Case) -> None:
    """Each layer runs twice in a training step, and once where nothing is trained."""
    ready(case.model)
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    target = next(m for n, m in case.model.adapter.network.named_modules() if n.endswith("lora_A"))
    example = examples_of(1, name=case.name)
    with checkpointed(case), target["default"].register_forward_hook(count):
        ready(case.model)
        logits, batch = forward(case.model, case.task, example)
        case.task.per_example_loss(logits, batch).sum().backward()
        assert calls == 2
        case.model.adapter.network.eval()
        with torch.inference_mode():
            forward(case.model, case.task, example)
        assert calls == 3


def test_dropout_is_off_in_training(case: Case) -> None:
    """Passes in training mode agree to the bit, though the base has dropout in its config."""
    values = case.model.adapter.network.config.to_dict()
    assert any("drop" in key and value for key, value in values.items())
    examples = examples_of(3, name=case.name)
    ready(case.model)
    with torch.no_grad():
        passes = [forward(case.model, case.task, examples)[0] for _ in range(2)]
    with checkpointed(case):
        ready(case.model)
        passes += [forward(case.model, case.task, examples)[0].detach() for _ in range(2)]
    assert all(torch.equal(passes[0], each) for each in passes[1:])


def test_padding_does_not_change_a_record(case: Case) -> None:
    """A record's logits are the same alone and on the left of padding."""
    model, task = case.model, case.task
    assert model.tokenizer.padding_side == "right"
    ready(model)
    examples = examples_of(5, name=case.name)
    with torch.no_grad():
        together, _ = forward(model, task, examples)
        for row, example in enumerate(examples):
            own = forward(model, task, [example])[0][0]
            shape = own.shape if own.ndim == 1 else (len(own), own.shape[-1])
            padded = together[row] if own.ndim == 1 else together[row, : shape[0]]
            torch.testing.assert_close(padded, own, atol=HARMLESS, rtol=1e-5)


def test_adapter_goes_through_plain_peft_and_merges(case: Case, tmp_path: Path) -> None:
    """Saved, loaded on a fresh base by PEFT, and merged: the same logits."""
    from peft import PeftModel

    model, task = case.model, case.task
    model.adapter.write(random_state(model))
    model.adapter.network.eval()
    model.adapter.save(tmp_path)
    with torch.no_grad():
        expected, batch = forward(model, task, examples_of(4, name=case.name), keep_all=True)
    base: torch.nn.Module = fresh_base(case)
    plain = PeftModel.from_pretrained(base, tmp_path).eval()
    inputs = {key: value for key, value in batch.items() if key.endswith(("input_ids", "mask"))}
    with torch.no_grad():
        assert_same_logits(plain(**inputs).logits, expected)
        merged = plain.merge_and_unload()
        assert_same_logits(merged(**inputs).logits, expected)


def fresh_base(case: Case) -> Any:
    """The base by transformers alone, as somebody without this library loads it."""
    classes = len(labels_of(case.name))
    labels = {"num_labels": classes} if classes else {}
    config = transformers.AutoConfig.from_pretrained(case.directory, **labels)
    base = _class_for(task_config(case), config).from_pretrained(case.directory, config=config)
    return MeanPoolingClassifier(base, classes) if case.pooling == "mean" else base


def task_config(case: Case) -> TaskConfig:
    """The task's config."""
    return TaskConfig(name=case.name, pooling=case.pooling, max_length=32)  # type: ignore[arg-type]


def test_usual_targets_are_layers_of_the_family(case: Case) -> None:
    """``usual`` names real layers, fewer than all of them, and needs no weights to tell."""
    task, labels = task_config(case), len(labels_of(case.name))
    everything = attach(on_meta(case.directory, task, labels), LoraConfig())
    usual = attach(on_meta(case.directory, task, labels), LoraConfig(target_modules=("usual",)))
    assert set(usual.parameters) < set(everything.parameters)
    named = PROVED[case.model.adapter.network.config.model_type].targets
    for target in named:
        assert any(f".{target}.lora_A." in key for key in usual.parameters), target
