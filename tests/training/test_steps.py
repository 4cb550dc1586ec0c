"""DP-SGD steps with one record as the unit, against independent computations, on several architectures."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from support.families import (
    LABELS,
    UNKNOWN_TOKEN,
    WILD_TOKEN,
    alone,
    examples_of,
    gradient,
    load_family,
    one_step,
    own_columns,
    ready,
    record_plan,
    task_of,
)
from support.families import clipped as shortened

from fedslm.errors import PrivacyError, TrainingError
from fedslm.models.loaded import LoadedModel
from fedslm.privacy.encoding import grid_of
from fedslm.privacy.gaussian import GaussianNoise
from fedslm.privacy.plan import NoPrivacy
from fedslm.tasks.base import Example, Task
from fedslm.training.checks import check_private_model
from fedslm.training.shapes import Pass
from fedslm.training.steps import PlainStep, PrivateStep, stepping
from fedslm.training.sums import clipped, zero_non_finite

Family = tuple[LoadedModel, Task]


def test_per_record_gradients_equal_autograd(family: Family) -> None:
    """Each record's gradient in a padded batch equals autograd on that record alone, to 1e-5."""
    model, task = family
    examples = examples_of(6)
    ready(model)
    optimizer = torch.optim.SGD(list(model.adapter.parameters.values()), lr=1.0)
    with stepping(model, task, record_plan(), optimizer, 6) as step:
        assert isinstance(step, PrivateStep)
        together = own_columns(step, step.rows(Pass(tuple(examples), tuple(range(6)))))
    for row, example in enumerate(examples):
        np.testing.assert_allclose(together[row], gradient(model, task, example), atol=1e-5)


def test_sum_equals_clipped_autograd(family: Family) -> None:
    """The sum before the noise is the sum of autograd gradients, each clipped once over all tensors."""
    model, task = family
    examples = examples_of(5, seed=3)
    gradients = [gradient(model, task, example) for example in examples]
    norms = [float(np.linalg.norm(each)) for each in gradients]
    clip = float(np.median(norms))  # some are clipped, some are not
    assert min(norms) < clip < max(norms)
    exact = one_step(model, task, record_plan(clip=clip), alone(examples)).exact
    np.testing.assert_allclose(exact, sum(shortened(each, clip) for each in gradients), atol=2e-5)


def test_parameters_move_by_the_noisy_sum_over_a_constant(family: Family) -> None:
    """What is released is (sum + noise) / normaliser, whatever the number of records was."""
    model, task = family
    for count in (0, 3):
        plan = record_plan(noise=0.5, normaliser=7)
        seen = one_step(model, task, plan, alone(examples_of(count)))
        np.testing.assert_allclose(seen.moved, seen.noisy, atol=1e-6)
        noise = seen.noisy * 7 - seen.exact
        assert float(noise.std()) == pytest.approx(0.5, rel=0.2)
        assert abs(np.corrcoef(noise, seen.exact)[0, 1]) < 0.2 if count else not seen.exact.any()


def test_one_unit_is_divided_by_the_normaliser_too(family: Family) -> None:
    """A sample of one unit moves the parameters by its clipped gradient over the constant, not over 1."""
    model, task = family
    example, plan = examples_of(1, seed=2)[0], record_plan(noise=1e-7, clip=0.5, normaliser=7)
    seen = one_step(model, task, plan, alone([example]))
    expected = shortened(gradient(model, task, example), 0.5)
    assert np.linalg.norm(expected) > 0.1
    np.testing.assert_allclose(seen.moved * 7, expected, atol=1e-5)


def test_a_gradient_of_zero_adds_zero() -> None:
    """A unit whose gradient is zero is not divided by its norm: it adds zero, and the others stay."""
    samples = torch.tensor([[0.0, 0.0, 0.0], [3.0, 0.0, 4.0]])
    zero, other = clipped(samples, 1.0) * grid_of(1.0)
    assert not zero.any()
    np.testing.assert_allclose(other, [0.6, 0.0, 0.8], rtol=1e-5)
    assert not clipped(samples[:1], 1e-6).any()


def test_a_unit_without_records_is_refused(family: Family) -> None:
    """A unit of no records, which no plan makes, raises before a pass and leaves the parameters."""
    model, task = family
    start = ready(model)
    optimizer = torch.optim.SGD(list(model.adapter.parameters.values()), lr=1.0)
    with (
        stepping(model, task, record_plan(), optimizer, 4) as step,
        pytest.raises(PrivacyError, match="has 0 records"),
    ):
        step([*alone(examples_of(2)), []])
    assert model.adapter.read().sha256() == start.sha256()


def test_micro_batches_do_not_change_the_sum(family: Family) -> None:
    """One shared pass of 8, or 8 passes of 1: the same sum to rounding."""
    model, task = family
    units, plan = alone(examples_of(8, seed=5)), record_plan(passes="shared")
    whole, split = (one_step(model, task, plan, units, size).exact for size in (8, 1))
    np.testing.assert_allclose(whole, split, atol=1e-5)


def adversarial_pairs() -> dict[str, tuple[list[Example], Example]]:
    """A data set, and one record that is added to it."""
    base = examples_of(4, seed=7)
    long, short = Example(tuple(range(10, 40)), 1), Example((5, 6), 0)
    infinite, failing = Example((7, WILD_TOKEN, 9), 2), Example((5, UNKNOWN_TOKEN, 7), 0)
    return {
        "long among short": ([short] * 4, long),
        "short among long": ([long] * 3, short),
        "duplicated": (base, base[0]),
        "first record": ([], long),
        "not finite": (base, infinite),
        "not finite alone": ([], infinite),
        "not computable": (base, failing),
        "not computable alone": ([], failing),
    }


@pytest.mark.parametrize("pair", list(adversarial_pairs()))
def test_neighbours_differ_by_at_most_the_clip_norm(wild: Family, pair: str) -> None:
    """Adding or removing one record, also an infinite one, moves the pre-noise sum by at most C."""
    model, task = wild
    others, extra = adversarial_pairs()[pair]
    plan = record_plan(clip=0.3)
    with_one = one_step(model, task, plan, alone([*others, extra])).exact
    moved = with_one - one_step(model, task, plan, alone(others)).exact
    assert np.isfinite(moved).all()
    assert np.linalg.norm(moved) <= 0.3 * (1 + 1e-4)
    if pair.startswith("not"):
        assert np.linalg.norm(moved) < 1e-5
    else:
        assert np.linalg.norm(moved) > 0.01 * 0.3


def test_noise_is_calibrated_with_power(family: Family) -> None:
    """A noise-only step passes KS for sigma and fails for 2/3 and 3/2 of it; an empty batch is a step."""
    model, task = family
    noise = one_step(model, task, record_plan(noise=1.5, clip=0.4, normaliser=8), []).moved * 8
    assert len(noise) > 1000
    passed = {f: stats.kstest(noise / (1.5 * 0.4 * f), "norm").pvalue for f in (1, 2 / 3, 3 / 2)}
    assert passed[1] > 1e-4
    assert passed[2 / 3] < 1e-9
    assert passed[3 / 2] < 1e-9


def test_noise_ignores_every_seed(family: Family) -> None:
    """The same seeds of torch, NumPy and random before two steps give different noise."""
    model, task = family
    drawn = []
    for _ in range(2):
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)
        drawn.append(one_step(model, task, record_plan(), []).moved)
    assert np.abs(drawn[0] - drawn[1]).mean() > 0.1
    assert abs(np.corrcoef(*drawn)[0, 1]) < 0.2


def test_noise_is_fresh_in_every_step_and_tensor(family: Family) -> None:
    """Two steps of one round, and two tensors of one shape, never get the same noise."""
    model, task = family
    start = ready(model)
    optimizer = torch.optim.SGD(list(model.adapter.parameters.values()), lr=1.0)
    noises: list[np.ndarray] = []
    with stepping(model, task, record_plan(), optimizer, 4) as step:
        for _ in range(2):
            step([])
            noises += [p.grad.numpy().ravel().copy() for p in model.adapter.parameters.values()]
    assert len(noises) == 2 * len(start)
    values = np.concatenate(noises)
    assert len(np.unique(values)) > 0.99 * len(values)


@pytest.mark.parametrize("changed", [0, 31])
def test_noise_has_256_bits(family: Family, monkeypatch: pytest.MonkeyPatch, changed: int) -> None:
    """Noise is a function of 256 bits of the operating system and nothing else: any byte changes it."""
    model, task = family

    def noise(key: bytes) -> np.ndarray:
        fake = SimpleNamespace(urandom=lambda size: key[:size], getpid=os.getpid)
        monkeypatch.setattr("fedslm.privacy.randomness.os", fake)
        return one_step(model, task, record_plan(), []).moved

    key = bytes(range(32))
    other = bytes(byte ^ (number == changed) for number, byte in enumerate(key))
    np.testing.assert_array_equal(noise(key), noise(key))
    assert abs(np.corrcoef(noise(key), noise(other))[0, 1]) < 0.2


def test_noise_is_added_on_the_grid(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is released is round((sum + noise) / grid) steps of the grid, rounded once to float32."""
    model, task = family
    drawn: list[np.ndarray] = []
    draw = GaussianNoise.draw

    def kept(self: GaussianNoise, shape: tuple[int, ...], stddev: float) -> np.ndarray:
        drawn.append(draw(self, shape, stddev))
        return drawn[-1]

    monkeypatch.setattr(GaussianNoise, "draw", kept)
    seen = one_step(model, task, record_plan(), alone(examples_of(2)))
    noise = np.concatenate([each.ravel() for each in drawn])
    assert noise.dtype == np.float64
    grid = grid_of(1.0)
    whole = [round(Fraction(value) / Fraction(grid)) for value in seen.exact]
    assert [step * grid for step in whole] == seen.exact.tolist()
    expected = [
        round(Fraction(step) + Fraction(value) / Fraction(grid))
        for step, value in zip(whole, noise.tolist(), strict=True)
    ]
    released = (np.array(expected, dtype=np.float64) * grid).astype(np.float32)
    np.testing.assert_array_equal(seen.noisy.astype(np.float32), released)


def test_non_finite_records_are_zeroed_and_counted() -> None:
    """A record with one NaN or infinity anywhere is zero everywhere; the others stay."""
    rows = torch.ones(3, 6)
    rows[1, 0], rows[2, 3] = torch.nan, -torch.inf
    assert zero_non_finite(rows) == 2
    assert rows.sum(dim=1).tolist() == [6, 0, 0]


def test_record_that_cannot_be_computed_counts_as_zero(family: Family) -> None:
    """A record that makes the forward pass raise changes nothing, and nothing of it stays behind."""
    model, task = family
    good = examples_of(3, seed=9)
    bad = Example((5, UNKNOWN_TOKEN, 7), 0)
    with_bad = one_step(model, task, record_plan(), alone([*good, bad])).exact
    without = one_step(model, task, record_plan(), alone(good)).exact
    assert np.linalg.norm(without) > 0.1
    np.testing.assert_allclose(with_bad, without, atol=1e-5)
    assert not one_step(model, task, record_plan(), alone([bad])).exact.any()
    assert not any("activations" in module.__dict__ for module in model.adapter.network.modules())


def test_plain_step_is_the_mean_gradient(family: Family) -> None:
    """Without privacy a step is the mean of autograd gradients, however it is cut, and no more."""
    model, task = family
    examples = examples_of(5, seed=4)
    expected = sum(gradient(model, task, example) for example in examples) / 5
    for size in (2, 5):
        start = ready(model)
        optimizer = torch.optim.SGD(list(model.adapter.parameters.values()), lr=1.0)
        with stepping(model, task, NoPrivacy(5, 1), optimizer, size) as step:
            assert isinstance(step, PlainStep)
            step(alone(examples))
        after = model.adapter.read()
        moved = np.concatenate([(start[k].astype(np.float64) - after[k]).ravel() for k in start])
        np.testing.assert_allclose(moved, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_base_that_couples_records_is_refused(
    family_directory: Callable[[str, str], Path], kind: str
) -> None:
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
    """Where units share a pass, a loss that merges them into one row is refused."""
    model = load_family(family_directory("bert", "classification"), "classification")
    task = task_of("classification")

    class Merged:
        """A task that packs all records into one row."""

        labels = LABELS
        rows_per_example = 1
        uses_base = False

        def collate(self, examples: Sequence[Example], pad_token_id: int):
            tokens = tuple(token for example in examples for token in example.input_ids)
            return task.collate([Example(tokens, 0)], pad_token_id)

        per_example_loss = staticmethod(task.per_example_loss)

    with pytest.raises(TrainingError, match="do not match the batch"):
        one_step(model, Merged(), record_plan(passes="shared"), alone(examples_of(3)))  # type: ignore[arg-type]
