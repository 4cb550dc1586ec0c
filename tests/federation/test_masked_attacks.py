"""What a hostile server can make of a masked round, with the real nodes of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.tiny import PRIVATE

from fedslm import simulation
from fedslm.config import Config
from fedslm.federation.checkpoint import RunDirectory
from fedslm.federation.exchange import Asked
from fedslm.privacy.plan import PrivatePlan
from fedslm.protocol.messages import Request

MakeConfig = Callable[..., Config]
STEP = {"local_steps": 1, "optimizer": "sgd", "learning_rate": 0.05, "batch_size": 6}


def masked(make_config: MakeConfig, threshold: int = 2, **secure: Any) -> Config:
    """A config of three clients that add masked parts, in this process."""
    return make_config(
        privacy={**PRIVATE, "noise": "distributed"},
        training=STEP,
        secure_aggregation={"threshold": threshold, **secure},
        engine={"workers": 0},
    )


def with_less_noise(plan: PrivatePlan) -> PrivatePlan:
    """The plan on the coarsest grid: the same epsilon, and fewer steps of noise in the sum."""
    if plan.shares is None:
        raise TypeError("the plan shares no noise")
    return replace(plan, shares=replace(plan.shares, grid_bits=16))


def test_clients_with_another_plan_are_in_no_common_sum(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server lets client 0 pay for the noise of all, and asks the others for less: they add no part."""
    of = Asked.of

    def lying(asked: Asked, client: int, *rest: Any) -> Request:
        request = of(asked, client, *rest)
        plan = request.setup.plan
        if client == 0 or not isinstance(plan, PrivatePlan):
            return request
        return replace(request, setup=replace(request.setup, plan=with_less_noise(plan)))

    monkeypatch.setattr(Asked, "of", lying)
    path = Path(simulation.simulate(masked(make_config, 2))["directory"])
    rounds = RunDirectory.open(path)[0].records()
    assert rounds
    assert all(each.kept for each in rounds)
    assert all(any("another plan" in reason for reason in each.reasons) for each in rounds)
    assert [each.parent.name for each in path.glob("nodes/*/ledger.jsonl")] == ["client-00000"]
