"""Whole runs with secure aggregation: the sum is right, clients may drop out, and nothing is asked twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.served import StopDuring, chain_of, masked
from support.tiny import changed, problems

from fedslm import layout, simulation
from fedslm.client import handlers, membership, private
from fedslm.client.node import Release
from fedslm.client.round import ClientRound
from fedslm.config import Config
from fedslm.federation.checkpoint import RunDirectory
from fedslm.protocol.messages import Reply
from fedslm.records import AdapterState
from fedslm.secagg.kept import KEYS, SHARES, SURVIVORS, UNMASK
from fedslm.storage import load_adapter

MakeConfig = Callable[..., Config]
SHARED = [
    ("privacy.noise", "distributed"),
    ("training.local_steps", 1),
    ("training.optimizer", "sgd"),
    ("secure_aggregation.threshold", 4),
]


def known_part(client_round: ClientRound, *_: object) -> Release:
    """A part that a test knows, instead of a noisy one."""
    size = sum(np.size(each) for each in client_round.request.adapter.tensors.values())
    number, client = client_round.request.round, client_round.node.client
    generator = np.random.default_rng([number, client])
    words = generator.integers(-(2**20), 2**20, size).astype(np.int64).astype(np.uint32)
    return Release(AdapterState({}), words=words)


def records_of(path: Path) -> list[Any]:
    """The rounds of a run."""
    return RunDirectory.open(path)[0].records()


def refusing(leg: str, client: int, round: int = 2) -> Callable[[ClientRound], Reply]:
    """Answers legs as a client does, but for one leg of one client, which fails."""
    answer = membership.answer_leg

    def answered(client_round: ClientRound) -> Reply:
        asked = client_round.request
        if (asked.leg and asked.leg.name, client_round.node.client, asked.round) == (
            leg,
            client,
            round,
        ):
            raise RuntimeError("this client is gone")
        return answer(client_round)

    return answered


def test_masked_and_plain_sums_move_the_adapter_equally(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """From the same parts both protocols make the same adapter, value by value."""
    monkeypatch.setattr(private, "make_share", known_part)
    adapters = {}
    for protocol in ("ideal", "masked"):
        config = masked(make_config, 3, protocol=protocol)
        changed_run = config.run.model_copy(update={"directory": str(tmp_path / protocol)})
        simulation.simulate(config.model_copy(update={"run": changed_run}))
        adapters[protocol] = RunDirectory.open(tmp_path / protocol)[0].load()
    ideal, found = (each.server.moving for each in adapters.values() if each is not None)
    assert ideal.sha256() == found.sha256()
    assert ideal.sha256() != load_adapter(tmp_path / "ideal" / layout.FROZEN).sha256()


def test_what_leaves_and_stays_shows_no_part(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reply and the files of a node have the masked part; the secrets are gone after the sum."""
    monkeypatch.setattr(private, "make_share", known_part)
    sent: list[Reply] = []
    train = handlers._answer

    def noted(client_round: ClientRound) -> Reply:
        sent.append(train(client_round))
        return sent[-1]

    monkeypatch.setattr(handlers, "_answer", noted)
    path = Path(simulation.simulate(masked(make_config, 3))["directory"])
    assert len(sent) == 9
    node = path / "nodes" / "client-00000"
    (state,) = (node / layout.SECAGG).glob("*/state.json")
    assert '"secrets": null' in state.read_text()
    assert not (node / layout.RELEASE_TENSORS).exists()
    small = [
        np.abs(each.words.astype(np.int32)).max() < 2**21 for each in sent if each.words is not None
    ]
    assert len(small) == 9
    assert not any(small)  # a known part has no larger value: each of these has masks


@pytest.mark.parametrize("leg", [KEYS, SHARES, SURVIVORS, UNMASK])
def test_a_client_that_drops_out_at_a_leg_does_not_stop_the_round(
    leg: str, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others make the sum, and the record names the client; after its part came, it is in the sum."""
    monkeypatch.setattr(handlers, "answer_leg", refusing(leg, 1))
    report = simulation.simulate(masked(make_config))
    path = Path(report["directory"])
    first, second, third = records_of(path)
    assert [each.kept for each in (first, second, third)] == [False, False, False]
    assert (first.completed, third.completed) == (3, 3)
    assert second.completed == (2 if leg in (KEYS, SHARES) else 3)
    assert any("site-1: failed" in each for each in second.reasons)
    charged = [each.round for each in chain_of(path / "nodes" / "client-00001").charges]
    assert charged == ([1, 3] if leg in (KEYS, SHARES) else [1, 2, 3])


@pytest.mark.parametrize("leg", [KEYS, SHARES, SURVIVORS, UNMASK])
def test_too_few_clients_at_a_leg_make_no_sum(
    leg: str, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing moves in that round; those that had trained have paid; the run goes on."""
    monkeypatch.setattr(handlers, "answer_leg", refusing(leg, 1))
    path = Path(simulation.simulate(masked(make_config, 3))["directory"])
    first, second, third = records_of(path)
    assert [each.kept for each in (first, second, third)] == [False, True, False]
    assert any("the threshold is 3" in each for each in second.reasons)
    charged = [each.round for each in chain_of(path / "nodes" / "client-00000").charges]
    assert charged == ([1, 3] if leg in (KEYS, SHARES) else [1, 2, 3])


def test_a_round_in_which_the_server_stops_is_lost(make_config: MakeConfig) -> None:
    """It is recorded and not asked for again: no client draws a second noise for the same round."""
    config = masked(make_config)
    path = Path(str(config.run.directory))
    with pytest.raises(KeyboardInterrupt):
        simulation.simulate(config, [StopDuring(2)])
    report = simulation.resume(path)
    first, second, third = records_of(path)
    assert [each.kept for each in (first, second, third)] == [False, True, False]
    assert "the server stopped" in second.reasons[0]
    charged = [each.round for each in chain_of(path / "nodes" / "client-00000").charges]
    assert charged == [1, 2, 3]
    assert report["epsilon"] <= 8.0


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("secure_aggregation.threshold", 3, "must be at least 4"),
        ("federation.num_clients", 300, "up to 256"),
        ("federation.num_clients", 10_001, "up to 10,000"),
        ("secure_aggregation.leg_deadline_seconds", 0, "greater than 0"),
    ],
)
def test_what_the_protocol_does_not_allow_is_refused(key: str, value: object, reason: str) -> None:
    """Each with its bound, under the key to change."""
    found = problems(changed(*SHARED, (key, value)))
    named = "secure_aggregation.protocol" if key == "federation.num_clients" else key
    assert reason in found[named]
