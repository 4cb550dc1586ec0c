"""Tests of plans: what is sampled, clipped, noised and charged is one thing."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from fedslm.config import PrivacyConfig, TrainingConfig
from fedslm.errors import PrivacyError
from fedslm.privacy import accounting
from fedslm.privacy.plan import ExamplePlan, NoPrivacy, calibrated, from_json
from fedslm.records import Event

PLAN = ExamplePlan(
    epsilon=8.0,
    delta=1e-5,
    clip_norm=0.5,
    noise_multiplier=1.25,
    sample_rate=0.05,
    normaliser=32,
    steps_per_round=10,
)
PRIVACY = PrivacyConfig(unit="record", epsilon=8.0, delta=1e-5, clip_norm=0.5, sample_rate=0.05)
TRAINING = TrainingConfig(local_steps=10, batch_size=32)
ROUNDS = 3


def seeded() -> np.random.Generator:
    """A fresh generator with the run's seed."""
    return np.random.default_rng(0)


def inclusion(sample_rate: float, *, num_records: int, num_steps: int) -> np.ndarray:
    """Which record was in which step, shape (steps, records)."""
    plan = dataclasses.replace(PLAN, sample_rate=sample_rate, steps_per_round=num_steps)
    taken = np.zeros((num_steps, num_records), dtype=bool)
    for step, batch in enumerate(plan.batches(num_records, seeded())):
        taken[step, batch] = True
    return taken


def deviations(taken: np.ndarray, sample_rate: float) -> float:
    """Standard deviations between the observed rate and ``sample_rate``."""
    return float((taken.mean() - sample_rate) / math.sqrt(sample_rate * (1 - sample_rate) / taken.size))


def test_calibrated_takes_every_value_from_what_was_asked() -> None:
    """The plan's clip, rate, normaliser and steps are the config's; only the noise is found."""
    plan = calibrated(PRIVACY, TRAINING, ROUNDS)
    assert isinstance(plan, ExamplePlan)
    expected = dataclasses.replace(PLAN, noise_multiplier=plan.noise_multiplier)
    assert plan == expected
    assert plan.noise_multiplier == accounting.calibrate(8.0, 1e-5, 0.05, 30)


def test_the_charge_is_what_runs() -> None:
    """The event has the sampler's rate, the noise's multiplier and a step for each batch."""
    assert PLAN.round_event == Event(0.05, 1.25, 10)
    assert len(list(PLAN.batches(100, seeded()))) == PLAN.round_event.steps


def test_all_rounds_together_fit_the_budget_and_no_more_do() -> None:
    """Calibration is for every round with every client, and it is tight."""
    plan = calibrated(PRIVACY, TRAINING, ROUNDS)
    assert plan.round_event is not None
    assert accounting.epsilon([plan.round_event] * ROUNDS, 1e-5) <= 8.0
    assert accounting.epsilon([plan.round_event] * (ROUNDS + 1), 1e-5) > 8.0


def test_a_given_noise_multiplier_is_used() -> None:
    """Noise that was asked for is neither lowered nor raised."""
    asked = PRIVACY.model_copy(update={"noise_multiplier": 3.0})
    plan = calibrated(asked, TRAINING, ROUNDS)
    assert isinstance(plan, ExamplePlan)
    assert plan.noise_multiplier == 3.0


def test_a_noise_multiplier_that_exceeds_epsilon_is_refused() -> None:
    """Epsilon is the hard limit, whatever noise is asked for."""
    asked = PRIVACY.model_copy(update={"noise_multiplier": 0.4})
    with pytest.raises(PrivacyError, match=r"noise_multiplier=0\.4 costs epsilon=.* more than"):
        calibrated(asked, TRAINING, ROUNDS)


@pytest.mark.parametrize("key", ["epsilon", "delta", "clip_norm", "sample_rate"])
def test_nothing_is_assumed(key: str) -> None:
    """Whatever makes the guarantee must be there, also behind the config's own check."""
    with pytest.raises(PrivacyError, match="none is assumed"):
        calibrated(PRIVACY.model_copy(update={key: None}), TRAINING, ROUNDS)


def test_without_privacy_nothing_is_promised() -> None:
    """The plan without privacy has no charge."""
    plan = calibrated(PrivacyConfig(unit="none"), TRAINING, ROUNDS)
    assert plan == NoPrivacy(batch_size=32, steps_per_round=10)
    assert plan.round_event is None


def test_records_join_at_the_sample_rate() -> None:
    """400,000 draws accept the rate at five deviations, and reject 0.8 and 1.25 times it."""
    taken = inclusion(0.05, num_records=2000, num_steps=200)
    assert abs(deviations(taken, 0.05)) < 5
    assert abs(deviations(taken, 0.05 * 0.8)) > 5
    assert abs(deviations(taken, 0.05 * 1.25)) > 5


def test_records_join_independently() -> None:
    """Batch sizes and records' counts vary as binomials: neither fixed batches nor epochs."""
    taken = inclusion(0.05, num_records=2000, num_steps=400)
    variance = 0.05 * 0.95
    sizes, counts = taken.sum(axis=1), taken.sum(axis=0)
    assert sizes.var() / (2000 * variance) == pytest.approx(1, abs=5 * math.sqrt(2 / 400))
    assert counts.var() / (400 * variance) == pytest.approx(1, abs=5 * math.sqrt(2 / 2000))


def test_every_record_is_equally_likely() -> None:
    """No position in the data set is favoured: first and last half join alike."""
    taken = inclusion(0.2, num_records=1000, num_steps=200)
    assert abs(deviations(taken[:, :500], 0.2)) < 5
    assert abs(deviations(taken[:, 500:], 0.2)) < 5


def test_a_rate_of_one_takes_everything() -> None:
    """At rate 1 every record is in every step."""
    assert inclusion(1.0, num_records=50, num_steps=20).all()


def test_sampling_cannot_be_reproduced_from_the_seed() -> None:
    """Whoever knows the run's seed does not know who took part."""
    one, other = (
        [batch.tolist() for batch in PLAN.batches(500, np.random.default_rng(0))] for _ in range(2)
    )
    assert one != other


def test_sampling_leaves_the_seeded_generator_alone() -> None:
    """The seeded generator is not even drawn from."""
    generator = seeded()
    before = generator.bit_generator.state
    list(PLAN.batches(500, generator))
    assert generator.bit_generator.state == before


def test_an_empty_shard_gives_empty_batches() -> None:
    """A client without records takes every step, with noise alone, and is charged like any other."""
    batches = list(PLAN.batches(0, seeded()))
    assert [len(batch) for batch in batches] == [0] * 10


def test_a_single_record_is_sometimes_absent_and_sometimes_there() -> None:
    """A tiny shard is sampled like any other."""
    taken = inclusion(0.5, num_records=1, num_steps=200)
    assert 0 < taken.sum() < 200


def test_plain_batches_repeat_with_the_seed() -> None:
    """Without privacy the same generator gives the same batches."""
    plan = NoPrivacy(batch_size=4, steps_per_round=5)
    one, other = (
        [batch.tolist() for batch in plan.batches(10, np.random.default_rng(1))] for _ in range(2)
    )
    assert one == other
    assert one != [batch.tolist() for batch in plan.batches(10, np.random.default_rng(2))]


@pytest.mark.parametrize("num_records", [1, 3, 10, 12, 17])
def test_plain_batches_cover_epoch_after_epoch(num_records: int) -> None:
    """Every record comes once before any comes twice, in full batches."""
    plan = NoPrivacy(batch_size=4, steps_per_round=3 * num_records)
    batches = list(plan.batches(num_records, seeded()))
    order = np.concatenate(batches)
    epochs = order[: len(order) // num_records * num_records].reshape(-1, num_records)
    assert {len(batch) for batch in batches} == {min(4, num_records)}
    assert len(epochs) >= 3
    assert all(sorted(epoch) == list(range(num_records)) for epoch in epochs)


@pytest.mark.parametrize("plan", [PLAN, NoPrivacy(batch_size=4, steps_per_round=2)])
def test_json_round_trip(plan: ExamplePlan | NoPrivacy) -> None:
    """A client reads the very plan that the server made."""
    assert from_json(plan.to_json()) == plan


OUT_OF_RANGE = [
    ("epsilon", 0.0),
    ("epsilon", math.inf),
    ("epsilon", math.nan),
    ("delta", 0.0),
    ("delta", 1.0),
    ("delta", math.nan),
    ("clip_norm", 0.0),
    ("clip_norm", math.inf),
    ("clip_norm", math.nan),
    ("noise_multiplier", 0.0),
    ("noise_multiplier", -1.0),
    ("noise_multiplier", math.inf),
    ("noise_multiplier", math.nan),
    ("sample_rate", 0.0),
    ("sample_rate", 1.01),
    ("sample_rate", math.nan),
    ("normaliser", 0),
    ("steps_per_round", 0),
]


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused(name: str, value: float) -> None:
    """No plan without a guarantee can be made, here or from a message."""
    with pytest.raises(PrivacyError, match=f"{name}=.* out of range"):
        dataclasses.replace(PLAN, **{name: value})
    with pytest.raises(PrivacyError, match=name):
        from_json(json.dumps({**json.loads(PLAN.to_json()), name: value}))


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("steps_per_round", 0)])
def test_a_plain_plan_out_of_range_is_refused(name: str, value: int) -> None:
    """Without privacy, too, a plan has at least one step of at least one record."""
    with pytest.raises(PrivacyError, match=name):
        dataclasses.replace(NoPrivacy(4, 2), **{name: value})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "5",
        "[]",
        "null",
        "{}",
        '{"unit": "patient"}',
        '{"unit": "none"}',
        '{"unit": "none", "batch_size": 1, "steps_per_round": 1, "more": 1}',
        PLAN.to_json().replace("1.25", '"1.25"'),
        PLAN.to_json().replace('"clip_norm": 0.5, ', ""),
    ],
)
def test_a_text_that_is_no_plan_is_refused(text: str) -> None:
    """A message that is no plan is a privacy error, whatever is wrong with it."""
    with pytest.raises(PrivacyError):
        from_json(text)


def test_steps_use_the_plans_noise_clip_and_normaliser() -> None:
    """An empty batch moves 20,000 parameters by noise of σ·C/normaliser, not by 2/3 or 3/2 of it."""
    import torch

    from fedslm.models.adapter import AttachedAdapter
    from fedslm.models.loaded import LoadedModel
    from fedslm.tasks.classification import Classification
    from fedslm.training.steps import stepping

    network = torch.nn.Linear(200, 100, bias=False)
    adapter = AttachedAdapter(network, {"weight": network.weight})
    model = LoadedModel(adapter, None, torch.device("cpu"), "")  # type: ignore[arg-type]
    before = network.weight.detach().clone()
    optimizer = torch.optim.SGD([network.weight], lr=1.0)
    with stepping(model, Classification(("a", "b"), "text", "label", 8), PLAN, optimizer, 4) as step:
        step([])
    moved = float((network.weight.detach() - before).std())
    expected = PLAN.noise_multiplier * PLAN.clip_norm / PLAN.normaliser
    assert moved == pytest.approx(expected, rel=5 / math.sqrt(2 * 20_000))
    assert moved != pytest.approx(expected * 2 / 3, rel=5 / math.sqrt(2 * 20_000))
    assert moved != pytest.approx(expected * 3 / 2, rel=5 / math.sqrt(2 * 20_000))
