"""The layers below the adapted ones: the same numbers, computed once for each record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.families import (
    CASES,
    UNKNOWN_TOKEN,
    alone,
    examples_of,
    flat,
    gradient,
    last_layer,
    load_family,
    own_columns,
    random_state,
    ready,
    record_plan,
    task_of,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedslm.adapter_keys import part_of
from fedslm.config import LoraConfig, ModelConfig, TaskConfig
from fedslm.errors import NotRepeated, TrainingError
from fedslm.models import cached_layers
from fedslm.models.cached_layers import CachedLayers, prefix_of
from fedslm.models.families import PROVED
from fedslm.models.initial import initial_state
from fedslm.models.loaded import LoadedModel, load
from fedslm.models.networks import checkpoint_activations, inner
from fedslm.privacy.plan import NoPrivacy
from fedslm.tasks.base import Example, Task
from fedslm.training.batches import collated, forward
from fedslm.training.evaluation import statistics
from fedslm.training.local import rehearse
from fedslm.training.metric import noisy_metric
from fedslm.training.shapes import Pass, Shape, Shapes
from fedslm.training.steps import PrivateStep, stepping
from fedslm.verification.bit_proof import proved_shapes

WITH_A_PREFIX = [case for case in CASES if case[0] != "t5"]
ROUNDING = 1e-5
Directories = Callable[[str, str], Path]


def loaded(directories: Directories, case: tuple[str, str, str]) -> LoadedModel:
    """A model of two blocks with LoRA in the second."""
    architecture, name, pooling = case
    directory = directories(architecture, name)
    return load_family(directory, name, pooling, targets=last_layer(directory, name, pooling))


@pytest.fixture(params=WITH_A_PREFIX, ids="-".join, scope="module")
def case(
    request: pytest.FixtureRequest, family_directory: Directories
) -> tuple[LoadedModel, Task, list[Example]]:
    """A model, its task and records of different lengths."""
    name = request.param[1]
    return loaded(family_directory, request.param), task_of(name), examples_of(5, name=name)


@pytest.fixture(scope="module")
def bert(family_directory: Directories) -> LoadedModel:
    """A classifier."""
    return loaded(family_directory, ("bert", "classification", "mean"))


@pytest.fixture(autouse=True)
def _empty(request: pytest.FixtureRequest) -> None:
    """No test finds another's records."""
    for name in {"case", "bert"} & set(request.fixturenames):
        found = request.getfixturevalue(name)
        (found if name == "bert" else found[0]).forget_records()


def layers_of(model: LoadedModel) -> CachedLayers:
    """The cached layers, which must be there."""
    assert model.cached_layers is not None
    return model.cached_layers


def private_rows(
    model: LoadedModel, task: Task, passes: list[Pass], plan_passes: str = "fixed"
) -> list[torch.Tensor]:
    """Per-record gradients of some passes through one private step."""
    parameters = list(model.adapter.parameters.values())
    plan = record_plan(passes=plan_passes)
    with stepping(model, task, plan, torch.optim.SGD(parameters, lr=1.0), 8) as step:
        assert isinstance(step, PrivateStep)
        return [torch.from_numpy(own_columns(step, step.rows(each)).copy()) for each in passes]


def a_pass(records: list[Example], shape: Shape | None = None) -> Pass:
    """A pass in which each record is a unit."""
    return Pass(tuple(records), tuple(range(len(records))), shape)


def lower_calls(model: LoadedModel) -> list[None]:
    """A list that grows with each call of a linear layer below the adapted block."""
    calls: list[None] = []
    for each in layers_of(model).prefix.below[0].modules():
        if isinstance(each, nn.Linear | Conv1D):
            each.register_forward_hook(lambda *_: calls.append(None))
            break
    return calls


def test_every_family_but_the_encoder_decoder_is_tried_here() -> None:
    """What is cached is what these tests compare."""
    assert {architecture for architecture, _, _ in WITH_A_PREFIX} == set(PROVED) - {"t5"}


def test_private_gradients_are_those_without_a_cache(
    case: tuple[LoadedModel, Task, list[Example]],
) -> None:
    """In shared, isolated and shaped passes, when a record comes first and when it comes again."""
    model, task, records = case
    expected = [
        gradient(model, task, each) for each in records
    ]  # plain autograd over the whole network
    assert len(layers_of(model)) == 0
    assert all(np.linalg.norm(each) > 1e-3 for each in expected)
    ready(model)
    passes = [a_pass(records), a_pass(records, Shape(8, 32)), *(a_pass([each]) for each in records)]
    first, shaped, *single = private_rows(model, task, passes)
    np.testing.assert_allclose(first, expected, atol=ROUNDING)
    np.testing.assert_allclose(shaped, expected, atol=ROUNDING)
    np.testing.assert_allclose(torch.cat(single), expected, atol=ROUNDING)


def test_a_plain_step_and_an_evaluation_are_those_without_a_cache(
    case: tuple[LoadedModel, Task, list[Example]],
) -> None:
    """After an evaluation the same states serve training, and the layers below are not computed again."""
    model, task, records = case
    state = random_state(model)
    plain = statistics(model, task, records, state)
    calls = lower_calls(model)
    for _ in range(2):
        found = statistics(model, task, records, state, again=True)
        assert set(found) == set(plain)
        for name, values in plain.items():
            np.testing.assert_allclose(found[name], values, atol=1e-4, rtol=1e-4)
    assert len(calls) == len(layers_of(model)) == len({each.input_ids for each in records})
    expected = np.mean([gradient(model, task, each) for each in records], axis=0)
    ready(model)
    del calls[:]
    parameters = list(model.adapter.parameters.values())
    with stepping(model, task, NoPrivacy(5, 1), torch.optim.SGD(parameters, lr=0.0), 5) as step:
        step(alone(records))
    assert calls == []
    np.testing.assert_allclose(flat(p.grad for p in parameters), expected, atol=ROUNDING)


def test_bits_depend_on_nothing_but_the_record(case: tuple[LoadedModel, Task, list[Example]]) -> None:
    """What is kept has the same bits whatever was computed with it, before it, and in how long a pass."""
    model, task, records = case
    layers = layers_of(model)

    def states(together: list[Example]) -> torch.Tensor:
        batch = collated(model, task, together)
        return layers._states(batch["input_ids"], batch["attention_mask"])

    own = [states([each])[0].clone() for each in records]
    layers.clear()
    for order in (records, records[::-1]):
        for row, record in zip(states(order), order, strict=True):
            length = len(record.input_ids)
            assert torch.equal(row[:length], own[records.index(record)])
            assert not row[length:].any()
    batch = collated(model, task, records)
    fresh = layers.afresh()
    assert torch.equal(fresh._states(batch["input_ids"], batch["attention_mask"]), states(records))
    assert len(fresh) == fresh.kept_bytes == 0


def test_isolated_gradients_have_the_same_bits_with_an_empty_and_a_full_cache(
    bert: LoadedModel,
) -> None:
    """Whether a record was seen before, or somebody with the same text, changes no bit."""
    task, records = task_of("classification"), examples_of(4)
    ready(bert)
    once = private_rows(bert, task, [a_pass([each]) for each in records], "isolated")
    again = private_rows(bert, task, [a_pass([each]) for each in records], "isolated")
    assert all(torch.equal(one, two) for one, two in zip(once, again, strict=True))
    bert.forget_records()
    twin = replace(records[0], target=(records[0].target + 1) % 3)
    beside = private_rows(bert, task, [a_pass([twin, records[2]]), a_pass([records[0]])], "isolated")
    assert torch.equal(beside[1], once[0])


def test_a_record_that_cannot_be_computed_takes_no_other_with_it(bert: LoadedModel) -> None:
    """A token of no vocabulary fails in the layers below: its record counts as zero, the others stay."""
    task, (record, *_) = task_of("classification"), examples_of(1)
    bad = replace(record, input_ids=(UNKNOWN_TOKEN, *record.input_ids))
    ready(bert)
    shape = Shape(4, 32)
    (both,) = private_rows(bert, task, [a_pass([bad, record], shape)])
    (only,) = private_rows(bert, task, [a_pass([record], shape)])
    assert not both[0].any()
    torch.testing.assert_close(both[1], only[0], atol=ROUNDING, rtol=0)
    logits, _ = forward(bert, task, [record])  # nothing that the failed pass attached is left
    torch.testing.assert_close(logits, forward(bert, task, [record], layers=layers_of(bert))[0])


def test_a_kept_state_that_is_wrong_is_found(bert: LoadedModel) -> None:
    """The pass that each round repeats takes nothing from the cache; what is kept is then forgotten."""
    task, records = task_of("classification"), examples_of(3)
    ready(bert)
    shapes = Shapes({32: (4,)})
    parameters = list(bert.adapter.parameters.values())

    def step_once() -> None:
        plan = record_plan(passes="fixed")
        optimizer = torch.optim.SGD(parameters, lr=0.0)
        with stepping(bert, task, plan, optimizer, 4, shapes=shapes) as step:
            step(alone(records))

    step_once()
    for states in layers_of(bert)._kept.values():
        states.mul_(1.001)
    with pytest.raises(NotRepeated):
        step_once()
    assert len(layers_of(bert)) == layers_of(bert).kept_bytes == 0
    step_once()


def test_the_states_used_last_stay_within_the_bound(bert: LoadedModel) -> None:
    """Bytes are counted with their keys; a record larger than the bound is computed and not kept."""
    task, width = task_of("classification"), layers_of(bert).prefix.width
    first, second, third = (Example((9 + n,) * 10, 0) for n in range(3))
    each = 10 * (8 + 4 * width)
    layers = CachedLayers(layers_of(bert).prefix, 2 * each + 1)
    for record, kept in ((first, 1), (second, 2), (first, 2), (third, 2)):
        forward(bert, task, [record], layers=layers)
        assert (len(layers), layers.kept_bytes) == (kept, kept * each)
    calls = lower_calls(bert)
    for record, computed in (
        (first, 0),
        (third, 0),
        (second, 1),
    ):  # the second was not used for longest
        forward(bert, task, [record], layers=layers)
        assert len(calls) == computed
    small = CachedLayers(layers.prefix, each - 1)
    forward(bert, task, [first], layers=small)
    assert len(small) == small.kept_bytes == 0


@pytest.mark.parametrize(
    ("memory", "bound"), [(64 << 30, 512 << 20), (2 << 30, 128 << 20), (None, 512 << 20)]
)
def test_a_small_machine_keeps_less(
    monkeypatch: pytest.MonkeyPatch, memory: int | None, bound: int
) -> None:
    """A sixteenth of the memory, 512 MiB at most."""
    monkeypatch.setattr(cached_layers, "memory_here", lambda: memory)
    assert cached_layers.most_bytes_here() == bound


def test_padding_elsewhere_is_refused(bert: LoadedModel) -> None:
    """A batch with padding on the left would get the states of other tokens."""
    inputs = {"input_ids": torch.tensor([[0, 9, 9]]), "attention_mask": torch.tensor([[0, 1, 1]])}
    with pytest.raises(TrainingError, match="not padded on the right"), layers_of(bert).serving(inputs):
        pass


def test_preference_compares_with_the_base_from_the_same_states(family_directory: Directories) -> None:
    """A batch of two rows for a record, and two passes, of which one is without the adapter."""
    directory = family_directory("llama", "causal-lm")
    model = load_family(directory, "preference", targets=last_layer(directory, "causal-lm", "native"))
    task = task_of("preference")
    records = [
        replace(
            each, rejected=Example((*each.input_ids[:3], 11, 12), targets=(*each.targets[:3], 5, 6))
        )
        for each in examples_of(3, name="causal-lm")
    ]
    expected = [gradient(model, task, each) for each in records]
    assert len(layers_of(model)) == 0
    ready(model)
    (found,) = private_rows(model, task, [a_pass(records, Shape(4, 32))])
    np.testing.assert_allclose(found, expected, atol=ROUNDING)
    assert len(layers_of(model)) == 8  # two rows of each record, and of the made-up one


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_states_keep_the_precision_of_the_base(family_directory: Directories, kind: str) -> None:
    """The noisy metric's passes compute the same scores, in half the memory if the base computes so."""
    directory = family_directory("llama", "causal-lm")
    targets = last_layer(directory, "causal-lm", "native")
    model = load_family(directory, "causal-lm", targets=targets, dtype=kind)
    task, records = task_of("causal-lm"), examples_of(4, name="causal-lm")
    model.adapter.write(random_state(model))
    plain = [forward(model, task, [each])[0] for each in records]
    cached = [forward(model, task, [each], layers=model.cached_layers)[0] for each in records]
    for one, other in zip(plain, cached, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4 if kind == "float32" else 0.05, rtol=0)
    (states, *_) = layers_of(model)._kept.values()
    assert states.dtype == getattr(torch, kind)
    count = len(layers_of(model))
    noisy_metric(model, task, records, random_state(model), record_plan(metric_noise_multiplier=1.0))
    assert len(layers_of(model)) == count


def test_without_a_layer_below_nothing_is_cached(family_directory: Directories) -> None:
    """LoRA in the first block, on a layer beside the blocks, in an encoder-decoder, or on a GPU."""
    directory = family_directory("bert", "classification")
    last = last_layer(directory, "classification", "native")
    for targets in (
        ("all-linear",),
        ("usual",),
        ("layer.0.attention.self.query",),
        (*last, "pooler.dense"),
    ):
        assert load_family(directory, "classification", targets=targets).cached_layers is None
    model = load_family(directory, "classification", targets=last)
    assert replace(model, device=torch.device("meta")).cached_layers is None
    for name, pooling in (("seq2seq", "native"), ("classification", "mean")):
        other = family_directory("t5", name)
        model = load_family(other, name, pooling, targets=last_layer(other, name, pooling))
        assert model.cached_layers is None


def test_frozen_factors_count_as_adapted(family_directory: Directories) -> None:
    """A method that trains B of the last block writes A of all blocks in every round."""
    directory = family_directory("bert", "classification")
    model = load_family(directory, "classification")
    model.adapter.train_only({key for key in model.adapter.parameters if ".layer.1." in key})
    assert prefix_of(model.adapter) is None


def test_recomputed_activations_and_unknown_bases_have_no_cache(
    family_directory: Directories, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer that forgets its activations would compute those below again in the backward pass."""
    model = loaded(family_directory, ("llama", "causal-lm", "native"))
    assert prefix_of(model.adapter) is not None
    network = model.adapter.network.get_base_model()  # type: ignore[operator]
    checkpoint_activations(network)
    try:
        assert prefix_of(model.adapter) is None
    finally:
        inner(network).activation_checkpointing_disable()
        inner(network).disable_input_require_grads()
    monkeypatch.delitem(PROVED, "llama")
    assert prefix_of(model.adapter) is None


def test_the_rehearsal_keeps_only_a_made_up_record(bert: LoadedModel) -> None:
    """It runs before anything is charged, and so before a record is read."""
    rehearse(bert, task_of("classification"), record_plan(), frozenset(bert.adapter.parameters))
    assert len(layers_of(bert)) == 1


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert"])
def test_where_only_the_head_is_trained_every_layer_is_kept(
    family_directory: Directories, family: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As without a cache; no layer of a known record is computed again; B must be zero.

    The classifier reads a mean, so one vector of a record is kept, however long it is.
    """
    directory = family_directory(family, "classification")
    base = ModelConfig(base=str(directory), device="cpu")
    task_config = TaskConfig(name="classification", pooling="normalized", max_length=32)
    classes = len(task_of("classification").labels)
    model = load.__wrapped__(base, LoraConfig(rank=1), task_config, classes, "head")
    task, records = task_of("classification"), examples_of(5, name="classification")
    shapes = {key: tuple(each.shape) for key, each in model.adapter.parameters.items()}
    model.adapter.write(initial_state(shapes, 0))
    model.adapter.train_only({key for key in shapes if part_of(key) == "head"})
    layers = layers_of(model)
    assert len(layers.prefix.below) == layers.prefix.blocks
    with torch.no_grad():
        plain = [forward(model, task, [each])[0] for each in records]
        kept = [forward(model, task, [each], layers=layers)[0] for each in records]
        calls = lower_calls(model)
        again, _ = forward(model, task, records, layers=layers)
    assert calls == []
    torch.testing.assert_close(torch.cat(kept), torch.cat(plain), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(again, torch.cat(plain), rtol=1e-5, atol=1e-6)
    vectors = {record.input_ids for record in records}
    assert layers.kept_bytes == sum(8 * len(each) + 4 * layers.prefix.width for each in vectors)
    trained = [each for each in model.adapter.parameters.values() if each.requires_grad]
    logits, batch = forward(model, task, records, layers=layers)
    for record, loss in zip(records, task.per_example_loss(logits, batch), strict=True):
        alone_logits, own = forward(model, task, [record])
        found = torch.autograd.grad(loss, trained, retain_graph=True)
        expected = torch.autograd.grad(task.per_example_loss(alone_logits, own).sum(), trained)
        np.testing.assert_allclose(flat(found), flat(expected), rtol=1e-4, atol=1e-6)
    with caplog.at_level("WARNING"):  # the bit-proof writes random adapters, and keeps B at zero
        head = frozenset(key for key in shapes if part_of(key) == "head")
        proved_shapes(model, task, head, 20, 4)
    assert "not zero" not in caplog.text
    factors = [each for key, each in model.adapter.parameters.items() if part_of(key) == "lora_B"]
    with torch.no_grad():
        factors[0].add_(1.0)
    with pytest.raises(TrainingError, match="not zero"):
        forward(model, task, records, layers=layers)
