"""Main directions of layers' inputs: against a dense decomposition and against PEFT's own EVA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support.extras import load_with, random_deltas, random_whole
from support.families import examples_of, task_of
from support.tiny import write_base

from fedslm.adapter_keys import key_of, layers_of, part_of
from fedslm.config import LoraConfig
from fedslm.errors import ModelError
from fedslm.models import activations
from fedslm.models.activations import eva_state, input_directions
from fedslm.models.base import DEMO_DIRECTORY
from fedslm.models.initial import initial_state
from fedslm.models.loaded import LoadedModel
from fedslm.models.pooling import MeanPoolingClassifier
from fedslm.records import AdapterState
from fedslm.tasks.base import INPUTS, Example

LORA = LoraConfig(rank=3, alpha=3.0)
FAMILIES = [
    ("bert", "classification"),  # its pooler sees one row for each text
    ("bert", "token-classification"),
    ("gpt2", "causal-lm"),
    ("llama", "causal-lm"),
    ("modernbert", "classification"),
    ("t5", "seq2seq"),
]


@pytest.fixture(params=FAMILIES, ids=lambda family: "-".join(family))
def case(
    request: pytest.FixtureRequest, family_directory: Callable[[str, str], Path]
) -> tuple[LoadedModel, str]:
    """A model with an adapter in general position and a delta, which must not matter; its task."""
    model = load_with(family_directory(*request.param), request.param[1], LORA)
    model.adapter.write(random_whole(model).merged(random_deltas(model)))
    return model, request.param[1]


def inputs_alone(model: LoadedModel, name: str, examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """What each layer sees of the bare base, one example at a time: there is no padding at all."""
    modules: dict[str, Any] = dict(model.adapter.network.named_modules())
    rows: dict[str, list[np.ndarray]] = {layer: [] for layer in layers_of(model.adapter.parameters)}

    def keep(layer: str, _: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        rows[layer].append(inputs[0].double().numpy().reshape(-1, inputs[0].shape[-1]))

    handles = [modules[x].base_layer.register_forward_pre_hook(partial(keep, x)) for x in rows]
    with torch.no_grad(), model.adapter.disabled():
        for example in examples:
            batch = task_of(name).collate([example], 0)
            model.adapter.network(**{key: batch[key] for key in INPUTS if key in batch})
    for handle in handles:
        handle.remove()
    return {layer: np.concatenate(each) for layer, each in rows.items()}


def kept(rows: np.ndarray, inputs: np.ndarray) -> float:
    """Share of the inputs' square that orthonormal rows pass on."""
    return float(np.square(inputs @ rows.T).sum() / np.square(inputs).sum())


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Cosines of the principal angles between two row spaces."""
    bases = [np.linalg.qr(rows.T.astype(np.float64))[0] for rows in (one, other)]
    return np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)


def test_directions_are_singular_vectors_of_real_tokens(case: tuple[LoadedModel, str]) -> None:
    """They are those of a dense decomposition of unpadded inputs, in order, with the sign that is fixed."""
    model, name = case
    examples = examples_of(37, name=name)
    found = input_directions(model, task_of(name), examples, 3)
    assert sorted(found) == layers_of(model.adapter.parameters)
    for layer, inputs in inputs_alone(model, name, examples).items():
        rows = found[layer]
        _, values, vectors = np.linalg.svd(inputs, full_matrices=False)
        assert rows.dtype == np.float32
        np.testing.assert_allclose(rows @ rows.T, np.eye(3), atol=1e-6)
        assert (rows.max(axis=1) == np.abs(rows).max(axis=1)).all()
        best = np.square(values[:3]).sum() / np.square(values).sum()
        assert kept(rows, inputs) == pytest.approx(best, abs=1e-5)
        gaps = values[:3] - values[1:4]
        apart = [k for k in range(3) if min(gaps[max(k - 1, 0) : k + 1]) > 0.02 * values[0]]
        assert np.abs(np.sum(rows * vectors[:3], axis=1))[apart] == pytest.approx(1, abs=1e-4)


def test_an_encoder_is_not_taken_for_its_decoder(
    family_directory: Callable[[str, str], Path],
) -> None:
    """Where texts and answers are padded to one length, each layer still gets its own mask."""
    model = load_with(family_directory("t5", "seq2seq"), "seq2seq", LORA)
    generator = np.random.default_rng(3)
    words = [tuple(int(word) for word in generator.integers(9, 1700, 9)) for _ in range(4)]
    lengths = [(9, 2), (3, 9), (5, 5), (2, 7)]
    examples = [
        Example(word[:text], targets=word[::-1][:answer])
        for word, (text, answer) in zip(words, lengths, strict=True)
    ]
    found = input_directions(model, task_of("seq2seq"), examples, 3)
    for layer, inputs in inputs_alone(model, "seq2seq", examples).items():
        values = np.linalg.svd(inputs, compute_uv=False)
        best = np.square(values[:3]).sum() / np.square(values).sum()
        assert kept(found[layer], inputs) == pytest.approx(best, abs=1e-5)


def test_directions_are_those_of_peft() -> None:
    """PEFT's initialize_lora_eva_weights finds the same spaces. It centres, so it is given ±x."""
    import peft
    from peft.tuners.lora import eva

    def both_signs(layer_input: Any, model_input: Any, layer_name: str) -> torch.Tensor:
        rows = eva.prepare_layer_inputs_fn_language_modeling(layer_input, model_input, layer_name)
        return torch.cat([rows, -rows])

    name, examples = "classification", examples_of(40)
    model = load_with(DEMO_DIRECTORY, name, LORA, pooling="mean")
    layers = layers_of(model.adapter.parameters)
    base = transformers.AutoModel.from_pretrained(DEMO_DIRECTORY, dtype=torch.float32)
    theirs: Any = peft.get_peft_model(
        MeanPoolingClassifier(base, 3),
        peft.LoraConfig(
            r=3,
            target_modules=[layer.removeprefix("base_model.model.") for layer in layers],
            init_lora_weights="eva",
            eva_config=peft.EvaConfig(rho=1.0, tau=0.99999),
        ),
    )
    batch = task_of(name).collate(examples, 0)
    peft.initialize_lora_eva_weights(
        theirs,
        [{key: batch[key] for key in ("input_ids", "attention_mask")}],
        prepare_layer_inputs_fn=both_signs,
        show_progress_bar=False,
    )
    found, seen = (
        input_directions(model, task_of(name), examples, 3),
        inputs_alone(model, name, examples),
    )
    modules = dict(theirs.named_modules())
    for layer in layers:
        rows = modules[layer].lora_A["default"].weight.detach().numpy()
        values = np.linalg.svd(seen[layer], compute_uv=False)
        best = kept(found[layer], seen[layer])
        assert 0.997 * best < kept(np.linalg.qr(rows.T)[0].T, seen[layer]) < best + 1e-6
        angles = cosines(found[layer], rows)
        assert angles[1] > 0.999
        if values[3] < 0.95 * values[2]:  # else the third direction is hardly defined
            assert angles[2] > 0.99


def test_batches_and_passes_do_not_matter(
    case: tuple[LoadedModel, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One example at a time, or one layer at a time: the same rows; twice the same call: the same bits."""
    model, name = case
    task, examples = task_of(name), examples_of(11, name=name)
    found = input_directions(model, task, examples, 2)
    again = input_directions(model, task, examples, 2)
    assert all(np.array_equal(found[layer], again[layer]) for layer in found)
    monkeypatch.setattr(activations, "_MOMENTS_BYTES", 1)
    one_layer = input_directions(model, task, examples, 2)
    assert all(np.array_equal(found[layer], one_layer[layer]) for layer in found)
    for device in ("CPU", "GPU"):
        monkeypatch.setattr(f"fedslm.tasks.passes.{device}_TOKENS", 1)
    alone = input_directions(model, task, examples, 2)
    for layer, inputs in inputs_alone(model, name, examples).items():
        assert kept(alone[layer], inputs) == pytest.approx(kept(found[layer], inputs), abs=1e-5)


def test_the_model_is_left_as_it_was(case: tuple[LoadedModel, str]) -> None:
    """Adapter, deltas, trained tensors, modes and hooks are those of before; the adapter had no say."""
    model, name = case
    task, examples = task_of(name), examples_of(5, name=name)
    network: Any = model.adapter.network
    model.adapter.train_only({key for key in model.adapter.parameters if part_of(key) == "lora_B"})
    network.train()
    before = (model.adapter.read().sha256(), len(model.adapter.deltas), state_of(network))
    found = input_directions(model, task, examples, 2)
    assert (model.adapter.read().sha256(), len(model.adapter.deltas), state_of(network)) == before
    model.adapter.write(random_whole(model, seed=7))
    without = input_directions(model, task, examples, 2)
    assert all(np.array_equal(found[layer], without[layer]) for layer in found)


def state_of(network: Any) -> list[tuple[Any, ...]]:
    """Modes and numbers of hooks, and what is trained."""
    modules = [
        (m.training, len(m._forward_pre_hooks), len(m._forward_hooks)) for m in network.modules()
    ]
    return [*modules, *((parameter.requires_grad,) for parameter in network.parameters())]


def test_few_tokens_are_completed_by_seeded_rows(
    family_directory: Callable[[str, str], Path],
) -> None:
    """One text of three tokens spans three directions; A has five orthonormal rows, these first."""
    lora = LoraConfig(rank=5)
    model = load_with(family_directory("llama", "causal-lm"), "causal-lm", lora)
    initial = initial_state(model.adapter.read().shapes, 0)
    found = input_directions(model, task_of("causal-lm"), [Example((9, 10, 11), targets=(1, 2, 3))], 5)
    state = eva_state(initial, found)
    assert {len(rows) for rows in found.values()} == {3}
    assert set(state) == set(initial)
    for key in state:
        if part_of(key) != "lora_A":
            assert np.array_equal(state[key], initial[key])
            continue
        np.testing.assert_allclose(state[key] @ state[key].T, np.eye(5), atol=1e-6)
        rows = found[key.removesuffix(".lora_A.weight")]
        assert np.array_equal(state[key][:3], rows)
        span = np.vstack([rows, initial[key]])
        assert np.linalg.matrix_rank(np.vstack([span, state[key]]), tol=1e-4) == len(span)
    assert eva_state(initial, found).sha256() == state.sha256()


def test_enough_tokens_are_the_directions_alone(
    family_directory: Callable[[str, str], Path],
) -> None:
    """With as many directions as the rank, A is the directions, whatever the seed was."""
    model = load_with(family_directory("gpt2", "causal-lm"), "causal-lm", LORA)
    found = input_directions(model, task_of("causal-lm"), examples_of(8, name="causal-lm"), 3)
    for seed in (0, 1):
        state = eva_state(initial_state(model.adapter.read().shapes, seed), found)
        assert all(np.array_equal(state[key_of(layer, "lora_A")], found[layer]) for layer in found)


def test_a_rank_beyond_the_width_leaves_zeros() -> None:
    """A layer four wide has four directions; the other rows of a rank of six are zero."""
    initial = initial_state({"q.lora_A.weight": (6, 4)}, 0)
    state = eva_state(initial, {"q": initial["q.lora_A.weight"][1:3]})
    down = state["q.lora_A.weight"]
    np.testing.assert_allclose(down @ down.T, np.diag([1.0] * 4 + [0.0] * 2), atol=1e-6)


def test_directions_of_another_model_are_refused() -> None:
    """A layer without directions, of another width, or unknown is an error that names it."""
    initial = initial_state({"q.lora_A.weight": (2, 4), "q.lora_B.weight": (4, 2)}, 0)
    rows = initial["q.lora_A.weight"]
    for wrong in ({}, {"q": rows[:, :3]}, {"q": np.vstack([rows, rows])}, {"q": rows, "k": rows}):
        with pytest.raises(ModelError, match=r"[qk]\.lora_A\.weight"):
            eva_state(initial, wrong)


def test_without_examples_or_with_too_wide_a_layer_it_is_refused(tmp_path: Path) -> None:
    """No examples, or a layer whose square would be too large: an error that says what to use."""
    model = load_with(
        write_base(tmp_path, "llama", "causal-lm", intermediate_size=4100), "causal-lm", LORA
    )
    examples, task = examples_of(2, name="causal-lm"), task_of("causal-lm")
    with pytest.raises(ModelError, match=r"down_proj has 4100 inputs.*orthonormal"):
        input_directions(model, task, examples, 2)
    with pytest.raises(ModelError, match="public examples"):
        input_directions(model, task, [], 2)
    narrow = LORA.model_copy(update={"target_modules": ("q_proj",)})
    assert input_directions(load_with(tmp_path, "causal-lm", narrow), task, examples, 2)


def test_half_a_base_gives_about_the_same(family_directory: Callable[[str, str], Path]) -> None:
    """A bfloat16 base keeps as much of the inputs as the whole one, within its rounding."""
    directory, name = family_directory("llama", "causal-lm"), "causal-lm"
    task, examples = task_of(name), examples_of(12, name=name)
    whole = load_with(directory, name, LORA)
    half = input_directions(load_with(directory, name, LORA, dtype="bfloat16"), task, examples, 3)
    best = input_directions(whole, task, examples, 3)
    for layer, inputs in inputs_alone(whole, name, examples).items():
        assert kept(half[layer], inputs) == pytest.approx(kept(best[layer], inputs), abs=0.01)


def test_an_infinite_input_is_an_error(family_directory: Callable[[str, str], Path]) -> None:
    """A base that overflows on a public example gives no silent rows of NaN."""
    model = load_with(family_directory("llama", "causal-lm"), "causal-lm", LORA)
    with torch.no_grad():
        model.adapter.network.get_input_embeddings().weight[9] = torch.inf  # type: ignore[operator]
    with pytest.raises(ModelError, match="not finite"):
        input_directions(model, task_of("causal-lm"), [Example((9, 10), targets=(1, 2))], 2)
    assert isinstance(model.adapter.read(), AdapterState)
