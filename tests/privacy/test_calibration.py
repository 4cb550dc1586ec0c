"""Tests of calibration: what is asked becomes a plan that keeps it, and no more noise than needed."""

from __future__ import annotations

import dataclasses
import math
from functools import lru_cache

import pytest

from fedslm.config import PrivacyConfig, TrainingConfig
from fedslm.errors import PrivacyError
from fedslm.privacy import accounting
from fedslm.privacy.accounting import epsilon
from fedslm.privacy.calibration import calibrate, calibrated
from fedslm.privacy.plan import ExamplePlan, NoPrivacy, UserPlan
from fedslm.records import Event

DELTA = 1e-5
PRIVACY = PrivacyConfig(unit="record", epsilon=8.0, delta=1e-5, clip_norm=0.5, sample_rate=0.05)
OF_PATIENTS = {"unit": "user", "unit_column": "patient", "max_records_per_unit": 3}
TRAINING = TrainingConfig(local_steps=10, batch_size=32)
ROUNDS = 3


def asking(**changes: object) -> PrivacyConfig:
    """What is asked, with changes."""
    return PRIVACY.model_copy(update=changes)


@lru_cache
def noise_for(target: float) -> float:
    """Calibrated noise for N=2000, B=64, T=150."""
    return calibrate(target, DELTA, 64 / 2000, 150)


@pytest.mark.parametrize(("target", "noise"), [(1.0, 1.744), (3.0, 0.946), (8.0, 0.639)])
def test_calibration_golden(target: float, noise: float) -> None:
    """N=2000, B=64, T=150, delta 1e-5: the noise that dp-accounting's own calibration gives."""
    assert noise_for(target) == pytest.approx(noise, abs=0.00201)


@pytest.mark.parametrize("target", [1.0, 3.0, 8.0])
def test_calibration_never_exceeds_its_target(target: float) -> None:
    """The target is met, and with 0.002 less noise it would not be."""
    noise = noise_for(target)
    assert epsilon([Event(64 / 2000, noise, 150)], DELTA) <= target
    assert epsilon([Event(64 / 2000, noise - 0.002, 150)], DELTA) > target


@pytest.mark.parametrize(
    ("target", "rate", "steps"), [(0.1, 0.01, 10), (4.0, 0.1, 5), (2.0, 1.0, 3)], ids=str
)
def test_calibration_meets_odd_targets(target: float, rate: float, steps: int) -> None:
    """Small and large budgets and full batches are met too."""
    assert epsilon([Event(rate, calibrate(target, DELTA, rate, steps), steps)], DELTA) <= target


def test_a_target_out_of_reach_is_refused() -> None:
    """A budget that no noise meets is an error that says what to change, not an endless search."""
    with pytest.raises(PrivacyError, match="out of reach"):
        calibrate(0.001, DELTA, 1.0, 2000)


def test_a_target_that_is_no_number_is_refused() -> None:
    """NaN compares false with everything: calibrating to it must not come out as met."""
    with pytest.raises(PrivacyError):
        calibrate(math.nan, DELTA, 0.01, 10)


def test_other_releases_are_paid_for_too() -> None:
    """With something else in the budget the steps get more noise, and both together fit it tightly."""
    other = Event(1.0, 5.0, 3)
    noise = calibrate(3.0, DELTA, 0.05, 30, [other])
    assert noise > calibrate(3.0, DELTA, 0.05, 30)
    assert epsilon([Event(0.05, noise, 30), other], DELTA) <= 3.0
    assert epsilon([Event(0.05, noise - 0.002, 30), other], DELTA) > 3.0


def test_other_releases_that_take_the_whole_budget_are_refused() -> None:
    """If the rest alone exceeds the budget, no noise meets it."""
    with pytest.raises(PrivacyError, match="out of reach"):
        calibrate(1.0, DELTA, 0.05, 1, [Event(1.0, 1.0, 1)])


@pytest.mark.parametrize("target", [0.0, -1.0, math.inf, -math.inf])
def test_a_target_out_of_range_is_refused(target: float) -> None:
    """A budget is a positive number."""
    with pytest.raises(PrivacyError, match="epsilon"):
        calibrate(target, DELTA, 0.01, 10)


def test_the_plan_has_every_value_that_was_asked() -> None:
    """The plan's clip, rate, normaliser, steps and rounds are the config's; only the noise is found."""
    plan = calibrated(PRIVACY, TRAINING, ROUNDS)
    assert plan == ExamplePlan(
        epsilon=8.0,
        delta=1e-5,
        clip_norm=0.5,
        noise_multiplier=calibrate(8.0, 1e-5, 0.05, 30),
        sample_rate=0.05,
        normaliser=32,
        steps_per_round=10,
        rounds=3,
    )


def test_patients_have_the_same_noise_and_their_own_column_and_cap() -> None:
    """A patient's plan is a record's, with column and cap: sampling units costs the same."""
    record, patient = (
        calibrated(asked, TRAINING, ROUNDS) for asked in (PRIVACY, asking(**OF_PATIENTS))
    )
    assert isinstance(record, ExamplePlan)
    assert isinstance(patient, UserPlan)
    assert (patient.unit_column, patient.max_records_per_unit) == ("patient", 3)
    assert patient.run_events == record.run_events
    assert {**dataclasses.asdict(patient)}.items() >= dataclasses.asdict(record).items()


@pytest.mark.parametrize("metric", [None, 10.0])
@pytest.mark.parametrize("unit", [{}, OF_PATIENTS], ids=["record", "patient"])
def test_all_rounds_together_fit_the_budget_and_no_more_do(
    metric: float | None, unit: dict[str, object]
) -> None:
    """Calibration is for every round with every client, metric and all, and it is tight."""
    plan = calibrated(asking(metric_noise_multiplier=metric, **unit), TRAINING, ROUNDS)
    assert isinstance(plan, ExamplePlan | UserPlan)
    assert len(plan.round_events) == (1 if metric is None else 2)
    assert accounting.epsilon(plan.round_events * ROUNDS, DELTA) <= 8.0
    assert accounting.epsilon(plan.round_events * (ROUNDS + 1), DELTA) > 8.0
    assert plan.verify().pld == accounting.epsilon(plan.run_events, DELTA)


def test_spare_rounds_are_paid_for_beforehand() -> None:
    """Rounds that crashes may cost are in the plan, with the noise of so many rounds."""
    spare = calibrated(asking(spare_rounds=2), TRAINING, ROUNDS)
    assert spare == calibrated(PRIVACY, TRAINING, ROUNDS + 2)
    assert isinstance(spare, ExamplePlan)
    assert spare.rounds == 5


def test_a_given_noise_multiplier_is_used() -> None:
    """Noise that was asked for is neither lowered nor raised."""
    plan = calibrated(asking(noise_multiplier=3.0), TRAINING, ROUNDS)
    assert isinstance(plan, ExamplePlan)
    assert plan.noise_multiplier == 3.0


@pytest.mark.parametrize(
    "changes",
    [
        {"noise_multiplier": 0.4},
        {"noise_multiplier": 0.7, "spare_rounds": 100},
        {"noise_multiplier": 3.0, "metric_noise_multiplier": 0.5},
    ],
    ids=str,
)
def test_a_noise_multiplier_that_exceeds_epsilon_is_refused(changes: dict[str, float]) -> None:
    """Epsilon is the hard limit, whatever noise is asked for, with spare rounds and metrics."""
    with pytest.raises(PrivacyError, match=r"noise_multiplier=\S+ costs epsilon=.* more than"):
        calibrated(asking(**changes), TRAINING, ROUNDS)


@pytest.mark.parametrize("key", ["epsilon", "delta", "clip_norm", "sample_rate"])
@pytest.mark.parametrize("unit", [{}, OF_PATIENTS], ids=["record", "patient"])
def test_nothing_is_assumed(key: str, unit: dict[str, object]) -> None:
    """Whatever makes the guarantee must be there, also behind the config's own check."""
    with pytest.raises(PrivacyError, match="none is assumed"):
        calibrated(asking(**unit, **{key: None}), TRAINING, ROUNDS)


@pytest.mark.parametrize("key", ["unit_column", "max_records_per_unit"])
def test_a_patient_needs_a_column_and_a_cap(key: str) -> None:
    """Neither whose a record is nor how many count is ever guessed."""
    with pytest.raises(PrivacyError, match="unit_column and max_records_per_unit"):
        calibrated(asking(**{**OF_PATIENTS, key: None}), TRAINING, ROUNDS)


def test_without_privacy_nothing_is_promised() -> None:
    """The plan without privacy has no charge."""
    plan = calibrated(PrivacyConfig(unit="none"), TRAINING, ROUNDS)
    assert plan == NoPrivacy(batch_size=32, steps_per_round=10)
    assert plan.round_events == ()
