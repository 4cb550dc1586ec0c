"""A plan's check with three accountants: once on a machine, and never weaker than the check itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from support.served import ask, context_of, first_request, write_policy
from support.tiny import PRIVATE

from fedslm import attestations
from fedslm.attestations import keep, places_of_node, places_of_simulation
from fedslm.client import private
from fedslm.config import Config
from fedslm.errors import PrivacyError
from fedslm.privacy.plan import ExamplePlan, PrivatePlan
from fedslm.privacy.verified import verified

PLAN = ExamplePlan(8.0, 1e-5, 1.0, 0.9, 0.05, 16, 10, rounds=3, metric_noise_multiplier=20.0)
LIE = replace(PLAN, epsilon=1.0)


class Checks:
    """Counts the checks that were computed."""

    def __init__(self, compute: Callable[[PrivatePlan], Any]) -> None:
        self.compute, self.count = compute, 0

    def of(self, plan: PrivatePlan) -> Any:
        """Computes one more."""
        self.count += 1
        return self.compute(plan)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Checks]:
    """The real checks of this test, counted, in a process that remembers none."""
    private._verify.cache_clear()
    found = Checks(PrivatePlan.verify)
    monkeypatch.setattr(PrivatePlan, "verify", lambda plan: found.of(plan))
    yield found
    private._verify.cache_clear()


def key_of(plan: PrivatePlan) -> dict[str, Any]:
    """What a plan's check is kept under."""
    events = [[event.sample_rate, event.noise_multiplier, event.steps] for event in plan.run_events]
    return {"events": events, "delta": plan.delta, "epsilon": plan.epsilon}


def test_a_plan_is_checked_once(checks: Checks, tmp_path: Path) -> None:
    """The first call computes; the next finds exactly the same accounts."""
    places = places_of_node(tmp_path)
    found = [verified(PLAN, places) for _ in range(3)]
    assert found == [checks.compute(PLAN)] * 3
    assert checks.count == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"noise_multiplier": 0.91},
        {"rounds": 2},
        {"steps_per_round": 9},
        {"sample_rate": 0.04},
        {"epsilon": 7.9},
        {"delta": 2e-5},
        {"metric_noise_multiplier": None},
    ],
    ids=str,
)
def test_another_plan_is_checked_anew(checks: Checks, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Whatever changes the cost, or the budget, is another check."""
    places = places_of_node(tmp_path)
    verified(PLAN, places)
    other = replace(PLAN, **changes)
    assert verified(other, places) == checks.compute(other)
    assert checks.count == 2


def test_what_does_not_change_the_cost_is_not(checks: Checks, tmp_path: Path) -> None:
    """The clip norm and the divisor are no part of epsilon."""
    places = places_of_node(tmp_path)
    verified(PLAN, places)
    verified(replace(PLAN, clip_norm=0.1, normaliser=4), places)
    assert checks.count == 1


def test_a_refusal_is_not_kept(checks: Checks, tmp_path: Path) -> None:
    """A plan that costs more than it states is refused each time, by a computation."""
    for _ in range(2):
        with pytest.raises(PrivacyError, match="costs epsilon="):
            verified(LIE, places_of_node(tmp_path))
    assert checks.count == 2
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize(
    "changes",
    [
        {"pld": 9.0, "prv": 9.0, "rdp": 9.0},
        {"rdp": 0.1},
        {"prv": 0.1},
        {"prv": None},
        {"pld": True},
        {"pld": "2"},
        {"pld": None},
        {"more": 1.0},
        {},
    ],
    ids=str,
)
def test_a_kept_result_that_does_not_pass_is_computed_anew(
    checks: Checks, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Figures over the budget, that disagree, or that are none, are not believed."""
    places, sound = places_of_node(tmp_path), checks.compute(PLAN)
    keep(places, "accounts", key_of(PLAN), {**asdict(sound), **changes} if changes else {})
    assert verified(PLAN, places) == sound
    assert checks.count == 1


def test_where_nothing_can_be_kept_it_is_computed_each_time(checks: Checks, tmp_path: Path) -> None:
    """A full disk makes no plan valid, and none invalid."""
    (tmp_path / "node").write_text("a file, where a directory is needed")
    places = places_of_node(tmp_path / "node")
    assert verified(PLAN, places) == verified(PLAN, places) == checks.compute(PLAN)
    assert checks.count == 2
    with pytest.raises(PrivacyError, match="costs epsilon="):
        verified(LIE, places)


def test_a_deployed_node_believes_its_own_accountants_alone(
    checks: Checks,
    config_in: Callable[..., Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A forged result in the user's cache, where the server's is, gets a lie past no real node."""
    monkeypatch.setenv("FEDSLM_CACHE", str(tmp_path / "cache"))
    request = first_request(config_in(tmp_path / "run", privacy=PRIVATE))
    honest = request.setup.plan
    assert isinstance(honest, PrivatePlan)
    lie = replace(honest, noise_multiplier=honest.noise_multiplier / 2)
    forged = {"pld": 7.9, "prv": 7.9, "rdp": 8.5}
    keep(places_of_simulation(tmp_path), "accounts", key_of(lie), forged)
    node = write_policy(tmp_path / "node", min_noise_multiplier=0.01)
    reply = ask(replace(request, setup=replace(request.setup, plan=lie)), context_of(0, node))
    assert (reply.status, "costs epsilon=" in reply.reason) == ("refused", True)


def test_the_clients_of_a_machine_share_the_servers_check(
    checks: Checks, config_in: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a simulation the server's check serves every worker; a real node has its own."""
    monkeypatch.setenv("FEDSLM_CACHE", str(tmp_path / "cache"))
    request = first_request(config_in(tmp_path / "run", privacy=PRIVATE))
    for client in range(2):
        private._verify.cache_clear()  # as in another worker
        assert ask(request, context_of(client)).status == "ok"
    assert checks.count == 1
    node = write_policy(tmp_path / "node")
    for _ in range(2):
        private._verify.cache_clear()
        assert ask(request, context_of(0, node)).status == "ok"
    assert checks.count == 2
    assert attestations.is_any_known(places_of_node(node), "accounts")
