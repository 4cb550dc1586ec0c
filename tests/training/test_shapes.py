"""Which records share a pass, and at what shape: a record's own length decides, and nothing is lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.families import task_of

from fedslm.config.tasks import TASKS
from fedslm.tasks.base import Example
from fedslm.training.shapes import (
    Job,
    Part,
    Shape,
    Shapes,
    candidates,
    fixed,
    in_shape,
    isolated,
    shared,
)

SHAPES = Shapes({16: (1, 2, 4), 32: (3,)})
UNITS = st.lists(
    st.lists(st.integers(1, 40).map(lambda length: Example((1,) * length)), min_size=1, max_size=5),
    max_size=12,
)


def contents(parts: list[Part], first: int = 0) -> list[tuple[int, Example]]:
    """All records with the position of their unit among all units."""
    found = []
    for part in parts:
        pairs = [pair for each in part.passes for pair in zip(each.owners, each.records, strict=True)]
        found += [(first + owner, record) for owner, record in pairs]
        first += part.units
    return found


@given(units=UNITS, values=st.sampled_from([1, 1 << 22, 1 << 30]))
def test_every_record_of_a_unit_is_in_its_part_once(units: list[list[Example]], values: int) -> None:
    """In each of the three ways, whatever the size of the parts."""
    expected = sorted(
        (owner, record) for owner, unit in enumerate(units) for record in map(len_of, unit)
    )
    for parts in (
        list(isolated(units, 50)),
        list(fixed(units, SHAPES, values, by_record=False)),
    ):
        assert sorted((owner, len_of(record)) for owner, record in contents(parts)) == expected
    alone = [[record] for unit in units for record in unit]
    for parts in (
        list(fixed(alone, SHAPES, values, by_record=True)),
        list(shared(alone, 3, 50)),
    ):
        lengths = sorted(len_of(record) for _, record in contents(parts))
        assert lengths == sorted(len_of(record) for unit in units for record in unit)
        assert all(len(part.passes) == 1 for part in parts)


def len_of(record: Example) -> int:
    """A record's length."""
    return record.length


@given(units=UNITS)
def test_a_record_s_length_alone_decides_its_padding(units: list[list[Example]]) -> None:
    """It is shorter than its shape; one that fits none has a pass of its own."""
    for part in fixed(units, SHAPES, 1, by_record=False):
        for each in part.passes:
            if each.shape is None:
                assert [record.length >= 32 for record in each.records] == [True]
                continue
            assert len(each.records) <= each.shape.records
            assert each.shape.records in SHAPES.proved[each.shape.length]
            shortest = 0 if each.shape.length == 16 else 16
            assert all(shortest <= record.length < each.shape.length for record in each.records)


def test_withdrawn_shapes_are_not_used() -> None:
    """After a pass that did not repeat, every record has its own pass."""
    withdrawn = Shapes(SHAPES.proved, withdrawn=True)
    (part,) = fixed([[Example((1,) * 5)]], withdrawn, 1, by_record=True)
    assert part.passes[0].shape is None


def test_a_pass_is_bounded_by_tokens_values_and_the_config() -> None:
    """A pass of all candidates has few enough tokens and per-record gradients."""
    small = Job(base_parameters=10**7, trained_values=10_000, longest=500, most_records=32)
    for job in (small, replace(small, base_parameters=10**5), replace(small, on_gpu=True)):
        for length, counts in candidates(job).items():
            assert counts == tuple(sorted(set(counts)))
            assert counts[-1] <= 32
            assert counts[-1] * length <= (16_384 if job.on_gpu else 2304)
    assert {counts[-1] for counts in candidates(replace(small, trained_values=1 << 22)).values()} == {4}
    assert {counts[-1] for counts in candidates(replace(small, most_records=3)).values()} == {3}
    assert candidates(replace(small, trained_values=1 << 24)) == {}
    assert candidates(replace(small, base_parameters=10**8)) == {}
    assert max(candidates(replace(small, longest=64))) == 68


@pytest.mark.parametrize("parameters", [10**5, 10**7])
@pytest.mark.parametrize("longest", range(4, 97))
def test_every_record_that_a_config_allows_has_a_shape(parameters: int, longest: int) -> None:
    """The longest one too, unless the base reads no more: the demo's records were once all isolated."""
    job = Job(base_parameters=parameters, trained_values=100, longest=longest, most_records=4)
    shapes = Shapes(candidates(job))
    if parameters < 10**6 or longest < 96:
        assert shapes.of(longest) in range(longest + 1, longest + 5)
    read = Shapes(candidates(replace(job, positions=longest)))
    assert max(read.proved, default=0) <= longest
    assert read.of(longest) is None


def test_isolated_passes_of_a_large_unit_are_bounded() -> None:
    """A unit's records are cut into passes of few tokens, and never beside another unit's."""
    units = [[Example((1,) * 100)] * 12, [Example((1,) * 2000)]]
    first, second = isolated(units, 576)
    assert [len(each.records) for each in first.passes] == [5, 5, 2]
    assert [len(each.records) for each in second.passes] == [1]


@pytest.mark.parametrize("name", TASKS)
def test_a_batch_has_its_public_shape(name: str, family_directory: Callable[[str, str], Path]) -> None:
    """Whatever the task: every tensor has a row for each slot, and is as long as the shape says."""
    task = task_of(name)
    for records in ([task.made_up(7)], [task.made_up(7), task.made_up(15)]):
        batch = in_shape(task, records, Shape(3, 16), 0)
        rows = 3 * task.rows_per_example
        assert {len(tensor) for tensor in batch.values()} == {rows}
        assert batch["input_ids"].shape == (rows, 16)
        assert (batch["attention_mask"].sum(dim=1) < 16).all()
        assert batch["attention_mask"][:: task.rows_per_example].sum(dim=1).tolist() == [
            *[record.length for record in records],
            *[5] * (3 - len(records)),
        ]
