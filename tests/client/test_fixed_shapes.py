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
from fedslm.errors import RunError, TrainingError
from fedslm.protocol.messages import Reply, Request
from fedslm.training import local
from fedslm.training.per_record import ClosedForm
from fedslm.verification import bit_proof


@pytest.fixture(scope="module")
def request_of_a_run(
    config_in: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory
) -> Request:
    """A server's first request, under a plan that samples every record."""
    request = first_request(config_in(tmp_path_factory.mktemp("server") / "run", privacy=PRIVATE))
    return with_plan(request, sample_rate=0.2, noise_multiplier=5.0, steps_per_round=2, rounds=45)


@pytest.fixture(autouse=True)
def forgetful() -> Iterator[None]:
    """Nothing that one process knows is known to the next test."""
    forget()
    yield
    forget()


def forget() -> None:
    """Begins a new process, as far as shapes are concerned."""
    fixed_shapes._measured.cache_clear()
    fixed_shapes._measure.cache_clear()


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """A node's directory, with the usual policy."""
    return write_policy(tmp_path / "node")


def kept(node: Path) -> list[dict[str, Any]]:
    """What the node keeps about shapes."""
    files = sorted((node / "attestations").glob("bit-proof-*.json"))
    return [json.loads(path.read_text())["values"] for path in files]


def is_withdrawn(node: Path) -> bool:
    """Whether the node keeps that a pass did not repeat."""
    return bool(list((node / "attestations").glob("shapes-withdrawn-*.json")))


def answer(request: Request, node: Path) -> Reply:
    """The reply of a node whose process has just started."""
    forget()
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
    assert [set(each) for each in kept(node)] == [{"shapes"}]
    assert answer(replace(request_of_a_run, round=2), node).status == "ok"
    assert order == ["measured", "read", "read"]
    assert answer(of_passes(request_of_a_run, 3, round=3), node).status == "ok"
    assert order[3:] == ["measured", "read"]
    assert len(kept(node)) == 2


def of_passes(request: Request, records: int, round: int) -> Request:
    """The request of a later round with another number of records in a pass."""
    training = request.setup.training.model_copy(update={"micro_batch_size": records})
    return replace(request, round=round, setup=replace(request.setup, training=training))


def test_what_the_bits_depend_on_is_in_the_key(request_of_a_run: Request) -> None:
    """Another number of classes makes another head, and another turn may train other tensors."""
    setup = request_of_a_run.setup
    more = replace(setup, labels=(*setup.labels, "one more class"))
    rolora = replace(setup, aggregation=setup.aggregation.model_copy(update={"method": "rolora"}))
    asked = [(setup, 1, "here"), (more, 1, "here"), (rolora, 2, "here"), (setup, 1, "elsewhere")]
    keys = [fixed_shapes._key(*each) for each in asked]
    assert len({json.dumps(key) for key in keys}) == len(keys)


def test_other_threads_are_measured_again_in_the_same_process(
    request_of_a_run: Request, node: Path
) -> None:
    """What one thread computes says nothing about two."""
    threads = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            same_process = replace(request_of_a_run, round=number)
            assert ask(same_process, context_of(0, node)).status == "ok"
            assert len(kept(node)) == number
    finally:
        torch.set_num_threads(threads)


def test_a_request_that_cannot_be_charged_measures_nothing(
    request_of_a_run: Request, node: Path
) -> None:
    """Measuring takes minutes of a node's processor, and the server chooses what is measured."""
    write_policy(node, max_epsilon_per_run=1e-6)
    assert answer(request_of_a_run, node).status == "refused"
    assert kept(node) == []


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
    assert kept(node) == [{"shapes": {}}]
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
            if is_withdrawn(node):
                break
    assert is_withdrawn(node)
    assert "delete shapes-withdrawn-*.json" in caplog.text
    caplog.clear()
    assert answer(replace(request_of_a_run, round=40), node).status == "ok"
    assert "a pass did not repeat here: each unit has its own pass" in caplog.text
    # Nor does another setting, which a server chooses, bring shared passes back.
    assert answer(of_passes(request_of_a_run, 3, round=41), node).status == "ok"
    assert kept(node) == [before]


def test_a_withdrawal_is_kept_before_the_round_is_computed_again(
    request_of_a_run: Request, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second attempt may fail, or be stopped at a time limit that a server chose."""
    assert answer(request_of_a_run, node).status == "ok"
    if not kept(node)[0]["shapes"]:
        pytest.skip("shapes do not hold on this machine")
    coupled(monkeypatch)
    real, seen = local._trained, []

    def trained(*arguments: Any) -> Any:
        if arguments[-1].shapes is not None and arguments[-1].shapes.withdrawn:
            seen.append(is_withdrawn(node))
            raise TrainingError("stopped")
        return real(*arguments)

    monkeypatch.setattr(local, "_trained", trained)
    for number in range(2, 30):
        if answer(replace(request_of_a_run, round=number), node).status == "failed":
            break
    assert seen == [True]


def test_a_withdrawal_that_cannot_be_kept_holds_for_the_process(
    request_of_a_run: Request, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever setup is asked for next."""

    def fails(*_: Any) -> None:
        raise RunError("the disk is full")

    monkeypatch.setattr(fixed_shapes, "_withdrawn_here", set())
    monkeypatch.setattr(fixed_shapes, "keep", fails)
    fixed_shapes._withdraw((node / "attestations",))
    assert answer(request_of_a_run, node).status == "ok"
    assert kept(node) == []
