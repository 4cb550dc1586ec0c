"""The bound on one unit holds with all rounding, in exact arithmetic, against gradients made to break it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from support.families import alone, examples_of, load_family, ready, record_plan, task_of, user_plan

from fedslm.privacy.plan import ExamplePlan, PrivatePlan
from fedslm.training.steps import PrivateStep, private_optimizer, stepping

HALF = 2**11  # units that fill the sum, and units that then turn rounding against it
ABOVE_ONE = (
    1 + 2.0**-19
)  # a clip norm that leaves a gradient of one as it is, but for no more than that
FLOAT32, FLOAT64 = 2.0**-24, 2.0**-53  # unit roundoffs
Gradient = list[np.ndarray]  # of one unit: one array for each parameter


def summed(plan: PrivatePlan, parts: Sequence[Sequence[Gradient]]) -> list[Fraction]:
    """The sum of micro-batches before the noise, as the optimizer of a private step holds it, exactly."""
    shapes = [each.shape for each in parts[0][0]]
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    optimizer = private_optimizer(torch.optim.SGD(parameters, lr=1.0), plan)
    seen: list[Fraction] = []

    def look(private: Any) -> None:
        for parameter in private.params:
            seen.extend(map(Fraction, parameter.summed_grad.double().flatten().tolist()))

    optimizer.attach_step_hook(look)
    for left, part in zip(range(len(parts))[::-1], parts, strict=True):
        for number, parameter in enumerate(parameters):
            rows = np.stack([unit[number] for unit in part]).astype(np.float32)
            parameter.grad_sample = torch.from_numpy(rows)  # type: ignore[attr-defined]
        optimizer.signal_skip_step(do_skip=left > 0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return seen


def cut(units: Sequence[Gradient], size: int) -> list[Sequence[Gradient]]:
    """Micro-batches of at most a size."""
    return [units[start : start + size] for start in range(0, len(units), size)]


def squared_length(vector: Sequence[Fraction]) -> Fraction:
    """The square of the L2 norm."""
    return sum((value * value for value in vector), Fraction(0))


def crafted(roundoff: float) -> list[float]:
    """Gradients of one number that fill a sum to half below a power of two, then push its rounding.

    If one more unit lifts the sum over that power, each of the later pairs lifts it once more, since
    both of its values are rounded up; without that unit, the values of a pair cancel.
    """
    step = HALF * roundoff
    pair = [step * (1 + 2.0**-20), -step * (1 - 2.0**-20)]
    return [0.5, *[1.0] * (HALF - 1), *pair * (HALF // 2)]


def scalar_sum(values: Sequence[float], size: int) -> Fraction:
    """The sum of units with one number each; those that fill the sum are one micro-batch."""
    units = [[np.array([value], dtype=np.float32)] for value in values]
    filling, pushing = units[:-HALF], units[-HALF:]
    (value,) = summed(record_plan(clip=ABOVE_ONE), [filling, *cut(pushing, size)])
    return value


def test_the_crafted_gradients_break_a_float32_sum() -> None:
    """Added up in float32, as Opacus does, one unit of length 1 moves the sum by 1.25."""
    values = np.array(crafted(FLOAT32), dtype=np.float32)
    with_one = np.add.accumulate(np.concatenate([np.ones(1, np.float32), values]))[-1]
    assert with_one - np.add.accumulate(values)[-1] == 1.25


@pytest.mark.parametrize("size", [1, 64])
@pytest.mark.parametrize("roundoff", [FLOAT32, FLOAT64])
def test_crafted_gradients_move_the_sum_by_at_most_the_clip_norm(roundoff: float, size: int) -> None:
    """One unit among 4,096 that are made to swell it in float32, or in float64, moves the sum by <= C."""
    values = crafted(roundoff)
    moved = scalar_sum([1.0, *values], size) - scalar_sum(values, size)
    assert 1 <= moved <= Fraction(ABOVE_ONE)
    if (roundoff, size) == (FLOAT64, 1):
        assert moved > 1  # rounding did add to it: it is the clip's room that holds the bound


NUMBERS = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, 1.0, -1.0, 3e38, -3e38, 1e-45, 1.0000001]),
)
UNITS = st.tuples(
    arrays.arrays(np.float32, (2, 3), elements=NUMBERS), arrays.arrays(np.float32, 4, elements=NUMBERS)
)


@settings(deadline=None, max_examples=60)
@given(
    units=st.lists(UNITS.map(list), min_size=1, max_size=9),
    place=st.integers(0, 8),
    clip=st.sampled_from([1e-6, 0.3, 1.0, 1e4]),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_any_unit_moves_the_sum_by_at_most_the_clip_norm(
    units: list[Gradient], place: int, clip: float, sizes: tuple[int, int]
) -> None:
    """Whatever finite float32 gradients are, and however both samples are cut into micro-batches."""
    plan, left_out = record_plan(clip=clip), place % len(units)
    nobody: Gradient = [np.zeros((2, 3), np.float32), np.zeros(4, np.float32)]
    others = [*units[:left_out], *units[left_out + 1 :]] or [nobody]
    sums = [summed(plan, cut(*each)) for each in ((units, sizes[0]), (others, sizes[1]))]
    pairs = zip(*sums, strict=True)
    assert squared_length([a - b for a, b in pairs]) <= Fraction(clip) ** 2


@settings(deadline=None, max_examples=60)
@given(unit=UNITS.map(list), clip=st.sampled_from([1e-6, 0.3, 1.0, 1e4]))
def test_a_clipped_gradient_is_as_long_as_the_bound_allows(unit: Gradient, clip: float) -> None:
    """A gradient that is longer than C becomes C long, less at most 2^-19 of it; a shorter one stays."""
    exact = [Fraction(float(value)) for tensor in unit for value in tensor.ravel()]
    before, after = squared_length(exact), squared_length(summed(record_plan(clip=clip), [[unit]]))
    least = (Fraction(clip) * (1 - Fraction(1, 2**19))) ** 2
    assert min(before, least) <= after <= min(before, Fraction(clip) ** 2)


@pytest.mark.parametrize("plan", [record_plan(clip=1e3), user_plan(clip=1e3)])
def test_a_step_adds_its_passes_up_in_float64(
    plan: ExamplePlan, family_directory: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model's step with a pass for each unit: the sum is that of the passes' gradients, to 2^-50."""
    model = load_family(family_directory("bert", "classification"), "classification", "mean")
    ready(model)
    parameters = list(model.adapter.parameters.values())
    passes: list[np.ndarray] = []
    found: list[torch.Tensor] = []
    real = PrivateStep._gradients

    def kept(self: PrivateStep, part: Any) -> None:
        real(self, part)
        (row,) = torch.cat([p.grad_sample.flatten(1) for p in parameters], dim=1)
        passes.append(row.double().numpy())

    monkeypatch.setattr(PrivateStep, "_gradients", kept)
    with stepping(
        model, task_of("classification"), plan, torch.optim.SGD(parameters, lr=1.0), 8
    ) as step:
        assert isinstance(step, PrivateStep)
        step.optimizer.attach_step_hook(
            lambda private: found.append(torch.cat([p.summed_grad.flatten() for p in private.params]))
        )
        records = examples_of(9, seed=2)
        step([records[:3], *alone(records[3:])])
    assert len(passes) == 7
    largest = np.abs(passes).max()
    np.testing.assert_allclose(
        found[0].numpy(), np.sum(passes, axis=0), rtol=0, atol=7 * largest * 2.0**-50
    )
