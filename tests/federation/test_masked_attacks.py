"""What a hostile server, or a roster that changed, can make of a masked round with real nodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.served import masked

from fedslm import simulation
from fedslm.config import Config
from fedslm.deployment import admission, authority, enrolment
from fedslm.deployment.rosters import sign_roster
from fedslm.errors import FederationError
from fedslm.federation import rounds
from fedslm.federation.checkpoint import RunDirectory
from fedslm.federation.exchange import Asked
from fedslm.federation.masked import Members, admitted_members
from fedslm.federation.roster import chosen_nodes
from fedslm.privacy.plan import PrivatePlan
from fedslm.protocol.messages import Request

MakeConfig = Callable[..., Config]
NAMES = ("north", "south", "west")


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
    found = RunDirectory.open(path)[0].records()
    assert found
    assert all(each.kept for each in found)
    assert all(any("another plan" in reason for reason in each.reasons) for each in found)
    assert [each.parent.name for each in path.glob("nodes/*/ledger.jsonl")] == ["client-00000"]


def test_a_node_that_left_the_roster_does_not_stop_the_others(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is resumed after a revocation goes on without that node, which is named."""
    signed = rounds.simulated_members

    def without_1(nodes: Path, num_clients: int) -> Members:
        members = signed(nodes, num_clients)
        return replace(members, numbers={0: 0, 2: 2})

    monkeypatch.setattr(rounds, "simulated_members", without_1)
    path = Path(simulation.simulate(masked(make_config, 2))["directory"])
    found = RunDirectory.open(path)[0].records()
    assert [(each.kept, each.completed) for each in found] == [(False, 2)] * 3
    assert all(any("not on the signed roster" in reason for reason in each.reasons) for each in found)
    assert not (path / "nodes" / "client-00001" / "ledger.jsonl").exists()


def test_a_run_knows_who_is_on_the_roster_after_a_revocation(tmp_path: Path) -> None:
    """The others keep their numbers; a roster without any node of the run is refused."""
    server = tmp_path / "server"
    server.mkdir()
    (server / "federation.toml").write_text('name = "t"\nhost = "127.0.0.1"\nport = 8443\n')
    authority.create_authority(server, "t", 2)
    authority.rekey(server)
    for number, name in enumerate(NAMES):
        (tmp_path / name).mkdir()
        admission.admit(server, enrolment.enroll(tmp_path / name, name), lambda *_, n=number: 5 + n)
    nodes = chosen_nodes(server / admission.NODES, [], 3)
    sign_roster(server)
    assert admitted_members(server, nodes).numbers == {0: 0, 1: 1, 2: 2}
    admission.revoke(server, NAMES[1], lambda _: None)
    sign_roster(server)
    assert admitted_members(server, nodes).numbers == {0: 0, 2: 2}
    with pytest.raises(FederationError, match="no node of this run"):
        admitted_members(server, {0: nodes[1]})
