"""A run in which no round moved the adapter is a failure, with the reasons."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from support.served import write_policy
from support.superlink import SuperLink
from support.tiny import PRIVATE
from typer.testing import CliRunner

from fedslm import config as configuration
from fedslm.cli import app
from fedslm.config import Config
from fedslm.deployment.admission import NODES
from fedslm.deployment.authority import rekey
from fedslm.deployment.runs import overrides_of
from fedslm.deployment.status import status_of
from fedslm.errors import RunError
from fedslm.federation.participation import came_to_nothing, unknown_rounds
from fedslm.federation.tally import Tally
from fedslm.flower import serve_flower
from fedslm.privacy.keys import public_hex
from fedslm.protocol.messages import Reply
from fedslm.records import RoundRecord

MakeConfig = Callable[..., Config]


def record(number: int, *reasons: str, completed: int = 0, kept: bool = True) -> RoundRecord:
    """A round's line."""
    return RoundRecord(number, 9, completed, 1, 1, 0, kept, math.inf, {}, None, 0, 0, 1.0, reasons)


def test_a_round_without_a_statement_may_have_been_paid_for() -> None:
    """Late and failed clients, and all of a lost round, until a later statement; a refusal is free."""
    tally = Tally(4)
    for client, answer in enumerate(["late", Reply("failed", 2), Reply("refused", 2), Reply("ok", 2)]):
        tally.count(client, answer)
    values = {"kept": True, "epsilon": 1.0, "metrics": {}, "signal_to_noise": None, "seconds": 1.0}
    second = tally.record(2, **values)
    assert (second.completed, second.failed, second.late, second.refused) == (1, 1, 1, 1)
    rounds = [record(1, completed=9), second, Tally(4).lost(3, 1.0, range(4))]
    assert [unknown_rounds(rounds, client, 1) for client in range(5)] == [2, 2, 1, 1, 0]
    assert [unknown_rounds(rounds, 0, after) for after in (2, 3)] == [1, 0]


def test_the_most_frequent_reason_of_each_client() -> None:
    """Each client has one line, with how often it gave that reason; many clients take few lines."""
    rounds = [record(1, "client 0: a", "client 1: late"), record(2, "client 0: b", "client 1: late")]
    rounds.append(record(3, "client 0: b", *(f"client {number}: x" for number in range(2, 9))))
    lines = came_to_nothing(rounds).splitlines()
    assert lines[0] == "no node took part in any of the 3 rounds"
    assert lines[1:3] == ["client 0, 2 times: b", "client 1, 2 times: late"]
    assert lines[-1] == "and 4 more clients"
    assert len(lines) == 7


def test_one_round_that_moves_the_adapter_is_enough() -> None:
    """A run with such a round came to something, and one without rounds came to nothing bad."""
    late = record(1, "client 0: late")
    assert came_to_nothing([late, record(2, "client 0: late", completed=1, kept=False)]) == ""
    assert came_to_nothing([]) == ""


def test_answers_that_move_nothing_are_no_result() -> None:
    """Clients that answered in rounds that all kept the adapter: the rounds say why."""
    few = "the round: 1 replies are fewer than federation.min_replies=2"
    lines = came_to_nothing([record(n, "a: late", few, completed=1) for n in (1, 2)]).splitlines()
    assert lines[0] == "no round of 2 moved the adapter"
    assert lines[1:] == [
        "a, 2 times: late",
        "the round, 2 times: 1 replies are fewer than federation.min_replies=2",
    ]


def test_too_few_replies_in_every_round_end_with_1(make_config: MakeConfig, tmp_path: Path) -> None:
    """`fedslm simulate` fails, with the reasons, though fewer rounds than max_failed_rounds failed."""
    config = make_config(
        federation={"rounds": 1, "min_replies": 3}, attack={"kind": "nan", "clients": 1}
    )
    path = tmp_path / "config.toml"
    path.write_text(configuration.to_toml(config), encoding="utf-8")
    result = CliRunner().invoke(app, ["simulate", str(path), "--json"])
    assert result.exit_code == 1
    assert "tiny failed: no round of 1 moved the adapter" in result.stderr
    assert "2 replies are fewer than federation.min_replies=3" in result.stderr
    assert "the update contains NaN or infinity" in result.stderr
    assert "fewer than" in json.loads(result.stdout.splitlines()[-1])["stopped"]


def test_a_simulation_in_which_every_node_refuses(make_config: MakeConfig, tmp_path: Path) -> None:
    """`fedslm simulate` ends with 1 and the nodes' reasons, though no limit of failed rounds was met."""
    policy = write_policy(tmp_path / "policy", min_noise_multiplier=99.0) / "policy.toml"
    config = make_config(privacy=PRIVATE, federation={"rounds": 2}, engine={"policy": str(policy)})
    path = tmp_path / "config.toml"
    path.write_text(configuration.to_toml(config))
    done = CliRunner().invoke(app, ["simulate", str(path)], env={"COLUMNS": "300", "TERM": "dumb"})
    assert done.exit_code == 1
    assert "no node took part in any of the 2 rounds" in done.output
    assert ", 2 times: " in done.output
    assert "noise_multiplier" in done.output


def key_of(number: int) -> str:
    """A public key."""
    return public_hex(Ed25519PrivateKey.from_private_bytes(bytes([number] * 32)).public_key())


def test_a_superlink_that_stays_away_ends_the_run(
    config_in: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each round spends its deadline; after max_failed_rounds the run has failed, and its status says so."""
    node = {"name": "n", "node_key": "k", "ledger_key": "00", "revoked": False, "admitted_at": "now"}
    nodes = [
        {**node, "name": f"n{number}", "node_id": 5 + number, "ledger_key": key_of(number)}
        for number in range(3)
    ]
    rekey(tmp_path)
    (tmp_path / NODES).write_text(json.dumps({"nodes": nodes}))
    limits = {"rounds": 9, "max_failed_rounds": 2, "round_deadline_seconds": 1.0}
    config = config_in(tmp_path / "runs" / "gone", federation=limits)
    with SuperLink().up() as superlink:
        superlink.nodes = [5, 6, 7]
        grid, was_asked = superlink.grid(), superlink.get_nodes

        def once(content: bytes) -> object:
            superlink.status = 503
            return was_asked(content)

        monkeypatch.setattr(superlink, "get_nodes", once)
        with pytest.raises(RunError, match="2 rounds in a row"):
            serve_flower(grid, overrides_of(tmp_path, config), 1)
    (run,) = status_of(tmp_path, []).runs
    assert (run.state, run.round, run.late) == ("failed", 2, 6)
    lines = (tmp_path / "runs/gone/rounds.jsonl").read_text().splitlines()
    assert all(1.0 <= json.loads(line)["seconds"] < 20.0 for line in lines)
    assert "n0, 2 times: late" in (tmp_path / "runs/gone/error.txt").read_text()
