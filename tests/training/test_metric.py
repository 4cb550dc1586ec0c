"""The noisy metric on a client's own records: what it is before the noise, and its noise."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats
from support.families import (
    LABELS,
    UNKNOWN_TOKEN,
    WILD_TOKEN,
    examples_of,
    load_family,
    random_state,
    record_plan,
    task_of,
    user_plan,
    wild_token,
)

from fedslm.errors import PrivacyError, TrainingError
from fedslm.models.loaded import LoadedModel
from fedslm.privacy.gaussian import GaussianNoise
from fedslm.privacy.plan import PrivatePlan
from fedslm.records import Event
from fedslm.tasks.base import Example, Task
from fedslm.training import metric
from fedslm.training.batches import forward
from fedslm.training.metric import noisy_metric

Family = tuple[LoadedModel, Task]
SIGMA = 3.0
PLANS = [plan(metric_noise_multiplier=SIGMA) for plan in (record_plan, user_plan)]
BY_PLAN = pytest.mark.parametrize("plan", PLANS, ids=["record", "patient"])
OFTEN = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(
    params=[("bert", "classification"), ("llama", "causal-lm")], ids=lambda f: f[0], scope="module"
)
def family(request: pytest.FixtureRequest, family_directory: Callable[[str, str], Path]) -> Family:
    """A loaded model and its task."""
    architecture, name = request.param
    return load_family(family_directory(architecture, name), name), task_of(name)


@pytest.fixture
def exactly(family: Family) -> Iterator[Callable[[list[Example], PrivatePlan], tuple[float, float]]]:
    """The two numbers with noise that is zero, on a base in which one token is infinite."""
    model, task = family
    adapter = random_state(model)
    with wild_token(model), pytest.MonkeyPatch.context() as patch:
        patch.setattr(GaussianNoise, "draw", lambda self, shape, stddev: np.zeros(shape))
        yield lambda examples, plan: noisy_metric(model, task, examples, adapter, plan)


def guesses(family: Family, example: Example) -> list[int]:
    """The likeliest class, or the likeliest token after each token, from a batch of one."""
    model, task = family
    model.adapter.write(random_state(model))
    model.adapter.network.eval()
    with torch.inference_mode():
        logits, _ = forward(model, task, [example])
    return logits[0].argmax(dim=-1).reshape(-1).tolist()


def score(family: Family, example: Example) -> float:
    """One record's score, from the logits of a batch of one."""
    guessed = guesses(family, example)
    if family[1].labels:
        return float(guessed == [example.target])
    hits = [a == b for a, b in zip(guessed, example.input_ids[1:], strict=False)]
    return sum(hits) / len(hits)


def predictable(family: Family, example: Example) -> Example:
    """A record that the model gets right, at least in part."""
    guessed = guesses(family, example)[0]
    if family[1].labels:
        return replace(example, target=guessed)
    first, *rest = example.input_ids
    return replace(example, input_ids=(first, guessed, *rest))


def test_records_add_their_score_and_one(family: Family, exactly) -> None:
    """With the record as the unit, the numbers are the sum of scores and the number of records."""
    examples = [*examples_of(6), *(predictable(family, each) for each in examples_of(5, seed=1))]
    examples = [replace(each, owner="one") for each in examples]
    expected = sum(score(family, each) for each in examples)
    assert 0 < expected < len(examples)
    assert exactly(examples, PLANS[0]) == pytest.approx((expected, 11.0))


def test_scores_add_up_exactly(family: Family, exactly, monkeypatch: pytest.MonkeyPatch) -> None:
    """One record moves the sum of scores by at most 1, also among scores made for float64's rounding."""
    half = 2**11
    filling = [
        0.5,
        *[1.0] * (half - 1),
    ]  # then each score is rounded up once the sum reaches a power of two
    rising = [half * 2.0**-53 * (1 + 2.0**-20)] * half
    moved = []
    for scores in ([1.0, *filling, *rising], [*filling, *rising]):
        monkeypatch.setattr(metric, "_scores", lambda *_, scores=scores: scores)
        moved.append(exactly(examples_of(1) * len(scores), PLANS[0])[0])
    one_by_one = [np.add.accumulate([*one, *filling, *rising])[-1] for one in ([1.0], [])]
    assert one_by_one[0] - one_by_one[1] > 1
    assert moved[0] - moved[1] == 1


def test_patients_add_their_mean_and_one(family: Family, exactly) -> None:
    """With the patient as the unit, the numbers are the sum of mean scores and the number of patients."""
    examples = [*examples_of(4), *(predictable(family, each) for each in examples_of(5, seed=1))]
    owners = ["a", "b", "c", "a", "b", "b", "d", "d", "b"]
    examples = [replace(each, owner=owner) for each, owner in zip(examples, owners, strict=True)]
    scores: dict[str, list[float]] = {}
    for each in examples:
        scores.setdefault(each.owner, []).append(score(family, each))
    means = [float(np.mean(values)) for values in scores.values()]
    assert all(0 <= mean <= 1 for mean in means)
    assert sum(means) > 0
    assert exactly(examples, PLANS[1]) == pytest.approx((sum(means), 4.0))


RECORDS = st.one_of(
    st.builds(lambda seed: examples_of(1, seed)[0], st.integers(0, 30)),
    st.just(Example((7, WILD_TOKEN, 9), 2)),
    st.just(Example((5, UNKNOWN_TOKEN, 7), 0)),
)


@OFTEN
@given(
    others=st.lists(st.tuples(RECORDS, st.sampled_from("abc")), max_size=5),
    extra=st.lists(RECORDS, min_size=1, max_size=5),
    right=st.booleans(),
)
def test_neighbours_differ_by_at_most_root_two(
    family: Family,
    exactly,
    others: list[tuple[Example, str]],
    extra: list[Example],
    right: bool,
) -> None:
    """Adding a patient (or a record) moves the numbers by (mean score, 1), mean score in [0, 1]."""
    rest = [replace(each, owner=owner) for each, owner in others]
    if right and extra[0].input_ids[1] not in (WILD_TOKEN, UNKNOWN_TOKEN):
        extra = [predictable(family, extra[0])]
    patient = [replace(each, owner="extra") for each in extra]
    for plan, added in ((PLANS[1], patient), (PLANS[0], patient[:1])):
        before, after = exactly(rest, plan), exactly([*added[:1], *rest, *added[1:]], plan)
        moved = np.subtract(after, before)
        assert np.linalg.norm(moved) <= np.sqrt(2) + 1e-9
        assert -1e-9 <= moved[0] <= 1 + 1e-9
        assert moved[1] == 1


@BY_PLAN
@pytest.mark.parametrize("target", range(len(LABELS)))
@pytest.mark.parametrize("token", [WILD_TOKEN, UNKNOWN_TOKEN], ids=["infinite", "not computable"])
def test_what_cannot_be_scored_counts_as_zero(
    exactly, plan: PrivatePlan, target: int, token: int
) -> None:
    """A record with NaN logits, or that raises, scores 0 whatever its label, and is counted."""
    assert exactly([Example((7, token, 9), target, "p")], plan) == (0.0, 1.0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 7.0, -7.0])
def test_scores_stay_in_their_range(
    family: Family, exactly, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    """A task whose score is not finite, or out of [0, 1], cannot make a record count for more than 1."""
    _, task = family
    monkeypatch.setattr(
        type(task), "per_example_score", lambda self, logits, batch: torch.tensor([value])
    )
    exact = exactly([replace(each, owner="p") for each in examples_of(2)], PLANS[1])
    assert exact == (1.0 if value == 7.0 else 0.0, 1.0)


def test_a_plan_without_a_metric_is_refused(family: Family) -> None:
    """No metric leaves that the plan does not charge."""
    model, task = family
    plan = record_plan()
    assert plan.metric_event is None
    with pytest.raises(PrivacyError, match="no metric"):
        noisy_metric(model, task, examples_of(2), random_state(model), plan)


@BY_PLAN
def test_metric_noise_is_calibrated_with_power(family: Family, plan: PrivatePlan) -> None:
    """KS accepts sigma·sqrt(2) for both numbers and rejects 2/3 and 3/2 of it; the two are independent."""
    model, task = family
    assert plan.metric_event == Event(1.0, SIGMA, 1)
    adapter = random_state(model)
    draws = np.array([noisy_metric(model, task, [], adapter, plan) for _ in range(1500)])
    for values in draws.T / (SIGMA * np.sqrt(2)):
        assert stats.kstest(values, "norm").pvalue > 1e-4
        assert stats.kstest(values / (2 / 3), "norm").pvalue < 1e-9
        assert stats.kstest(values / (3 / 2), "norm").pvalue < 1e-9
    assert abs(np.corrcoef(draws.T)[0, 1]) < 6 / np.sqrt(1500)


@BY_PLAN
def test_metric_noise_ignores_every_seed(family: Family, plan: PrivatePlan) -> None:
    """Equal requests under equal seeds of torch, NumPy and random are answered with other noise."""
    model, task = family
    adapter, drawn = random_state(model), set()
    for _ in range(2):
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)
        drawn.update(noisy_metric(model, task, [], adapter, plan))
    assert len(drawn) == 4


@BY_PLAN
def test_memory_that_runs_out_releases_nothing(
    family: Family, plan: PrivatePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record for which memory is too short does not count as zero: another record may have taken it."""
    model, task = family

    def scarce(*_: object, **__: object) -> None:
        torch.empty(1 << 50)

    monkeypatch.setattr(metric, "forward", scarce)
    with pytest.raises(TrainingError, match="memory ran out"):
        noisy_metric(model, task, examples_of(2), random_state(model), plan)
