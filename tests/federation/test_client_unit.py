"""Runs with a whole client as the unit: what is charged and said, and what a node and a config refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.served import chain_of
from support.tiny import PRIVATE, changed, problems

from fedslm import simulation, validation
from fedslm.audit.runs import audit_run
from fedslm.client.node import Node
from fedslm.config import Config, from_mapping
from fedslm.errors import PolicyRefused
from fedslm.federation.checkpoint import RunDirectory
from fedslm.privacy import accounting
from fedslm.privacy.calibration import calibrated, shares_of
from fedslm.privacy.plan import RunPlan
from fedslm.privacy.policy import EXAMPLE, PlanRequest

MakeConfig = Callable[..., Config]
UNIT = {
    **{key: value for key, value in PRIVATE.items() if key not in ("sample_rate", "unit")},
    "unit": "client",
    "noise": "distributed",
    "delta": 1e-2,
}
CHANGES = [
    ("privacy.unit", "client"),
    ("privacy.noise", "distributed"),
    ("privacy.sample_rate", ""),
    ("secure_aggregation.threshold", 4),
]


def whole_clients(make_config: MakeConfig, **secure: Any) -> Config:
    """A config of three whole clients that take several plain steps."""
    return make_config(
        privacy=UNIT,
        training={"local_steps": 3, "batch_size": 4},
        secure_aggregation={"threshold": 3, **secure},
        engine={"workers": 0},
    )


@pytest.mark.parametrize("protocol", ["masked", "ideal"])
def test_a_client_is_charged_one_release_a_round(protocol: str, make_config: MakeConfig) -> None:
    """Ledger, report and audit name the unit, and say what it does not protect."""
    report = simulation.simulate(whole_clients(make_config, protocol=protocol))
    path = Path(report["directory"])
    chain = chain_of(path / "nodes" / "client-00000")
    assert [(each.event.sample_rate, each.event.steps) for each in chain.charges] == [(1.0, 1)] * 3
    assert {each.unit for each in chain.charges} == {"client"}
    assert report["epsilon"] == pytest.approx(accounting.epsilon(chain.events, 1e-2))
    assert 7.5 < report["epsilon"] <= 8.0
    assert report["metrics_after"] != report["metrics_before"]
    assert {each.unit for _, each in RunDirectory.open(path)[0].statements()} == {"client"}
    audit = audit_run(path, empirical=True)
    assert audit["findings"] == []
    for page in ("report.md", "adapter/README.md", "audit.md"):
        text = " ".join((path / page).read_text(encoding="utf-8").split())
        assert "whole client" in text, page
        assert "record of one client" not in text.replace("*", ""), page
        assert "Poisson" not in text.partition("Self-test")[0], page


@pytest.mark.parametrize(
    ("unit", "refused"),
    [
        ("record", "does not protect one record"),
        ("user", "does not protect one user"),
        ("client", None),
    ],
)
def test_a_policy_for_records_does_not_take_clients_instead(
    unit: str, refused: str | None, tmp_path: Path, make_config: MakeConfig
) -> None:
    """A change of one record moves a client's update by up to twice the clip norm."""
    lines = [line for line in EXAMPLE.splitlines() if not line.startswith("allow_distributed_noise")]
    text = "\n".join(lines).replace('unit = "patient"  ', f'unit = "{unit}"  ')
    text = text.replace("= 0.8", "= 8.0").replace("delta = 1e-5", "delta = 1e-2")
    policy = (
        f"{text}\nallow_distributed_noise = true\nleast_honest_nodes = 3\nmost_colluding_nodes = 0\n"
    )
    (tmp_path / "policy.toml").write_text(policy)
    plan = calibrated_plan(whole_clients(make_config))
    node = Node(tmp_path, tmp_path, 0, deployed=False)
    asked = PlanRequest(plan, "a" * 64, "classification", "demo")
    if refused is None:
        node.admit(asked)
    else:
        with pytest.raises(PolicyRefused, match=refused):
            node.admit(asked)


def calibrated_plan(config: Config) -> RunPlan:
    """The plan of a config."""
    privacy, training = config.privacy, config.training
    shares = shares_of(privacy, training, config.secure_aggregation, config.federation.cohort_size)
    return calibrated(privacy, training, config.federation.rounds, shares)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("privacy.noise", "local", "leaves nothing to learn from"),
        ("privacy.sample_rate", 0.5, "has no effect"),
        ("privacy.overlapping", True, "a client is in one place"),
        ("privacy.unit_column", "site", "only for privacy.unit"),
        ("privacy.metric_noise_multiplier", 5.0, "sums only"),
        ("training.drift", "scaffold", "control variates"),
        ("aggregation.method", "stack", "more than the sum"),
    ],
)
def test_what_a_whole_client_does_not_allow_is_refused(key: str, value: object, reason: str) -> None:
    """Each with its reason, under the key to change."""
    assert reason in problems(changed(*CHANGES, (key, value)))[key]


@pytest.mark.parametrize(
    ("key", "value"),
    [("training.local_steps", 7), ("training.optimizer", "adamw"), ("training.drift", "fedprox")],
)
def test_local_training_is_free_in_form(key: str, value: object) -> None:
    """A client's own steps are plain, so any optimizer and any number of them is valid."""
    validation.check(from_mapping(changed(*CHANGES, (key, value))))
