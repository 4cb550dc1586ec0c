"""Sizes that are computed without weights are those of the loaded model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.allocations import Peak
from support.families import example_of, labels_of, load_family, random_state, ready, task_of
from support.kinds import KINDS
from support.kinds import example_of as kind_of

from fedslm.aggregation.methods import trained_keys
from fedslm.config import LoraConfig, ModelConfig, TaskConfig, TrainingConfig
from fedslm.errors import ModelError
from fedslm.models.footprint import footprint, memory, parameters
from fedslm.models.loaded import LoadedModel
from fedslm.training.batches import forward
from fedslm.training.evaluation import count

CASES = [
    ("bert", "classification", "mean"),
    ("gpt2", "causal-lm", "native"),
    ("llama", "causal-lm", "native"),
    ("modernbert", "token-classification", "native"),
    ("roberta", "classification", "native"),
    ("t5", "seq2seq", "native"),
]
LORA = LoraConfig(rank=3, alpha=6.0)


def task_config(name: str, pooling: str) -> TaskConfig:
    """The task's config."""
    return TaskConfig(name=name, pooling=pooling, max_length=32)  # type: ignore[arg-type]


def frozen(model: LoadedModel) -> list[torch.nn.Parameter]:
    """The base's own tensors: neither the adapter's nor a head's untrained original."""
    own = {id(parameter) for parameter in model.adapter.parameters.values()}
    named = model.adapter.network.named_parameters()
    return [p for name, p in named if id(p) not in own and ".original_module." not in name]


def packed_bytes(parameter: torch.nn.Parameter) -> int:
    """Bytes of a tensor with its scales."""
    own = parameter.numel() * parameter.element_size()
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return own
    return own + state.absmax.numel() + 4 * state.state2.absmax.numel()


@pytest.mark.parametrize("kind", ["none", "int8", "int4"])
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_sizes_are_those_of_the_loaded_model(
    case: tuple[str, str, str], kind: str, family_directory: Callable[[str, str], Path]
) -> None:
    """Parameters, adapter shapes and bytes, found on the meta device, equal the real ones."""
    architecture, name, pooling = case
    directory = family_directory(architecture, name)
    found = footprint(
        directory,
        ModelConfig(base=str(directory), quantization=kind),  # type: ignore[arg-type]
        LORA,
        task_config(name, pooling),
        len(labels_of(name)),
    )
    whole = load_family(directory, name, pooling)
    assert found.parameters == sum(parameter.numel() for parameter in frozen(whole))
    assert found.whole_bytes == 4 * found.parameters
    assert found.shapes == whole.adapter.read().shapes
    assert found.model_type == architecture
    small = load_family(directory, name, pooling, quantization=kind)
    assert found.base_bytes == pytest.approx(sum(map(packed_bytes, frozen(small))), rel=0.02)


def test_activations_are_right_within_a_factor_of_two(tmp_path: Path) -> None:
    """The rough estimate against what autograd really keeps for one record."""
    from support.tiny import write_base

    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
    for architecture, name in (("bert", "token-classification"), ("llama", "causal-lm")):
        directory = write_base(tmp_path / architecture, architecture, name, **sizes)
        model, task = load_family(directory, name), task_of(name)
        estimate = footprint(
            directory,
            ModelConfig(base=str(directory)),
            LORA,
            task_config(name, "native"),
            len(labels_of(name)),
        ).activation_bytes
        ready(model)
        own = {p.untyped_storage().data_ptr() for p in model.adapter.network.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor, own=own, kept=kept) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        import numpy as np

        example = example_of(name, np.random.default_rng(0), 32)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits, batch = forward(model, task, [example])
            task.per_example_loss(logits, batch).sum()
        assert 0.5 < estimate / sum(kept.values()) < 2, architecture


@pytest.mark.parametrize("name", ["causal-lm", "instruction", "preference"])
def test_an_evaluation_takes_what_is_said(
    name: str, family_directory: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a pass over many records holds at most, tensor by tensor, is right within a factor of two."""
    monkeypatch.setattr("fedslm.tasks.passes.MOST_LOGITS", 1 << 18)
    directory = family_directory("llama", "causal-lm")
    config = task_config(name, "native")
    estimate = footprint(directory, ModelConfig(base=str(directory)), LORA, config, 0).evaluation_bytes
    assert estimate < 32 * 32 * 1744 * 4  # one copy of 32 records' logits
    model = load_family(directory, "causal-lm")
    examples = [kind_of(name, (5, 6, 7, 8) * 8, at) for at in range(12)]
    with Peak() as peak:
        count(model, KINDS[name], examples, random_state(model))
    assert 0.5 < estimate / peak.bytes < 2


def test_an_evaluation_counts_long_targets_too(
    family_directory: Callable[[str, str], Path],
) -> None:
    """A pass of a sequence-to-sequence task is as long as its texts or its targets."""
    directory = family_directory("t5", "seq2seq")
    base = ModelConfig(base=str(directory))
    sizes = [
        footprint(directory, base, LORA, task, 0).evaluation_bytes
        for task in (
            TaskConfig(name="seq2seq", max_length=texts, max_target_length=targets)
            for texts, targets in ((8, 64), (64, 64), (64, 8))
        )
    ]
    assert len(set(sizes)) == 1


def test_checkpointing_and_shorter_texts_need_less(
    family_directory: Callable[[str, str], Path],
) -> None:
    """What the warnings advise does lower the estimate."""
    directory = family_directory("bert", "classification")

    def activations(length: int, forget: bool) -> int:
        model = ModelConfig(base=str(directory), gradient_checkpointing=forget)
        task = TaskConfig(name="classification", max_length=length)
        return footprint(directory, model, LORA, task, 3).activation_bytes

    assert activations(32, True) < activations(32, False)
    assert activations(16, False) < activations(32, False)


def test_memory_adds_up(family_directory: Callable[[str, str], Path]) -> None:
    """AdamW under privacy: two moments, a sum and a gradient of each trained value, and one a record."""
    directory = family_directory("llama", "causal-lm")
    model = load_family(directory, "causal-lm")
    sizes = footprint(
        directory,
        ModelConfig(base=str(directory)),
        LORA,
        task_config("causal-lm", "native"),
        0,
    )
    trained = trained_keys("ffa", sizes.shapes)
    values = sum(random_state(model)[key].size for key in trained)
    assert parameters(sizes.shapes, trained) == values
    needs = memory(
        sizes, sizes.shapes, trained, TrainingConfig(optimizer="adamw"), records=5, private=True
    )
    assert needs.optimizer == 4 * 4 * values
    assert needs.gradients == 5 * 4 * values
    assert needs.activations == 5 * sizes.activation_bytes
    assert needs.evaluation == sizes.evaluation_bytes
    training = needs.optimizer + needs.gradients + needs.activations
    assert needs.total == needs.base + needs.adapter + max(training, needs.evaluation)
    plain = memory(
        sizes, sizes.shapes, trained, TrainingConfig(optimizer="sgd"), records=5, private=False
    )
    assert (plain.optimizer, plain.gradients) == (4 * values, 0)


def test_what_cannot_be_done_is_refused_here_too(
    family_directory: Callable[[str, str], Path],
) -> None:
    """A text too long, a target that is not there, a task that the base cannot do."""
    directory = family_directory("llama", "causal-lm")
    base = ModelConfig(base=str(directory))
    for lora, task, reason in (
        (LORA, TaskConfig(name="causal-lm", max_length=129), "128 positions"),
        (LoraConfig(target_modules=("nothing",)), task_config("causal-lm", "native"), "no layer"),
        (LORA, task_config("seq2seq", "native"), "encoder with a decoder"),
    ):
        with pytest.raises(ModelError, match=reason):
            footprint(directory, base, lora, task, 0)
