"""Tests of the node's policy: each bound holds by itself, and no message can widen it."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest

from fedslm.config import TaskName
from fedslm.errors import PolicyRefused
from fedslm.privacy.limits import Limits
from fedslm.privacy.plan import ExamplePlan, NoPrivacy, UserPlan
from fedslm.privacy.policy import EXAMPLE, NodePolicy, PlanRequest, read_policy

POLICY = NodePolicy(
    unit="user",
    unit_column="patient",
    epsilon=8.0,
    delta=1e-6,
    min_noise_multiplier=0.5,
    max_clip_norm=2.0,
    max_sample_rate=0.1,
    max_records_per_unit=16,
    max_steps_per_round=100,
    max_rounds_per_day=50,
    base_models=("a" * 64, "b" * 64),
    tasks=("classification",),
    metrics="noisy",
    min_metric_noise_multiplier=5.0,
    weakest_passes="fixed",
)
# On every bound: anything more is refused.
PLAN = UserPlan(
    epsilon=8.0,
    delta=1e-6,
    clip_norm=2.0,
    noise_multiplier=0.5,
    sample_rate=0.1,
    normaliser=32,
    steps_per_round=100,
    rounds=10,
    metric_noise_multiplier=5.0,
    unit_column="patient",
    max_records_per_unit=16,
)
ASKED = PlanRequest(PLAN, base_sha256="a" * 64, task="classification", base="demo")
RECORDS = ExamplePlan(
    **{field.name: getattr(PLAN, field.name) for field in dataclasses.fields(ExamplePlan)}
)


def asked(**changes: Any) -> PlanRequest:
    """What is asked, with changes of the plan."""
    return dataclasses.replace(ASKED, plan=dataclasses.replace(PLAN, **changes))


def policy(**changes: Any) -> NodePolicy:
    """The policy with changes, checked like a file."""
    return NodePolicy.model_validate({**POLICY.model_dump(), **changes})


def reasons(node: NodePolicy, what: PlanRequest) -> list[str]:
    """Why something is refused."""
    with pytest.raises(PolicyRefused) as refused:
        node.check(what)
    text = str(refused.value)
    assert text.startswith("refused by the node's policy: ")
    return text.removeprefix("refused by the node's policy: ").split("; ")


def test_what_is_on_every_bound_is_allowed() -> None:
    """A bound is the last value that is allowed."""
    POLICY.check(ASKED)
    POLICY.check(dataclasses.replace(ASKED, base_sha256="b" * 64))
    POLICY.check(asked(metric_noise_multiplier=None))


BEYOND = [
    ({"epsilon": 8.001}, "epsilon 8.001 is above 8"),
    ({"delta": 1.01e-6}, "delta 1.01e-06 is above 1e-06"),
    ({"noise_multiplier": 0.499}, "noise_multiplier 0.499 is below 0.5"),
    ({"clip_norm": 2.01}, "clip_norm 2.01 is above 2"),
    ({"sample_rate": 0.11}, "sample_rate 0.11 is above 0.1"),
    ({"steps_per_round": 101}, "steps_per_round 101 is above 100"),
    ({"max_records_per_unit": 17}, "max_records_per_unit 17 is above 16"),
    ({"unit_column": "visit"}, "unit_column 'visit' is not 'patient'"),
    ({"metric_noise_multiplier": 4.9}, "metric_noise_multiplier 4.9 is below 5.0"),
]


@pytest.mark.parametrize(("changes", "reason"), BEYOND, ids=[reason for _, reason in BEYOND])
def test_each_bound_is_refused_alone(changes: dict[str, Any], reason: str) -> None:
    """A plan beyond one bound is refused for that one, with both values in the reason."""
    assert reasons(POLICY, asked(**changes)) == [reason]


def test_a_weaker_unit_is_refused() -> None:
    """Who asks for patients does not get records; the stronger unit is always allowed."""
    found = reasons(POLICY, dataclasses.replace(ASKED, plan=RECORDS))
    assert found == ["unit 'record' is weaker than 'user'"]
    policy(unit="record").check(dataclasses.replace(ASKED, plan=RECORDS))
    policy(unit="record").check(ASKED)


@pytest.mark.parametrize("unit", ["record", "user"])
def test_no_policy_allows_a_plan_without_privacy(unit: str) -> None:
    """Plain training is weaker than any unit, whatever else the policy allows."""
    plain = PlanRequest(NoPrivacy(batch_size=1, steps_per_round=1), "a" * 64, "classification", "demo")
    assert reasons(policy(unit=unit), plain) == [f"unit 'none' is weaker than '{unit}'"]


def test_steps_are_bounded_without_privacy_too() -> None:
    """A policy that lets a server train without privacy keeps its bound on the steps of a round."""
    open_policy = policy(unit="none")
    open_policy.check(PlanRequest(NoPrivacy(1, 100), "a" * 64, "classification", "demo"))
    plain = PlanRequest(NoPrivacy(1, 101), "a" * 64, "classification", "demo")
    assert reasons(open_policy, plain) == ["steps_per_round 101 is above 100"]


def test_a_run_that_asks_for_more_than_a_run_may_spend_is_refused() -> None:
    """A plan over the limit of a run is refused before it begins; one that only a day stops may begin."""
    slow = policy(max_epsilon_per_run=0.8, max_epsilon_per_day=0.1)
    assert reasons(slow, ASKED) == ["epsilon of a run 8 is above 0.8"]
    slow.check(asked(epsilon=0.8))


def test_the_budget_in_words() -> None:
    """The operator reads all three bounds, and which are missing."""
    assert policy(max_epsilon_per_run=0.8).budget_in_words() == (
        "at most ε = 8 at δ = 1e-06 for one user, 0.8 in a run, no limit for 24 hours"
    )
    assert "without privacy" in policy(unit="none").budget_in_words()


def test_when_replies_leave_in_words() -> None:
    """The operator reads the period, or what its absence shows."""
    with_period = policy(answer_after_seconds=90.0)
    assert with_period.in_words() == (
        f"{with_period.budget_in_words()}; replies leave 90 s after their request"
    )
    assert "how many records were sampled: set answer_after_seconds" in policy().in_words()


def test_another_task_or_base_is_refused() -> None:
    """Only what the policy names may be trained, or be trained on."""
    other = dataclasses.replace(ASKED, task="causal-lm")
    assert reasons(POLICY, other) == ["task 'causal-lm' is not among ['classification']"]
    other = dataclasses.replace(ASKED, base_sha256="c" * 64)
    assert reasons(POLICY, other) == [f"base model {'c' * 12} is not allowed"]
    policy(base_models=["any"]).check(other)
    assert len(reasons(policy(base_models=[]), ASKED)) == 1
    assert len(reasons(policy(tasks=[]), ASKED)) == 1
    assert len(reasons(policy(base_models=["a" * 12]), ASKED)) == 1
    named = policy(base_names=["demo", "org/small"])
    named.check(ASKED)
    other = dataclasses.replace(ASKED, base="/etc/" + "x" * 200)
    assert reasons(named, other) == [f"a base model called {('/etc/' + 'x' * 75)!r} is not allowed"]


def test_the_server_cannot_choose_the_column() -> None:
    """Without a column in the policy no plan of patients is allowed: it could name a row number."""
    found = reasons(policy(unit="record", unit_column=""), ASKED)
    assert found == ["the policy names no unit_column, so the server cannot choose one"]


def test_metrics_leave_only_if_the_policy_says_so() -> None:
    """No metric by default, and none without a bound on its noise."""
    values = POLICY.model_dump(exclude={"metrics"})
    assert reasons(NodePolicy.model_validate(values), ASKED) == ["no metric may leave"]
    unbounded = policy(min_metric_noise_multiplier="")
    assert reasons(unbounded, ASKED) == ["metric_noise_multiplier 5 is below any"]
    unbounded.check(asked(metric_noise_multiplier=None))


def test_all_reasons_are_named_at_once() -> None:
    """Whoever asks for too much in many ways learns of all of them."""
    changes = {key: value for change, _ in BEYOND for key, value in change.items()}
    what = dataclasses.replace(asked(**changes), task="other", base_sha256="c" * 64)
    found = reasons(POLICY, what)
    assert sorted(found[2:]) == sorted(reason for _, reason in BEYOND)
    assert len(found) == len(BEYOND) + 2


def test_the_ledger_is_held_to_plan_and_policy() -> None:
    """The run's budget is the plan's, the lifetime's and the rounds of a day are the node's."""
    plan = dataclasses.replace(PLAN, epsilon=3.0, delta=1e-7)
    assert POLICY.limits(plan) == Limits(run=(3.0, 1e-7), lifetime=(8.0, 1e-6), rounds_per_day=50)
    slow = policy(max_epsilon_per_run=0.8, max_epsilon_per_day=0.5).limits(plan)
    assert (slow.per_run, slow.per_day) == ((0.8, 1e-6), (0.5, 1e-6))
    assert not slow.allows_unprotected
    assert policy(unit="none").limits(NoPrivacy(1, 1)).allows_unprotected
    rare = policy(max_rounds=7, min_seconds_between_rounds=60.0).limits(plan)
    assert (rare.rounds, rare.seconds_between) == (7, 60.0)


def write(directory: Path, text: str | bytes) -> Path:
    """A policy file."""
    path = directory / "policy.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_the_example_can_be_used(tmp_path: Path) -> None:
    """The printed example is a policy, names every key (four of them as comments), and refuses records and metrics."""
    found = read_policy(write(tmp_path, EXAMPLE))
    assert (found.max_rounds, found.min_seconds_between_rounds) == (None, None)
    whole = EXAMPLE.replace("# max_rounds", "max_rounds").replace("# min_seconds", "min_seconds")
    whole = whole.replace("# least_honest", "least_honest").replace("# most_coll", "most_coll")
    assert set(tomllib.loads(whole)) == set(NodePolicy.model_fields)
    assert all(f'"{task}"' in EXAMPLE for task in get_args(TaskName))
    assert read_policy(write(tmp_path, whole)).min_seconds_between_rounds == 3600.0
    found.check(asked(metric_noise_multiplier=None, epsilon=0.8))
    assert reasons(found, asked(epsilon=0.8)) == ["no metric may leave"]
    assert found.max_epsilon_per_run == found.max_epsilon_per_day == found.epsilon / 10
    assert reasons(found, dataclasses.replace(ASKED, plan=RECORDS))[0].startswith("unit 'record'")


REQUIRED = [
    *("unit", "epsilon", "delta", "min_noise_multiplier"),
    *("max_steps_per_round", "max_rounds_per_day", "base_models", "tasks"),
]


@pytest.mark.parametrize("key", REQUIRED)
def test_what_protects_somebody_has_no_default(tmp_path: Path, key: str) -> None:
    """A policy that leaves a bound out trains nothing, and says which."""
    lines = [line for line in EXAMPLE.splitlines() if not line.startswith(f"{key} =")]
    with pytest.raises(PolicyRefused, match=rf"policy.toml is invalid \({key}\), so it trains nothing"):
        read_policy(write(tmp_path, "\n".join(lines)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("unit", '"nobody"'), ("unit", '"clients"'), ("unit", "2"), ("unit_column", "5")),
        *(("epsilon", "0.0"), ("epsilon", "inf"), ("epsilon", "nan"), ("epsilon", '"8"')),
        *(("epsilon", "-1.0"), ("epsilon", "true"), ("delta", "0.0"), ("delta", "1.0")),
        *(("delta", "nan"), ("min_noise_multiplier", "0.0"), ("min_noise_multiplier", "nan")),
        *(("max_clip_norm", "inf"), ("max_clip_norm", "0.0"), ("max_sample_rate", "1.5")),
        *(("max_sample_rate", "0.0"), ("max_records_per_unit", "0"), ("max_records_per_unit", "1.5")),
        *(("max_steps_per_round", "0"), ("max_steps_per_round", "1.5")),
        *(("max_rounds_per_day", "0"), ("max_rounds_per_day", '"50"')),
        *(
            ("max_epsilon_per_run", "0.0"),
            ("max_epsilon_per_run", "nan"),
            ("max_epsilon_per_day", "true"),
        ),
        *(("max_rounds", "0"), ("max_rounds", "nan"), ("min_seconds_between_rounds", "-1.0")),
        *(
            ("answer_after_seconds", value)
            for value in ("0.0", "-1.0", "nan", "inf", "true", "43200.1")
        ),
        *(("base_models", "5"), ("tasks", "[5]"), ("metrics", '"exact"')),
        *(("min_metric_noise_multiplier", "0.0"), ("max_round", "5")),
    ],
)
def test_an_invalid_value_trains_nothing(tmp_path: Path, key: str, value: str) -> None:
    """A bound that is none, or a key that is misspelt, closes the node; the message names the key."""
    lines = [line for line in EXAMPLE.splitlines() if not line.startswith(f"{key} =")]
    path = write(tmp_path, "\n".join([*lines, f"{key} = {value}"]))
    with pytest.raises(PolicyRefused, match=rf"policy.toml is invalid \({key}") as refused:
        read_policy(path)
    assert str(tmp_path) not in str(refused.value)
    assert value.strip('"') not in str(refused.value).replace(key, "")


@pytest.mark.parametrize("content", [b"\xff\xfe", b"unit =", b"= 5", b"unit = 1\nunit = 2"], ids=repr)
def test_a_file_that_cannot_be_read_trains_nothing(tmp_path: Path, content: bytes) -> None:
    """What is no TOML closes the node, and the message shows neither its place nor its content."""
    with pytest.raises(
        PolicyRefused, match=r"policy.toml cannot be read, so it trains nothing"
    ) as refused:
        read_policy(write(tmp_path, content))
    assert str(tmp_path) not in str(refused.value)


def test_a_missing_file_trains_nothing(tmp_path: Path) -> None:
    """No policy is not any policy; a directory in its place is none either."""
    with pytest.raises(PolicyRefused, match=r"^this node has no policy.toml, so it trains nothing$"):
        read_policy(tmp_path / "policy.toml")
    (tmp_path / "policy.toml").mkdir()
    with pytest.raises(PolicyRefused, match=r"^the node's policy.toml cannot be read, so"):
        read_policy(tmp_path / "policy.toml")


def test_an_empty_file_names_everything_that_is_missing(tmp_path: Path) -> None:
    """An empty policy is refused with every key that it must have."""
    with pytest.raises(PolicyRefused) as refused:
        read_policy(write(tmp_path, ""))
    assert all(key in str(refused.value) for key in REQUIRED)
