"""DP-SGD steps with one patient as the unit: records are summed, then clipped once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.families import (
    UNKNOWN_TOKEN,
    WILD_TOKEN,
    clipped,
    examples_of,
    gradient,
    load_family,
    one_step,
    record_plan,
    user_plan,
)

from fedslm.errors import TrainingError
from fedslm.models.loaded import LoadedModel
from fedslm.tasks.base import Example, Task, Tensors
from fedslm.tasks.classification import Classification
from fedslm.training.per_record import ClosedForm

Family = tuple[LoadedModel, Task]
SIZES = (2, 1, 3, 1)  # records of the patients of an ordinary batch

OFTEN = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def patients_of(sizes: tuple[int, ...], seed: int = 0) -> list[list[Example]]:
    """Patients with different numbers of records."""
    records = iter(examples_of(sum(sizes), seed))
    return [[next(records) for _ in range(size)] for size in sizes]


def test_sum_equals_autograd_clipped_once_per_patient(family: Family) -> None:
    """Autograd gradients of single records, added up per patient, clipped once and added up."""
    model, task = family
    patients = patients_of(SIZES)
    sums = [np.sum([gradient(model, task, each) for each in patient], axis=0) for patient in patients]
    norms = [float(np.linalg.norm(each)) for each in sums]
    clip = float(np.median(norms))  # some are clipped, some are not
    assert min(norms) < clip < max(norms)
    exact = one_step(model, task, user_plan(clip=clip), patients).exact
    np.testing.assert_allclose(exact, sum(clipped(each, clip) for each in sums), atol=4e-5)


def test_patients_of_one_record_are_records(family: Family) -> None:
    """If every patient has one record, both plans take the same step before the noise."""
    model, task = family
    units = patients_of((1,) * 5, seed=3)
    by_record, by_patient = (
        one_step(model, task, plan, units).exact
        for plan in (record_plan(clip=0.5), user_plan(clip=0.5))
    )
    np.testing.assert_allclose(by_record, by_patient, rtol=0, atol=len(units) * 2.0**-29)


@pytest.mark.parametrize("clip", [0.3, 50.0])
def test_micro_batches_do_not_change_the_sum_of_patients(family: Family, clip: float) -> None:
    """Shared passes of 1, 3 or 100 records: the same sum to rounding, since no patient is cut."""
    model, task = family
    patients, plan = patients_of((1, 4, 2, 3), seed=5), user_plan(clip=clip, passes="shared")
    one, three, whole = (one_step(model, task, plan, patients, size).exact for size in (1, 3, 100))
    assert np.linalg.norm(whole) > 0.1
    np.testing.assert_allclose(one, whole, atol=2e-5)
    np.testing.assert_allclose(three, whole, atol=2e-5)


ORDINARY = st.builds(lambda seed: examples_of(1, seed)[0], st.integers(0, 1000))
RECORDS = st.one_of(
    ORDINARY,
    ORDINARY,
    st.just(Example(tuple(range(10, 40)), 1)),  # longest
    st.just(Example((5, 6), 0)),  # shortest
    st.just(Example((7, WILD_TOKEN, 9), 2)),  # infinite
    st.just(Example((5, UNKNOWN_TOKEN, 7), 0)),  # cannot be computed
)
PATIENTS = st.one_of(
    st.lists(RECORDS, min_size=1, max_size=5),
    st.builds(lambda record, count: [record] * count, RECORDS, st.integers(1, 5)),
)


@OFTEN
@given(
    others=st.lists(PATIENTS, max_size=3),
    extra=PATIENTS,
    place=st.integers(0, 3),
    clip=st.sampled_from([0.3, 30.0]),
)
def test_a_patient_moves_the_sum_by_itself_alone(
    wild: Family,
    others: list[list[Example]],
    extra: list[Example],
    place: int,
    clip: float,
) -> None:
    """Adding or removing any patient moves the sum by at most C, and by what it adds when it is alone."""
    model, task = wild
    plan = user_plan(clip=clip)
    with_extra = [*others[:place], extra, *others[place:]]
    after, before, alone = (
        one_step(model, task, plan, units).exact for units in (with_extra, others, [extra])
    )
    moved = after - before
    assert np.isfinite(after).all()
    assert np.linalg.norm(moved) <= clip * (1 + 1e-4)
    assert np.linalg.norm(moved - alone) <= 1e-4 * max(1.0, float(np.linalg.norm(after)))


def test_bad_records_leave_the_rest_of_a_patient(wild: Family) -> None:
    """An infinite record, and one that cannot be computed, add nothing; the patient's others stay."""
    model, task = wild
    good = examples_of(2, seed=9)
    bad = [Example((7, WILD_TOKEN, 9), 2), Example((5, UNKNOWN_TOKEN, 7), 0)]
    expected = one_step(model, task, user_plan(clip=0.5), [good]).exact
    assert np.linalg.norm(expected) > 0.1
    found = one_step(model, task, user_plan(clip=0.5), [[bad[0], *good, bad[1]]]).exact
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert not one_step(model, task, user_plan(), [bad]).exact.any()


class Steep(Classification):
    """Classification whose losses are enormous, but whose gradients are finite."""

    factor = 1.0

    def per_example_loss(self, logits: torch.Tensor, batch: Tensors) -> torch.Tensor:
        """Losses times a factor for the last class, the others' as they are."""
        factors = torch.where(batch["labels"] == 2, self.factor, 1.0)
        return super().per_example_loss(logits, batch) * factors


def test_memory_that_runs_out_ends_the_round(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """One patient's records leave less memory for the next patient's, who must not count as zero then."""
    real = ClosedForm.__call__

    def scarce(self: ClosedForm, losses: torch.Tensor, rows: int) -> torch.Tensor:
        if len(self._values) > 2:  # an earlier pass needed room for three records
            torch.empty(1 << 50)
        return real(self, losses, rows)

    monkeypatch.setattr(ClosedForm, "__call__", scarce)
    large, small = patients_of((3, 1))
    assert one_step(*family, user_plan(), [small]).exact.any()
    with pytest.raises(TrainingError, match="memory ran out"):
        one_step(*family, user_plan(), [large, small])


def test_a_sum_of_enormous_records_is_clipped(family_directory: Callable[[str, str], Path]) -> None:
    """A patient's records whose float32 sum would overflow add a gradient of length C, and no more."""
    model = load_family(family_directory("bert", "classification"), "classification", "mean")
    task = Steep(("bone", "heart", "skin"), "text", "label", 32)
    steep, others = Example((10, 11, 12, 13), 2), patients_of(SIZES, seed=1)
    others = [[Example(each.input_ids, 0) for each in patient] for patient in others]
    plain, plan = gradient(model, task, steep), user_plan(clip=0.5)
    before = one_step(model, task, plan, others).exact
    for factor in (1e15, 1.5e38 / float(np.linalg.norm(plain))):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Steep, "factor", factor)
            moved = one_step(model, task, plan, [*others, [steep] * 60]).exact - before
        np.testing.assert_allclose(moved, plain * (0.5 / np.linalg.norm(plain)), atol=1e-5)


def test_an_empty_batch_is_noise_and_nothing_else(family: Family) -> None:
    """A sample without patients has a sum of zero, and releases the same noise as any other."""
    model, task = family
    seen = one_step(model, task, user_plan(noise=1.5, clip=0.4, normaliser=8), [])
    assert not seen.exact.any()
    assert float((seen.moved * 8).std()) == pytest.approx(1.5 * 0.4, rel=0.1)
