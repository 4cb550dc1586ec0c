"""Tests of plans: what is sampled, clipped, noised and charged is one thing."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from support.pace import patient

from fedslm.errors import PrivacyError
from fedslm.privacy import accounting
from fedslm.privacy.plan import Batch, ExamplePlan, NoPrivacy, Plan, UserPlan, from_json
from fedslm.records import Event

PLAN = ExamplePlan(
    epsilon=8.0,
    delta=1e-5,
    clip_norm=0.5,
    noise_multiplier=1.25,
    sample_rate=0.05,
    normaliser=32,
    steps_per_round=10,
    rounds=3,
)
PATIENTS = UserPlan(**dataclasses.asdict(PLAN), unit_column="patient", max_records_per_unit=3)
WITH_METRIC = dataclasses.replace(PATIENTS, metric_noise_multiplier=8.0)
PLAIN = NoPrivacy(batch_size=4, steps_per_round=2)
PRIVATE = [PLAN, PATIENTS, WITH_METRIC]
KINDS = ["record", "patient", "metric"]
OWNERS = st.lists(st.sampled_from(["a", "b", "c", "ä", "", "A"]), max_size=20)


def seeded() -> np.random.Generator:
    """A fresh generator with the run's seed."""
    return np.random.default_rng(0)


def drawn(plan: Plan, owners: list[str], **changes: object) -> list[Batch]:
    """All batches of a round."""
    return list(dataclasses.replace(plan, **changes).batches(owners, seeded()))


def inclusion(plan: Plan, owners: list[str], **changes: object) -> np.ndarray:
    """Which record was in which step, shape (steps, records)."""
    batches = drawn(plan, owners, **changes)
    taken = np.zeros((len(batches), len(owners)), dtype=bool)
    for step, batch in enumerate(batches):
        for records in batch:
            taken[step, records] = True
    return taken


def deviations(taken: np.ndarray, sample_rate: float) -> float:
    """Standard deviations between the observed rate and ``sample_rate``."""
    return float((taken.mean() - sample_rate) / math.sqrt(sample_rate * (1 - sample_rate) / taken.size))


def shown(batches: list[Batch]) -> list[list[list[int]]]:
    """Batches as lists."""
    return [[records.tolist() for records in batch] for batch in batches]


@pytest.mark.parametrize("plan", PRIVATE, ids=KINDS)
def test_the_charge_is_what_runs(plan: ExamplePlan | UserPlan) -> None:
    """The event has the sampler's rate, the noise's multiplier and a step for each batch."""
    assert plan.training_event == plan.round_events[0] == Event(0.05, 1.25, 10)
    assert len(drawn(plan, ["a"] * 100)) == plan.training_event.steps


def test_a_metric_is_charged_as_a_release_over_everybody() -> None:
    """Each round's metric is one Gaussian release at rate 1; without a metric nothing is charged."""
    assert (PLAN.metric_event, PLAN.round_events) == (None, (Event(0.05, 1.25, 10),))
    assert WITH_METRIC.metric_event == Event(1.0, 8.0, 1)
    assert WITH_METRIC.round_events == (Event(0.05, 1.25, 10), Event(1.0, 8.0, 1))


@pytest.mark.parametrize("plan", PRIVATE, ids=KINDS)
def test_a_run_is_charged_for_all_its_rounds(plan: ExamplePlan | UserPlan) -> None:
    """All rounds together are so many times one round."""
    assert sum(event.steps for event in plan.run_events) == 3 * sum(e.steps for e in plan.round_events)
    assert accounting.epsilon(plan.run_events, 1e-5) == accounting.epsilon(plan.round_events * 3, 1e-5)


@pytest.mark.parametrize("plan", PRIVATE, ids=KINDS)
def test_a_plan_that_keeps_its_epsilon_is_verified(plan: ExamplePlan | UserPlan) -> None:
    """At exactly its cost a plan passes, and the three accounts are those of all its rounds."""
    cost = accounting.epsilon(plan.run_events, plan.delta)
    accounts = dataclasses.replace(plan, epsilon=cost).verify()
    assert accounts == accounting.cross_check(plan.run_events, plan.delta)
    assert accounts.pld == cost


@pytest.mark.parametrize(
    "changes",
    [
        {"noise_multiplier": 0.4},
        {"rounds": 300},
        {"steps_per_round": 1000},
        {"sample_rate": 1.0},
        {"epsilon": 1.0},
        {"delta": 1e-30},
        {"metric_noise_multiplier": 0.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("plan", [PLAN, PATIENTS], ids=["record", "patient"])
def test_a_plan_that_breaks_its_epsilon_is_refused(
    plan: ExamplePlan | UserPlan, changes: dict[str, float]
) -> None:
    """A server that states a small epsilon and sends too little noise is found out."""
    plan.verify()
    with pytest.raises(PrivacyError, match=r"costs epsilon=|cannot check|disagree"):
        dataclasses.replace(plan, **changes).verify()


@pytest.mark.parametrize("plan", [PLAN, PATIENTS], ids=["record", "patient"])
def test_units_join_at_the_sample_rate(plan: ExamplePlan | UserPlan) -> None:
    """400,000 draws accept the rate at five deviations, and reject 0.8 and 1.25 times it."""
    owners = [str(index) for index in range(2000)]
    taken = inclusion(plan, owners, steps_per_round=200)
    assert abs(deviations(taken, 0.05)) < 5
    assert abs(deviations(taken, 0.05 * 0.8)) > 5
    assert abs(deviations(taken, 0.05 * 1.25)) > 5


@pytest.mark.parametrize("plan", [PLAN, PATIENTS], ids=["record", "patient"])
def test_units_join_independently(plan: ExamplePlan | UserPlan) -> None:
    """Batch sizes and units' counts vary as binomials: neither fixed batches, epochs nor a cap."""
    taken = inclusion(plan, [str(index) for index in range(2000)], steps_per_round=400)
    variance = 0.05 * 0.95
    sizes, counts = taken.sum(axis=1), taken.sum(axis=0)
    assert sizes.var() / (2000 * variance) == pytest.approx(1, abs=5 * math.sqrt(2 / 400))
    assert counts.var() / (400 * variance) == pytest.approx(1, abs=5 * math.sqrt(2 / 2000))
    assert sizes.max() > 2000 * 0.05 > PLAN.normaliser


def test_every_record_is_equally_likely() -> None:
    """No position in the data set is favoured: first and last half join alike."""
    taken = inclusion(PLAN, [""] * 1000, steps_per_round=200, sample_rate=0.2)
    assert abs(deviations(taken[:, :500], 0.2)) < 5
    assert abs(deviations(taken[:, 500:], 0.2)) < 5


def test_a_patient_joins_at_the_rate_whatever_it_has() -> None:
    """A patient with 50 records joins as often as one with a single record, not 50 times as often."""
    owners = ["many"] * 50 + ["one"] + ["two"] * 2
    batches = drawn(PATIENTS, owners, steps_per_round=20_000, sample_rate=0.1)
    joined = Counter(owners[int(records[0])] for batch in batches for records in batch)
    for count in joined.values():
        assert abs(count - 2000) < 5 * math.sqrt(20_000 * 0.1 * 0.9)
    assert len(joined) == 3


def test_patients_join_independently_of_each_other() -> None:
    """Two patients are in a step together as often as chance says."""
    taken = inclusion(PATIENTS, ["a", "b"], steps_per_round=40_000, sample_rate=0.3)
    both = (taken[:, 0] & taken[:, 1]).mean()
    assert abs(both - 0.09) < 5 * math.sqrt(0.09 * 0.91 / 40_000)


@pytest.mark.parametrize("plan", [PLAN, PATIENTS], ids=["record", "patient"])
def test_a_rate_of_one_takes_everybody(plan: ExamplePlan | UserPlan) -> None:
    """At rate 1 every unit is in every step."""
    assert inclusion(plan, [str(i) for i in range(50)], steps_per_round=20, sample_rate=1.0).all()


@given(owners=OWNERS, rate=st.sampled_from([0.1, 0.5, 1.0]), cap=st.integers(1, 6))
@settings(max_examples=80, deadline=None)
def test_every_unit_is_one_owners_records(owners: list[str], rate: float, cap: int) -> None:
    """A unit holds records of one owner, each once, up to the cap and no fewer; no owner comes twice."""
    have = Counter(owners)
    for batch in drawn(PATIENTS, owners, sample_rate=rate, max_records_per_unit=cap):
        names = [{owners[index] for index in records} for records in batch]
        assert all(len(name) == 1 for name in names)
        assert len(set.union(set(), *names)) == len(batch)
        for records, (name,) in zip(batch, names, strict=True):
            assert len(set(records.tolist())) == len(records) == min(cap, have[name])
        if rate == 1.0:
            assert len(batch) == len(have)


@given(owners=OWNERS)
@settings(max_examples=40, deadline=None)
def test_a_record_is_a_unit_whoever_owns_it(owners: list[str]) -> None:
    """With the record as the unit every unit is one record, and owners do not matter."""
    for batch in drawn(PLAN, owners, sample_rate=1.0):
        assert shown([batch]) == [[[index] for index in range(len(owners))]]


def test_a_capped_patients_records_take_turns() -> None:
    """Which records of a large patient take part is chosen anew in each step, all equally often."""
    batches = drawn(PATIENTS, ["a"] * 10 + ["b"], steps_per_round=4000, sample_rate=1.0)
    counts = Counter(index for batch in batches for records in batch for index in records.tolist())
    assert counts.pop(10) == 4000
    assert sum(counts.values()) == 3 * 4000
    assert len(counts) == 10
    assert stats.chisquare(list(counts.values())).pvalue > 1e-6


def test_equal_names_are_one_patient_wherever_they_stand() -> None:
    """Records of a patient need not lie together, and names that differ at all are two patients."""
    (batch,) = drawn(PATIENTS, ["x", "y", "x", "X", "x "], steps_per_round=1, sample_rate=1.0)
    assert sorted(sorted(records.tolist()) for records in batch) == [[0, 2], [1], [3], [4]]


@pytest.mark.parametrize("plan", [PLAN, PATIENTS], ids=["record", "patient"])
def test_sampling_cannot_be_reproduced_from_the_seed(plan: ExamplePlan | UserPlan) -> None:
    """Whoever knows the run's seed does not know who took part."""
    owners = [str(index) for index in range(500)]
    assert shown(drawn(plan, owners)) != shown(drawn(plan, owners))


@pytest.mark.parametrize("plan", [PLAN, PATIENTS], ids=["record", "patient"])
def test_sampling_leaves_the_seeded_generator_alone(plan: ExamplePlan | UserPlan) -> None:
    """The seeded generator is not even drawn from."""
    generator = seeded()
    before = generator.bit_generator.state
    list(plan.batches([str(index) for index in range(500)], generator))
    assert generator.bit_generator.state == before


@pytest.mark.parametrize(
    "plan", [*PRIVATE, dataclasses.replace(PLAIN, steps_per_round=10)], ids=[*KINDS, "none"]
)
def test_an_empty_shard_gives_empty_batches(plan: Plan) -> None:
    """A client without records takes every step, with noise alone, and is charged like any other."""
    assert shown(drawn(plan, [])) == [[]] * 10


@pytest.mark.parametrize("plan", [PLAN, PATIENTS], ids=["record", "patient"])
def test_a_single_record_is_sometimes_absent_and_sometimes_there(plan: ExamplePlan) -> None:
    """A tiny shard is sampled like any other."""
    taken = inclusion(plan, ["a"], steps_per_round=200, sample_rate=0.5)
    assert 0 < taken.sum() < 200


def test_plain_batches_repeat_with_the_seed() -> None:
    """Without privacy the same generator gives the same batches."""
    plan = NoPrivacy(batch_size=4, steps_per_round=5)
    one, same, other = (
        shown(list(plan.batches([""] * 10, np.random.default_rng(seed)))) for seed in (1, 1, 2)
    )
    assert one == same
    assert one != other


@pytest.mark.parametrize("num_records", [1, 3, 10, 12, 17])
def test_plain_batches_cover_epoch_after_epoch(num_records: int) -> None:
    """Every record comes once before any comes twice, in full batches of single records."""
    plan = NoPrivacy(batch_size=4, steps_per_round=3 * num_records)
    batches = drawn(plan, [""] * num_records)
    order = np.concatenate([records for batch in batches for records in batch])
    epochs = order[: len(order) // num_records * num_records].reshape(-1, num_records)
    assert {len(batch) for batch in batches} == {min(4, num_records)}
    assert {len(records) for batch in batches for records in batch} == {1}
    assert len(epochs) >= 3
    assert all(sorted(epoch) == list(range(num_records)) for epoch in epochs)


@pytest.mark.parametrize("plan", [*PRIVATE, PLAIN], ids=[*KINDS, "none"])
def test_json_round_trip(plan: ExamplePlan | UserPlan | NoPrivacy) -> None:
    """A client reads the very plan that the server made, of the same kind."""
    again = from_json(plan.to_json())
    assert again == plan
    assert type(again) is type(plan)
    assert again.to_json() == plan.to_json()


NOT_POSITIVE = (0, -1, -math.inf, math.nan)
OUT_OF_RANGE = [
    *[(name, value) for name in ("epsilon", "clip_norm") for value in (*NOT_POSITIVE, math.inf)],
    *[("noise_multiplier", value) for value in (*NOT_POSITIVE, math.inf)],
    *[("metric_noise_multiplier", value) for value in (*NOT_POSITIVE, math.inf)],
    *[("delta", value) for value in (*NOT_POSITIVE, 1.0, 2.0)],
    *[("sample_rate", value) for value in (*NOT_POSITIVE, 1.01)],
    *[(name, value) for name in ("normaliser", "steps_per_round", "rounds") for value in NOT_POSITIVE],
    *[("max_records_per_unit", value) for value in NOT_POSITIVE],
    ("unit_column", ""),
]


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused(name: str, value: float) -> None:
    """No plan without a guarantee can be made, here or from a message."""
    with pytest.raises(PrivacyError, match=f"{name}="):
        dataclasses.replace(PATIENTS, **{name: value})
    with pytest.raises(PrivacyError, match=f"{name}="):
        from_json(json.dumps({**json.loads(PATIENTS.to_json()), name: value}))


NO_NUMBERS = ("unit_column", "passes")
NUMBERS = [field.name for field in dataclasses.fields(PATIENTS) if field.name not in NO_NUMBERS]
WHOLE = ("normaliser", "steps_per_round", "rounds", "max_records_per_unit")
REQUIRED = [field.name for field in dataclasses.fields(PLAN)][:7]


@pytest.mark.parametrize("value", ["1", [1], {}], ids=repr)
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_is_none_is_refused(name: str, value: object) -> None:
    """A text, a list or an object in the place of a number is no plan."""
    with pytest.raises(PrivacyError):
        from_json(json.dumps({**json.loads(PATIENTS.to_json()), name: value}))


@pytest.mark.parametrize(
    "name", [name for name in NUMBERS if name not in ("metric_noise_multiplier", "shares")]
)
def test_an_absent_number_is_refused(name: str) -> None:
    """Null is no number, but for the metric, which need not leave."""
    with pytest.raises(PrivacyError):
        from_json(json.dumps({**json.loads(PATIENTS.to_json()), name: None}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, True) for name in NUMBERS if name not in ("delta",)],
        *[(name, 1.5) for name in WHOLE],
        *[(name, 10**400) for name in NUMBERS if name not in ("delta", "sample_rate")],
        *[("unit_column", value) for value in (5, True, ["patient"], {"patient": 1})],
        *[("passes", value) for value in (0, True, "other", None, ["fixed"])],
    ],
    ids=lambda value: str(value)[:12],
)
def test_a_value_of_another_type_is_refused(name: str, value: object) -> None:
    """True is no number, 1.5 steps are no steps, 10^400 is beyond any accountant, 5 is no column."""
    with pytest.raises(PrivacyError):
        from_json(json.dumps({**json.loads(PATIENTS.to_json()), name: value}))


@pytest.mark.parametrize("name", [*REQUIRED, "unit"])
def test_a_plan_with_something_missing_is_refused(name: str) -> None:
    """Nothing that makes the guarantee has a default."""
    values = json.loads(PLAN.to_json())
    del values[name]
    with pytest.raises(PrivacyError):
        from_json(json.dumps(values))


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("steps_per_round", 0)])
def test_a_plain_plan_out_of_range_is_refused(name: str, value: int) -> None:
    """Without privacy, too, a plan has at least one step of at least one record."""
    with pytest.raises(PrivacyError, match=name):
        dataclasses.replace(PLAIN, **{name: value})


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "5", "[]", "null", "{}", '"text"', "true"),
        *(
            '{"unit": "patient"}',
            '{"unit": "none"}',
            '{"unit": 5}',
            '{"unit": ["none"]}',
            '{"unit": {}}',
        ),
        '{"unit": "none", "batch_size": 1, "steps_per_round": 1, "more": 1}',
        PLAN.to_json().replace('"record"', '"patient"'),
        PATIENTS.to_json().replace('"patient"', '"record"', 1),
        PATIENTS.to_json().replace('"patient"', '"user"', 1),  # a unit has one word on the wire
        PLAN.to_json().replace('"record"', '"none"'),
        PLAN.to_json().replace('"record"', '"client"'),
        PLAN.to_json().replace('"record"', '"household"'),
        "[" * 100_000,
    ],
    ids=lambda text: text[:40],
)
def test_a_text_that_is_no_plan_is_refused(text: str) -> None:
    """A message that is no plan is a privacy error, whatever is wrong with it."""
    with pytest.raises(PrivacyError):
        from_json(text)


def test_another_processor_may_round_an_epsilon_otherwise() -> None:
    """A node accepts a plan that its own figure exceeds by 1e-10 of the budget, and none by 1e-7."""
    cost = accounting.epsilon(PLAN.run_events, PLAN.delta)
    dataclasses.replace(PLAN, epsilon=cost * (1 - 1e-10)).verify()
    with pytest.raises(PrivacyError, match="costs epsilon"):
        dataclasses.replace(PLAN, epsilon=cost * (1 - 1e-7)).verify()


@pytest.mark.timeout(patient(30))
@pytest.mark.parametrize("rounds", [8_000, 10**9])
def test_a_plan_that_is_costly_to_check_is_refused_at_once(rounds: int) -> None:
    """A hostile plan of many rounds is refused by the cheap accountant, or by the number of its steps."""
    plan = dataclasses.replace(PLAN, noise_multiplier=0.7, sample_rate=0.2, rounds=rounds)
    with pytest.raises(PrivacyError, match=r"costs epsilon|no accounting"):
        plan.verify()
