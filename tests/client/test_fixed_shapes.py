"""The shapes that a node uses: measured once, kept by what they depend on, withdrawn for good."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.served import ask, context_of, first_request, with_plan, write_policy
from support.tiny import PRIVATE

from fedslm.client import fixed_shapes
from fedslm.config import Config
from fedslm.protocol.messages import Reply, Request
from fedslm.training.per_record import ClosedForm
from fedslm.verification import bit_proof


@pytest.fixture(scope="module")
def request_of_a_run(
    config_in: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory
) -> Request:
    """A server's first request, under a plan that samples every record."""
    request = first_request(config_in(tmp_path_factory.mktemp("server") / "run", privacy=PRIVATE))
    return with_plan(request, sample_rate=0.2, noise_multiplier=5.0, steps_per_round=2)


@pytest.fixture(autouse=True)
def forgetful() -> Iterator[None]:
    """Nothing that one process knows is known to the next test."""
    fixed_shapes._measured.cache_clear()
    yield
    fixed_shapes._measured.cache_clear()


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """A node's directory, with the usual policy."""
    return write_policy(tmp_path / "node")


def kept(node: Path) -> list[dict[str, Any]]:
    """What the node keeps about shapes."""
    files = sorted((node / "attestations").glob("bit-proof-*.json"))
    return [json.loads(path.read_text())["values"] for path in files]


def answer(request: Request, node: Path) -> Reply:
    """The reply of a node whose process has just started."""
    fixed_shapes._measured.cache_clear()
    return ask(request, context_of(0, node))


def test_shapes_are_measured_once_and_before_a_record_is_read(
    request_of_a_run: Request, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first round measures and keeps; the next process reads; another adapter is measured again."""
    order: list[str] = []
    real, read = bit_proof.proved_shapes, fixed_shapes.ClientRound.records

    def measured(*arguments: Any) -> Any:
        order.append("measured")
        return real(*arguments)

    def records(*arguments: Any, **options: Any) -> Any:
        order.append("read")
        return read(*arguments, **options)

    monkeypatch.setattr(bit_proof, "proved_shapes", measured)
    monkeypatch.setattr(fixed_shapes.ClientRound, "records", records)
    assert answer(request_of_a_run, node).status == "ok"
    assert order == ["measured", "read"]
    assert [set(each) for each in kept(node)] == [{"shapes", "withdrawn"}]
    assert answer(replace(request_of_a_run, round=2), node).status == "ok"
    assert order == ["measured", "read", "read"]
    training = request_of_a_run.setup.training.model_copy(update={"micro_batch_size": 3})
    other = replace(request_of_a_run, round=3, setup=replace(request_of_a_run.setup, training=training))
    assert answer(other, node).status == "ok"
    assert order[3:] == ["measured", "read"]
    assert len(kept(node)) == 2


def test_an_isolated_plan_measures_nothing(request_of_a_run: Request, node: Path) -> None:
    """It needs no premise."""
    assert answer(with_plan(request_of_a_run, passes="isolated"), node).status == "ok"
    assert kept(node) == []


def coupled(patch: pytest.MonkeyPatch) -> None:
    """Makes gradients depend on the slot in their last bits."""
    real = ClosedForm.__call__

    def call(self: ClosedForm, losses: torch.Tensor, rows: int) -> torch.Tensor:
        return real(self, losses, rows) * (1 + 1e-6 * torch.arange(rows).unsqueeze(1))

    patch.setattr(ClosedForm, "__call__", call)


def test_a_machine_on_which_shapes_do_not_hold_runs_isolated(
    request_of_a_run: Request,
    node: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The round is answered, no shape is kept, and the log says what happened."""
    coupled(monkeypatch)
    assert answer(request_of_a_run, node).status == "ok"
    assert kept(node) == [{"shapes": {}, "withdrawn": False}]
    assert "each unit has its own pass" in caplog.text


def test_a_pass_that_does_not_repeat_withdraws_the_shapes_for_good(
    request_of_a_run: Request, node: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The round is computed again under its charge; no later process of this node shares passes."""
    assert answer(request_of_a_run, node).status == "ok"
    (before,) = kept(node)
    if not before["shapes"]:
        pytest.skip("shapes do not hold on this machine")
    with pytest.MonkeyPatch.context() as patch:
        coupled(patch)
        # Both steps of a round may be empty or hold no shared pass; then nothing is repeated.
        for number in range(2, 30):
            charges = (node / "ledger.jsonl").read_bytes().count(b'"reserve"')
            assert answer(replace(request_of_a_run, round=number), node).status == "ok"
            assert (node / "ledger.jsonl").read_bytes().count(b'"reserve"') == charges + 1
            if kept(node) != [before]:
                break
    assert kept(node) == [{"shapes": {}, "withdrawn": True}]
    assert "delete bit-proof-*.json" in caplog.text
    caplog.clear()
    assert answer(replace(request_of_a_run, round=40), node).status == "ok"
    assert kept(node) == [{"shapes": {}, "withdrawn": True}]
    assert "changed with its slot" not in caplog.text
