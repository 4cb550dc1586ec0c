"""DP-SGD steps against independent computations, on several architectures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from families import examples_of, load_family, random_state, task_of
from scipy import stats

from fedslm.errors import PrivacyError, TrainingError
from fedslm.models.loaded import LoadedModel
from fedslm.privacy.gaussian import GaussianNoise
from fedslm.privacy.plan import ExamplePlan
from fedslm.tasks.base import Example, Task
from fedslm.training.batches import forward
from fedslm.training.checks import check_private_model
from fedslm.training.steps import PrivateStep, stepping, zero_non_finite

FAMILIES = [
    ("bert", "classification", "native"),
    ("bert", "classification", "mean"),
    ("gpt2", "causal-lm", "native"),
    ("llama", "causal-lm", "native"),
]


def plan_of(noise: float = 1e-9, clip: float = 1.0, normaliser: int = 1) -> ExamplePlan:
    """A plan whose noise may be too small to see; only tests may make one."""
    return ExamplePlan(8.0, 1e-5, clip, noise, 0.5, normaliser, 1)


def delta(
    model: LoadedModel, task: Task, plan: ExamplePlan, examples: Sequence[Example], size: int = 4
) -> np.ndarray:
    """One step of SGD at rate 1 from a fixed adapter: minus the released (noisy) mean."""
    start = random_state(model)
    model.adapter.write(start)
    keys = set(start)
    model.adapter.train_only(keys)
    for module in model.adapter.network.modules():
        module.training = any(p.requires_grad for p in module.parameters(recurse=False))
    optimizer = torch.optim.SGD(list(model.adapter.parameters.values()), lr=1.0)
    with stepping(model, task, plan, optimizer, size) as step:
        step(examples)
    after = model.adapter.read()
    return np.concatenate([(start[key].astype(np.float64) - after[key]).ravel() for key in start])


def gradient(model: LoadedModel, task: Task, example: Example) -> np.ndarray:
    """One record's gradient by plain autograd on a batch of one."""
    model.adapter.network.zero_grad()
    logits, batch = forward(model, task, [example])
    task.per_example_loss(logits, batch).sum().backward()
    return np.concatenate([p.grad.double().numpy().ravel() for p in model.adapter.parameters.values()])


@pytest.fixture(params=FAMILIES, ids=lambda family: "-".join(family))
def family(request: pytest.FixtureRequest, family_directory: Callable[[str, str], Path]):
    """A loaded model and its task."""
    architecture, task, pooling = request.param
    return load_family(family_directory(architecture, task), task, pooling), task_of(task)


def test_per_record_gradients_equal_autograd(family) -> None:
    """Each record's gradient in a padded batch equals autograd on that record alone, to 1e-5."""
    model, task = family
    examples = examples_of(6)
    start = random_state(model)
    model.adapter.write(start)
    model.adapter.train_only(set(start))
    for module in model.adapter.network.modules():
        module.training = any(p.requires_grad for p in module.parameters(recurse=False))
    optimizer = torch.optim.SGD(list(model.adapter.parameters.values()), lr=1.0)
    with stepping(model, task, plan_of(), optimizer, 6) as step:
        assert isinstance(step, PrivateStep)
        step._gradients(examples)
        samples = [p.grad_sample.flatten(1) for p in model.adapter.parameters.values()]
        together = torch.cat(samples, dim=1).double().numpy()
    for row, example in enumerate(examples):
        np.testing.assert_allclose(together[row], gradient(model, task, example), atol=1e-5)


def test_sum_equals_clipped_autograd(family) -> None:
    """The released sum is the sum of autograd gradients, each clipped once over all tensors."""
    model, task = family
    examples = examples_of(5, seed=3)
    released = delta(model, task, plan_of(clip=0.5), examples)
    expected = np.zeros_like(released)
    for example in examples:
        single = gradient_at_start(model, task, example)
        expected += single * min(1.0, 0.5 / (np.linalg.norm(single) + 1e-6))
    np.testing.assert_allclose(released, expected, atol=2e-5)


def gradient_at_start(model: LoadedModel, task: Task, example: Example) -> np.ndarray:
    """The gradient at the adapter that :func:`delta` starts from."""
    model.adapter.write(random_state(model))
    return gradient(model, task, example)


def test_micro_batches_do_not_change_the_sum(family) -> None:
    """One micro-batch of 8, or 8 of 1: the same sum to rounding."""
    model, task = family
    examples = examples_of(8, seed=5)
    whole, split = (delta(model, task, plan_of(), examples, size) for size in (8, 1))
    np.testing.assert_allclose(whole, split, atol=1e-5)


def adversarial_pairs(task_name: str) -> dict[str, tuple[list[Example], list[Example]]]:
    """Neighbouring data sets that differ in one record."""
    base = examples_of(4, seed=7)
    long = Example(tuple(range(10, 40)), 1)
    short = Example((5, 6), 0)
    return {
        "long among short": ([short] * 4, [*[short] * 4, long]),
        "short among long": ([long] * 3, [*[long] * 3, short]),
        "duplicated": (base, [*base, base[0]]),
        "first record": ([], [long]),
        "not finite": (base, [*base, Example((7, 8, 9), 2)]),
        "not finite alone": ([], [Example((7, 8, 9), 2)]),
    }


@pytest.mark.parametrize("pair", list(adversarial_pairs("")))
def test_neighbours_differ_by_at_most_the_clip_norm(family, pair: str) -> None:
    """Adding or removing one record, also an infinite one, moves the pre-noise sum by at most C."""
    model, task = family
    without, with_one = adversarial_pairs("")[pair]
    weight = _embedding(model) if pair.startswith("not") else None
    clip = 0.3
    if weight is not None:
        kept = weight[8].clone()
        weight[8] = torch.inf
    try:
        plan = plan_of(clip=clip)
        moved = delta(model, task, plan, with_one) - delta(model, task, plan, without)
    finally:
        if weight is not None:
            weight[8] = kept
    assert np.isfinite(moved).all()
    assert np.linalg.norm(moved) <= clip * (1 + 1e-4)
    if pair.startswith("not"):
        assert np.linalg.norm(moved) < 1e-5
    else:
        assert np.linalg.norm(moved) > 0.01 * clip


def _embedding(model: LoadedModel) -> torch.Tensor:
    """The token embedding of the frozen base."""
    modules = dict(model.adapter.network.named_modules())
    names = [name for name in modules if name.endswith(("word_embeddings", "wte", "embed_tokens"))]
    return modules[names[0]].weight.data


def test_noise_is_calibrated_with_power(family) -> None:
    """A noise-only step passes KS for sigma and fails for 2/3 and 3/2 of it; an empty batch is a step."""
    model, task = family
    plan = plan_of(noise=1.5, clip=0.4, normaliser=8)
    noise = delta(model, task, plan, []) * 8
    assert len(noise) > 1000
    passed = {f: stats.kstest(noise / (1.5 * 0.4 * f), "norm").pvalue for f in (1, 2 / 3, 3 / 2)}
    assert passed[1] > 1e-4
    assert passed[2 / 3] < 1e-9
    assert passed[3 / 2] < 1e-9


def test_noise_ignores_every_seed(family) -> None:
    """The same manual_seed before two steps gives different noise."""
    model, task = family
    drawn = []
    for _ in range(2):
        torch.manual_seed(1)
        np.random.seed(1)
        drawn.append(delta(model, task, plan_of(noise=1.0), []))
    assert np.abs(drawn[0] - drawn[1]).mean() > 0.1
    assert abs(np.corrcoef(*drawn)[0, 1]) < 0.2


def test_non_finite_records_are_zeroed_and_counted() -> None:
    """A record with one NaN or infinity in any tensor is zero in all tensors; the others stay."""
    first, second = torch.ones(3, 2), torch.ones(3, 4)
    first[1, 0] = torch.nan
    second[2, 3] = -torch.inf
    assert zero_non_finite([first, second]) == 2
    assert first.sum() == 2
    assert second.sum() == 4


def test_noise_has_more_than_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds that differ only above bit 32 give other noise (torch's CPU generator drops those bits)."""
    drawn = []
    for seed in (1, 1 + (1 << 32), 1 + (1 << 200)):
        monkeypatch.setattr(
            "fedslm.privacy.gaussian.operating_system_seed", lambda bits, seed=seed: seed
        )
        drawn.append(GaussianNoise().draw((4,), 1.0).tolist())
    assert drawn[0] != drawn[1] != drawn[2] != drawn[0]


def test_record_that_cannot_be_computed_counts_as_zero(family) -> None:
    """A record that makes the forward pass raise changes nothing, and nothing of it stays behind."""
    model, task = family
    good = examples_of(3, seed=9)
    bad = Example((5, 10**6, 7), 0)
    with_bad = delta(model, task, plan_of(), [*good, bad])
    np.testing.assert_allclose(with_bad, delta(model, task, plan_of(), good), atol=1e-5)
    assert not delta(model, task, plan_of(), [bad]).round(5).any()
    assert not any("activations" in module.__dict__ for module in model.adapter.network.modules())


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_base_that_couples_records_is_refused(family_directory, kind: str) -> None:
    """A position encoding that looks at the longest record of the batch gets no private training."""
    model = load_family(family_directory("llama", "causal-lm"), "causal-lm")
    config = model.adapter.network.config
    kept = config.rope_parameters
    try:
        for found in ({"rope_type": kind}, {"full_attention": {"rope_type": kind}}):
            config.rope_parameters = found
            with pytest.raises(PrivacyError, match="couples records"):
                check_private_model(model.adapter.network)
    finally:
        config.rope_parameters = kept
    check_private_model(model.adapter.network)


def test_coupled_records_are_refused(family_directory: Callable[[str, str], Path]) -> None:
    """A loss that merges the batch into one row gives gradients for one record: refused."""
    model = load_family(family_directory("bert", "classification"), "classification")
    task = task_of("classification")

    class Merged:
        """A task that packs all records into one row."""

        def collate(self, examples: Sequence[Example], pad_token_id: int):
            tokens = tuple(token for example in examples for token in example.input_ids)
            return task.collate([Example(tokens, 0)], pad_token_id)

        per_example_loss = staticmethod(task.per_example_loss)

    with pytest.raises(TrainingError, match="do not match the batch"):
        delta(model, Merged(), plan_of(), examples_of(3))
