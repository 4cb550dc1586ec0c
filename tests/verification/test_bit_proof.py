"""The bit-proof: it holds on this machine or says so, and finds every way in which rows can be coupled."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.families import (
    examples_of,
    last_layer,
    load_family,
    one_step,
    ready,
    record_plan,
    task_of,
    user_plan,
)

from fedslm.errors import NotRepeated
from fedslm.models.loaded import LoadedModel
from fedslm.privacy.plan import PrivatePlan
from fedslm.records import AdapterState
from fedslm.tasks.base import Example, Task, Tensors
from fedslm.training import local
from fedslm.training.local import LocalWork, train
from fedslm.training.per_record import ClosedForm
from fedslm.training.shapes import Pass, Shape, Shapes
from fedslm.training.steps import PrivateStep, stepping
from fedslm.verification import bit_proof
from fedslm.verification.bit_proof import TRIALS, _Trial, _wild_row, proved_shapes

Family = tuple[LoadedModel, Task]
CASES = [
    ("bert", "classification", "mean", "all layers"),
    ("bert", "classification", "mean", "last layer"),  # those below are cached
    ("llama", "causal-lm", "native", "all layers"),
    ("t5", "seq2seq", "native", "all layers"),
]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case), scope="module")
def family(request: pytest.FixtureRequest, family_directory: Callable[[str, str], Path]) -> Family:
    """A loaded model and its task."""
    architecture, task, pooling, where = request.param
    directory = family_directory(architecture, task)
    targets = last_layer(directory, task, pooling) if where == "last layer" else ("all-linear",)
    model = load_family(directory, task, pooling, targets=targets)
    assert (model.cached_layers is None) == (where == "all layers")
    return model, task_of(task)


def proof(model: LoadedModel, task: Task, longest: int = 20) -> Shapes:
    """The shapes that hold for all tensors of an adapter."""
    return proved_shapes(model, task, frozenset(model.adapter.parameters), longest, 4)


def test_what_was_proved_holds_for_new_records(family: Family) -> None:
    """Records that the proof never saw have the same bits alone and beside others, at a proved shape."""
    model, task = family
    shapes = proof(model, task)
    start, parameters = ready(model), list(model.adapter.parameters.values())
    name = {"CausalLM": "causal-lm", "Seq2Seq": "seq2seq"}.get(type(task).__name__, "classification")
    records = [each for each in examples_of(30, seed=11, name=name) if each.length < 16][:4]
    with stepping(model, task, record_plan(), torch.optim.SGD(parameters, lr=1.0), 4) as step:
        assert isinstance(step, PrivateStep)
        for slots in shapes.proved.get(16, ()):
            some = tuple(records[:slots])
            shape = Shape(slots, 16)
            together = step.rows(Pass(some, tuple(range(slots)), shape)).clone()
            for row, record in enumerate(some):
                assert torch.equal(step.rows(Pass((record,), (0,), shape))[0], together[row])
    assert start.is_finite()


def test_no_shape_is_longer_than_the_model_reads(
    family_directory: Callable[[str, str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    """The model has 128 positions; a record that fills them all has a pass of its own."""
    model = load_family(family_directory("bert", "classification"), "classification", "mean")
    shapes = proof(model, task_of("classification"), longest=128)
    assert set(shapes.proved) <= {24, 48, 68, 84, 100, 128}
    assert shapes.of(128) is None
    assert "cannot share a pass: made-up records have no gradient" not in caplog.text


def test_the_wild_row_of_the_proof_is_wild(family: Family) -> None:
    """Also where the layers below are cached: its own gradient counts as zero, what is kept of it stays."""
    model, task = family
    parameters = list(model.adapter.parameters.values())
    records = task.made_up(12), task.made_up(9)
    each = Pass(records, (0, 1), Shape(2, 16))
    ready(model)
    with stepping(model, task, record_plan(), torch.optim.SGD(parameters, lr=1.0), 4) as step:
        assert isinstance(step, PrivateStep)
        calm = step.rows(each).clone()
        with _wild_row(model, 1, float("inf"), 1):
            wild = step.rows(each).clone()
        after = step.rows(each).clone()
    torch.testing.assert_close(wild[0], calm[0], atol=1e-5, rtol=0)
    assert calm[1].any()
    assert not wild[1].any()
    torch.testing.assert_close(after, calm, atol=1e-5, rtol=0)


def test_a_step_of_fixed_shapes_is_a_step(family: Family) -> None:
    """Its sum is that of isolated passes, up to the rounding of another padding."""
    model, task = family
    shapes = proof(model, task)
    name = {"CausalLM": "causal-lm", "Seq2Seq": "seq2seq"}.get(type(task).__name__, "classification")
    records = examples_of(9, seed=4, name=name)
    for plan, units in (
        (record_plan(), [[each] for each in records]),
        (user_plan(), [records[:4], records[4:]]),
    ):
        alone = one_step(model, task, replace(plan, passes="isolated"), units).exact
        together = one_step(model, task, plan, units, shapes=shapes).exact
        np.testing.assert_allclose(together, alone, atol=2e-5)
        backwards = [unit[::-1] for unit in units[::-1]]
        again = one_step(model, task, plan, backwards, shapes=shapes).exact
        np.testing.assert_array_equal(again, together)  # to the last bit, whatever the order


def coupled_by_loss(patch: pytest.MonkeyPatch, task: Task) -> None:
    """A loss that depends slightly on the batch."""
    real = type(task).per_example_loss

    def loss(self: Task, logits: torch.Tensor, batch: Tensors) -> torch.Tensor:
        found = real(self, logits, batch)
        return found * (1 + 1e-4 * torch.nan_to_num(found).clamp(-50, 50).mean().detach())

    patch.setattr(type(task), "per_example_loss", loss)


def coupled_by_slot(patch: pytest.MonkeyPatch, task: Task) -> None:
    """Gradients that depend on the slot in the last bits only."""
    real = ClosedForm.__call__

    def call(self: ClosedForm, losses: torch.Tensor, rows: int) -> torch.Tensor:
        found = real(self, losses, rows)
        return found * (1 + 1e-6 * torch.arange(rows).unsqueeze(1))

    patch.setattr(ClosedForm, "__call__", call)


@pytest.fixture(params=[coupled_by_loss, coupled_by_slot], ids=lambda each: each.__name__)
def coupled(
    request: pytest.FixtureRequest, family: Family, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Family]:
    """A model and a task whose rows are slightly coupled."""
    request.param(monkeypatch, family[1])
    return family


def test_a_coupling_of_the_last_bits_is_found(
    coupled: Family, caplog: pytest.LogCaptureFixture
) -> None:
    """No shape is proved, and the log says why."""
    assert proof(*coupled).proved == {}
    assert "other bits in another slot or with other records" in caplog.text


def test_a_slot_that_differs_in_some_passes_is_found(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, the middle one of three slots has other bits in one pass of three."""
    real, passes = ClosedForm.__call__, itertools.count()

    def call(self: ClosedForm, losses: torch.Tensor, rows: int) -> torch.Tensor:
        found, records = real(self, losses, rows), rows // family[1].rows_per_example
        if records == 3 and next(passes) % 3 == 0:
            found[rows // 2] *= 1 + 1e-6
        return found

    monkeypatch.setattr(ClosedForm, "__call__", call)
    monkeypatch.setattr(bit_proof, "_may_split_rows", lambda model: True)
    proved = proof(*family).proved
    assert not any(3 in counts for counts in proved.values())


def test_with_several_threads_no_pass_is_shared(family: Family) -> None:
    """Where two threads meet within a row, its bits may depend on its slot."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert proof(*family).proved == {}
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("length", [16, 24])
def test_as_many_records_are_compared_as_is_said(
    family: Family, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Empty slots and the wild row are not counted; nor is an adapter under which all overflow."""
    scales: list[float] = []
    compared: list[int] = []
    real, scaled = _Trial._compared, _Trial._scale

    def to_scale(self: _Trial, scale: float) -> None:
        scales.append(scale)
        scaled(self, scale)

    def counted(self: _Trial, reference: Mapping[Example, bytes], *shape: int) -> int | None:
        found = real(self, reference, *shape)
        compared.append(found or 0 if scales[-1] < 1e8 else 0)
        return found

    monkeypatch.setattr(_Trial, "_scale", to_scale)
    monkeypatch.setattr(_Trial, "_compared", counted)
    model, task = family
    ready(model)
    parameters = list(model.adapter.parameters.values())
    with stepping(model, task, record_plan(), torch.optim.SGD(parameters, lr=1.0), 4) as step:
        assert isinstance(step, PrivateStep)
        counts = _Trial(model, task, step).counts_that_agree(length, (17,))
    assert not counts or sum(compared) >= TRIALS


@pytest.mark.parametrize("plan", [record_plan(steps=2), user_plan(steps=2)], ids=["record", "user"])
def test_a_round_whose_pass_does_not_repeat_is_computed_again_isolated(
    coupled: Family,
    plan: PrivatePlan,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Shapes that were proved before the coupling began: nothing of the first attempt is released."""
    model, task = coupled
    shapes = Shapes({16: (1, 4), 32: (1, 4)})
    attempts: list[AdapterState | None] = []
    real = local._trained

    def counted(*arguments: object) -> AdapterState:
        attempts.append(None)
        attempts[-1] = real(*arguments)  # type: ignore[arg-type]
        return attempts[-1]

    monkeypatch.setattr(local, "_trained", counted)
    start = ready(model)
    work = LocalWork(start, frozenset(start), 0, 1, 0, shapes=shapes)
    name = {"CausalLM": "causal-lm", "Seq2Seq": "seq2seq"}.get(type(task).__name__, "classification")
    examples = [replace(each, owner=str(n // 2)) for n, each in enumerate(examples_of(12, name=name))]
    sampled = replace(plan, sample_rate=1.0)
    released = train(model, task, examples, sampled, local_training(), work)
    assert attempts[0] is None
    assert attempts[1:] == [released]
    assert shapes.withdrawn
    assert "each unit has its own pass from now on" in caplog.text


def local_training():
    """SGD."""
    from fedslm.config import TrainingConfig

    return TrainingConfig(optimizer="sgd", learning_rate=0.1)


def test_a_sound_pass_repeats_in_every_round(family: Family) -> None:
    """No proved shape raises in ten rounds, of which each repeats a pass."""
    model, task = family
    shapes = proof(model, task)
    name = {"CausalLM": "causal-lm", "Seq2Seq": "seq2seq"}.get(type(task).__name__, "classification")
    records = [[each] for each in examples_of(6, seed=8, name=name)]
    for _ in range(10):
        try:
            one_step(model, task, record_plan(), records, shapes=shapes)
        except NotRepeated as error:  # pragma: no cover
            pytest.fail(str(error))


def test_the_repeated_pass_is_a_small_one(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has two slots, the least that records share, and is compared with whatever pass was chosen."""
    model, task = family
    name = {"CausalLM": "causal-lm", "Seq2Seq": "seq2seq"}.get(type(task).__name__, "classification")
    records = [each for each in examples_of(30, seed=11, name=name) if each.length < 16][:4]
    passes: list[Shape | None] = []
    real = PrivateStep.rows

    def noted(self: PrivateStep, each: Pass) -> torch.Tensor:
        passes.append(each.shape)
        return real(self, each)

    monkeypatch.setattr(PrivateStep, "rows", noted)
    shapes = Shapes({16: (1, 2, 4)})
    with suppress(NotRepeated):  # nothing was proved here
        one_step(model, task, record_plan(), [[each] for each in records], shapes=shapes)
    assert passes == [Shape(4, 16), Shape(2, 16)]
