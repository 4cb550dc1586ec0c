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
from support.families import (
    alone,
    examples_of,
    load_family,
    one_step,
    own_columns,
    ready,
    record_plan,
    task_of,
)

from fedslm.privacy.encoding import grid_of
from fedslm.privacy.plan import PrivatePlan
from fedslm.training.noisy_optimizer import private_optimizer
from fedslm.training.shapes import Pass
from fedslm.training.steps import PrivateStep, stepping
from fedslm.training.sums import clipped, on_grid

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
    assert moved == 1  # to the last bit: no rounding adds to it


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
    """A gradient longer than C becomes C long, less at most 2^-19 of it; a shorter one moves to the grid."""
    exact = [Fraction(float(value)) for tensor in unit for value in tensor.ravel()]
    found, bound = summed(record_plan(clip=clip), [[unit]]), Fraction(clip) * (1 - Fraction(1, 2**19))
    assert squared_length(found) <= Fraction(clip) ** 2
    if squared_length(exact) > bound**2:
        assert squared_length(found) >= bound**2
    else:
        half = Fraction(grid_of(clip)) / 2
        assert all(abs(a - b) <= half for a, b in zip(exact, found, strict=True))


SEQUENCES = (11, 14)  # n = 4,098 and 16,398 units


def drifting(bits: int) -> list[float]:
    """Gradients of one number whose float32 sum stops below 2^bits, unless one more unit lifts it over."""
    top, ulp = 2.0**bits, 2.0 ** (bits - 24)
    count = int(top / 0.999)
    step = float(np.float32((top - 0.5) / count))
    return [step] * count + [3 * ulp, -ulp, -ulp, -ulp] * (count // 4)


@pytest.mark.parametrize("bits", SEQUENCES)
def test_long_sequences_move_the_sum_by_at_most_the_clip_norm_in_any_order(bits: int) -> None:
    """In float32 one unit moves such a sum by more than C; on the grid by at most C, and order is nothing."""
    values = drifting(bits)
    with_one = [0.999, *values]
    float32 = [np.add.accumulate(np.array(each, np.float32))[-1] for each in (values, with_one)]
    assert float32[1] - float32[0] > 1.2
    before, after = (one_number(each, 64) for each in (values, with_one))
    assert 0.99 < after - before <= 1
    assert one_number(with_one[::-1], 7) == after
    shuffled = np.random.default_rng(0).permutation(with_one).tolist()
    assert one_number(shuffled, 1000) == after


def one_number(values: Sequence[float], size: int) -> Fraction:
    """The sum of units with one number each, at a clip norm of 1."""
    units = [[np.array([value], dtype=np.float32)] for value in values]
    (total,) = summed(record_plan(), cut(units, size))
    return total


@settings(deadline=None, max_examples=40)
@given(
    records=st.lists(UNITS.map(list), min_size=1, max_size=9),
    clip=st.sampled_from([1e-6, 0.3, 1e4]),
    seed=st.integers(0, 99),
)
def test_a_unit_sums_its_records_alike_in_any_order(
    records: list[Gradient], clip: float, seed: int
) -> None:
    """However the records of a unit are ordered and cut, their sum is the same integer vector."""
    rows = torch.from_numpy(np.stack([np.concatenate([x.ravel() for x in each]) for each in records]))
    whole = on_grid(rows, clip).sum(dim=0)
    order = np.random.default_rng(seed).permutation(len(rows))
    again = torch.zeros_like(whole)
    for number in order:
        again += on_grid(rows[number : number + 1], clip)[0]
    assert torch.equal(whole, again)
    assert ((whole / grid_of(clip)) % 1 == 0).all()


def test_a_step_sums_its_passes_exactly(family_directory: Callable[[str, str], Path]) -> None:
    """A real step: the sum is that of the passes' own integer vectors, whatever the order of the units."""
    model = load_family(family_directory("bert", "classification"), "classification", "mean")
    ready(model)
    task, records = task_of("classification"), examples_of(9, seed=2)
    parameters = list(model.adapter.parameters.values())
    with stepping(model, task, record_plan(), torch.optim.SGD(parameters, lr=1.0), 8) as step:
        assert isinstance(step, PrivateStep)
        own = [own_columns(step, step.rows(Pass((each,), (0,)))) for each in records]
    vectors = [clipped(torch.from_numpy(each).float(), 1.0)[0] for each in own]
    expected = torch.stack(vectors).sum(dim=0) * grid_of(1.0)
    for units in (alone(records), alone(records[::-1])):
        exact = one_step(model, task, record_plan(), units).exact
        np.testing.assert_array_equal(exact, expected.numpy())
