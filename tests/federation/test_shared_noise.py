"""Whole runs in which clients share the noise: what is charged, what is said, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.served import StopDuring, chain_of
from support.tiny import PATIENT, PRIVATE, changed, problems

from fedslm import simulation
from fedslm.audit.runs import audit_run
from fedslm.client.node import Node
from fedslm.config import Config
from fedslm.errors import PolicyRefused, PrivacyError
from fedslm.federation.checkpoint import RunDirectory
from fedslm.privacy import accounting
from fedslm.privacy.plan import ExamplePlan, from_json
from fedslm.privacy.policy import EXAMPLE, PlanRequest
from fedslm.privacy.shares import NoiseShares

MakeConfig = Callable[..., Config]
STEP = {"local_steps": 1, "optimizer": "sgd", "learning_rate": 0.05, "batch_size": 6}
SECURE = {"threshold": 3, "max_colluding": 1}
SHARED = [
    ("privacy.noise", "distributed"),
    ("training.local_steps", 1),
    ("training.optimizer", "sgd"),
    ("secure_aggregation.threshold", 4),
    ("secure_aggregation.max_colluding", 1),
    ("secure_aggregation.protocol", "ideal"),
]
ALLOWS = "allow_distributed_noise = true"
PLAN = ExamplePlan(
    epsilon=8.0,
    delta=1e-5,
    clip_norm=1.0,
    noise_multiplier=2.0,
    sample_rate=0.05,
    normaliser=16,
    steps_per_round=1,
    rounds=5,
    shares=NoiseShares(4, 1, 18, "ideal"),
)


def sharing(make_config: MakeConfig, protocol: str = "ideal", **privacy: Any) -> Config:
    """A config whose clients share the noise."""
    asked, secure = {**PRIVATE, "noise": "distributed", **privacy}, {**SECURE, "protocol": protocol}
    return make_config(privacy=asked, training=STEP, secure_aggregation=secure)


@pytest.mark.parametrize(
    ("protocol", "told"),
    [("ideal", "imulation of secure aggregation"), ("masked", "by secure aggregation")],
)
def test_both_numbers_are_charged_and_told(protocol: str, told: str, make_config: MakeConfig) -> None:
    """Ledger, statements, report, model card and audit name the assumption, and epsilon without it."""
    config = sharing(make_config, protocol)
    report = simulation.simulate(config)
    path = Path(report["directory"])
    chain = chain_of(path / "nodes" / "client-00000")
    assert [each.event.honest_nodes for each in chain.charges] == [2, 2, 2]
    assert {each.protocol for each in chain.charges} == {protocol}
    assert report["epsilon"] == pytest.approx(accounting.epsilon(chain.events, 1e-5))
    assert 7.5 < report["epsilon"] <= 8.0
    weaker = accounting.epsilon_if_all_collude(chain.events, 1e-5)
    assert report["assumption"]["epsilon_if_all_collude"] == pytest.approx(weaker)
    assert weaker > report["epsilon"] + 1
    assert report["metrics_after"] != report["metrics_before"]
    for client, statement in RunDirectory.open(path)[0].statements():
        assert (statement.honest_nodes, client in range(3)) == (2, True)
    audit = audit_run(path)
    assert audit["findings"] == []
    assert audit["guarantee"]["assumption"]["epsilon_if_all_collude"] == pytest.approx(weaker)
    for page in ("report.md", "adapter/README.md", "audit.md"):
        text = " ".join((path / page).read_text(encoding="utf-8").split())
        assert "at least 2 of the nodes in every sum" in text
        assert f"{weaker:.3f}" in text
        assert told in text or (page, protocol) == ("adapter/README.md", "masked")


def test_patients_share_noise_too(make_config: MakeConfig) -> None:
    """The unit may be a user; the same assumption holds."""
    config = sharing(make_config, **{**PATIENT, "noise": "distributed"})
    report = simulation.simulate(config)
    assert report["plan"]["unit"] == "user"
    assert report["assumption"]["honest_nodes"] == 2
    assert 0 < report["epsilon"] <= 8.0


def test_too_few_parts_move_nothing_and_stay_charged(make_config: MakeConfig) -> None:
    """With one client fewer than the threshold no sum is formed; those that answered have paid."""
    config = sharing(make_config)
    path = Path(str(config.run.directory))
    policy = EXAMPLE.replace('"patient"', '"record"').replace("epsilon = 8.0", "epsilon = 1e-3")
    (path.parent / "policy.toml").write_text(policy)

    class Refusing(StopDuring):
        """Gives one client a policy that refuses, before the first round."""

        def on_start(self, config: Config, state: object) -> None:
            node = path / "nodes" / "client-00002"
            node.mkdir(parents=True, exist_ok=True)
            (node / "policy.toml").write_text(policy)

    report = simulation.simulate(config, [Refusing(99)])
    assert report["metrics_after"] == report["metrics_before"]
    assert any("secure_aggregation.threshold=3" in line for line in report["failures"])
    assert len(chain_of(path / "nodes" / "client-00000").charges) == 3
    assert not (path / "nodes" / "client-00002" / "ledger.jsonl").exists()


def test_a_repeated_request_gets_the_same_part_free_of_charge(make_config: MakeConfig) -> None:
    """After an interruption a client sends the same bytes again: a second noise would average out."""
    config = sharing(make_config)
    path = Path(str(config.run.directory))
    with pytest.raises(KeyboardInterrupt):
        simulation.simulate(config, [StopDuring(2)])
    node = path / "nodes" / "client-00000"
    before = chain_of(node).entries
    simulation.resume(path)
    assert chain_of(node).entries[: len(before)] == before
    assert [each.round for each in chain_of(node).charges] == [1, 2, 3]


@pytest.mark.parametrize(
    ("policy", "refused"),
    [
        ("", "allow_distributed_noise"),
        (ALLOWS, "least_honest_nodes"),
        (f"{ALLOWS}\nleast_honest_nodes = 3", "most_colluding_nodes"),
        (f"{ALLOWS}\nleast_honest_nodes = 2\nmost_colluding_nodes = 0", "assumes 3 honest nodes"),
        (f"{ALLOWS}\nleast_honest_nodes = 9\nmost_colluding_nodes = 2", "allows for 1 colluding"),
        (f"{ALLOWS}\nleast_honest_nodes = 3\nmost_colluding_nodes = 1", None),
    ],
)
def test_a_node_decides_what_it_assumes_of_others(
    policy: str, refused: str | None, tmp_path: Path
) -> None:
    """Nothing is shared unless the node's policy allows it, and for no more honest nodes than it trusts."""
    lines = [line for line in EXAMPLE.splitlines() if not line.startswith("allow_distributed_noise")]
    text = "\n".join(lines).replace('"patient"  ', '"record"  ').replace("= 0.8", "= 8.0")
    (tmp_path / "policy.toml").write_text(f"{text}\n{policy}\n")
    node = Node(tmp_path, tmp_path, 0, deployed=False)
    asked = PlanRequest(PLAN, "a" * 64, "classification", "demo")
    if refused is None:
        node.admit(asked)
    else:
        with pytest.raises(PolicyRefused, match=refused):
            node.admit(asked)
    with pytest.raises(PolicyRefused, match="for simulations"):
        replace(node, deployed=True).admit(asked)
    assert not (tmp_path / "ledger.jsonl").exists()


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("training.local_steps", 2, "must be 1"),
        ("training.optimizer", "adamw", "a step of AdamW"),
        ("training.weight_decay", 0.1, "must be 0"),
        ("training.drift", "fedprox", "not drifted"),
        ("aggregation.method", "fedsa", "more than the sum"),
        ("aggregation.method", "stack", "more than the sum"),
        ("aggregation.rule", "median", "no update that it could compare"),
        ("aggregation.norm_bound", 2.0, "no update that it could bound"),
        ("compression.upload", "int8", "modulo 2^32"),
        ("compression.keep_fraction", 0.5, "left out"),
        ("lora.client_ranks", [4, 8], "no common sum"),
        ("privacy.overlapping", True, "several times"),
        ("privacy.metric_noise_multiplier", 5.0, "sums only"),
        ("secure_aggregation.threshold", 6, "exceeds the cohort"),
        ("secure_aggregation.threshold", "", "is required"),
        ("secure_aggregation.max_colluding", 3, "leaves 1 honest"),
        ("engine.name", "deployed", "for simulations"),
    ],
)
def test_what_a_sum_does_not_allow_is_refused(key: str, value: object, reason: str) -> None:
    """Each with its reason, under the key to change."""
    found = problems(changed(*SHARED, (key, value)))
    named = "secure_aggregation.protocol" if key == "engine.name" else key
    assert reason in found[named]


def test_a_threshold_without_shared_noise_is_refused() -> None:
    """It would have no effect."""
    found = problems(changed(("secure_aggregation.threshold", 4)))
    assert list(found) == ["secure_aggregation.threshold"]


def test_a_plan_says_how_noise_is_shared_and_others_do_not() -> None:
    """A plan comes back from JSON; one without shares is written as by older versions."""
    assert from_json(PLAN.to_json()) == PLAN
    assert PLAN.training_event.honest_nodes == 3
    assert "shares" not in json.loads(replace(PLAN, shares=None).to_json())


@pytest.mark.parametrize("changes", [{"steps_per_round": 2}, {"metric_noise_multiplier": 5.0}])
def test_a_plan_of_several_steps_shares_nothing(changes: dict[str, Any]) -> None:
    """A server cannot ask for what has no bound, whatever its config says."""
    with pytest.raises(PrivacyError):
        replace(PLAN, **changes)
    values = {**json.loads(PLAN.to_json()), **changes}
    with pytest.raises(PrivacyError):
        from_json(json.dumps(values))
