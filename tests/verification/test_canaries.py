"""Tests of the attack with canaries: it finds what is allowed, and shouts at what is not."""

from __future__ import annotations

import pytest
from support.mutations import no_clipping

from fedslm.privacy.gaussian import GaussianNoise
from fedslm.privacy.plan import ExamplePlan, PrivatePlan, UserPlan
from fedslm.privacy.randomness import SecureStream
from fedslm.verification.canaries import empirical_bound

RECORD = ExamplePlan(8.0, 1e-5, 0.3, 0.8, 0.06, 16, 64)
PATIENT = UserPlan(8.0, 1e-5, 0.3, 0.8, 0.06, 16, 64, unit_column="patient")


@pytest.mark.parametrize("plan", [RECORD, PATIENT])
def test_a_sound_mechanism_is_consistent_and_tight(plan: PrivatePlan) -> None:
    """The attacker learns something significant, nearly all that is allowed, and no more.

    In 12 runs the lower bound was 1.2 to 1.95, and 0.94 to 1.04 of what is allowed were pointed out.
    """
    found = empirical_bound(plan, canaries=8000)
    assert found.consistent
    assert 0.5 < found.lower <= found.upper
    one_in_ten = found.attacks[-1]
    assert one_in_ten.false_positive_rate == 0.1
    assert one_in_ten.measured > 0.75 * one_in_ten.bound


def test_each_step_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """In order, to whom asked; without a listener nothing is printed."""
    told: list[tuple[int, int]] = []
    plan = ExamplePlan(8.0, 1e-5, 0.3, 0.8, 0.06, 16, 3)
    empirical_bound(plan, canaries=2000, on_step=lambda done, total: told.append((done, total)))
    empirical_bound(plan, canaries=2000)
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize("plan", [RECORD, PATIENT])
def test_few_false_alarms(plan: PrivatePlan) -> None:
    """Many canaries tell how tight the bound is where one in a hundred is a false alarm."""
    found = empirical_bound(plan)
    assert 1.0 < found.lower <= found.upper
    for attack in found.attacks:
        assert attack.measured > 0.75 * attack.bound


@pytest.mark.slow
def test_full_batches() -> None:
    """A sample rate of 1 has no hiding in the sample; fewer canaries keep it quick."""
    found = empirical_bound(ExamplePlan(8.0, 1e-5, 1.0, 8.0, 1.0, 16, 30))
    assert found.consistent
    assert found.lower > 0.3
    assert found.canaries < 20_000


def test_too_little_noise_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two thirds of the noise leak more than was proven."""
    real = GaussianNoise.draw
    monkeypatch.setattr(GaussianNoise, "draw", lambda self, shape, std: real(self, shape, std * 2 / 3))
    assert not empirical_bound(RECORD, canaries=8000).consistent


def test_a_missing_clip_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients ten times too long are no secret."""
    no_clipping(monkeypatch)
    found = empirical_bound(RECORD, canaries=8000)
    assert not found.consistent


def test_a_larger_sample_rate_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units that join more often than was charged show."""
    real = SecureStream.bernoulli
    monkeypatch.setattr(
        SecureStream,
        "bernoulli",
        lambda self, count, rate: real(self, count, 3 * rate if rate < 0.3 else rate),
    )
    assert not empirical_bound(RECORD, canaries=8000).consistent
