"""Closed-form per-record gradients against Opacus' hooks, and what they refuse or leave to them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from support.families import (
    examples_of,
    one_step,
    own_columns,
    ready,
    record_plan,
)
from torch import nn

from fedslm.errors import TrainingError
from fedslm.models.loaded import LoadedModel
from fedslm.tasks.base import Task
from fedslm.training import per_record
from fedslm.training.per_record import ClosedForm, per_record_gradients
from fedslm.training.shapes import Pass, Shapes
from fedslm.training.steps import PrivateStep, stepping

Family = tuple[LoadedModel, Task]


def gradients(family: Family, seed: int = 0) -> np.ndarray:
    """Per-record gradients of five records that share a pass."""
    model, task = family
    ready(model)
    parameters = list(model.adapter.parameters.values())
    with stepping(
        model, task, record_plan(passes="shared"), torch.optim.SGD(parameters, lr=1.0), 5
    ) as step:
        assert isinstance(step, PrivateStep)
        return own_columns(step, step.rows(Pass(tuple(examples_of(5, seed)), tuple(range(5)))))


def test_the_closed_form_gives_what_opacus_hooks_give(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two independent computations of the same gradients; neither leaves anything on the network."""
    closed = gradients(family)
    monkeypatch.setattr(per_record, "_owners", lambda *_: None)
    hooked = gradients(family)
    np.testing.assert_allclose(closed, hooked, atol=1e-5)
    assert np.linalg.norm(closed, axis=1).min() > 1e-3
    modules = list(family[0].adapter.network.modules())
    assert not any("forward" in module.__dict__ for module in modules)
    assert not any(hasattr(module, "activations") for module in modules if type(module) is nn.Linear)


def test_through_the_hooks_no_pass_is_shared(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their rows are not aligned, so public shapes are not used; the sum is the same."""
    model, task = family
    units = [[each] for each in examples_of(5)]
    expected = one_step(model, task, record_plan(), units).exact
    monkeypatch.setattr(per_record, "_owners", lambda *_: None)
    seen: list[Pass] = []
    real = PrivateStep.rows
    monkeypatch.setattr(PrivateStep, "rows", lambda self, each: seen.append(each) or real(self, each))
    shapes = Shapes({16: (4,), 24: (4,)})
    found = one_step(model, task, record_plan(), units, shapes=shapes).exact
    assert [(len(each.records), each.shape) for each in seen] == [(1, None)] * 5
    np.testing.assert_allclose(found, expected, atol=1e-5)


class Toy(nn.Module):
    """A network of one trained layer, which its forward pass calls some number of times."""

    def __init__(self, layer: nn.Module, calls: int = 1) -> None:
        super().__init__()
        self.layer, self.calls = layer, calls

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Losses of shape (rows,)."""
        for _ in range(self.calls):
            x = torch.tanh(self.layer(x))
        return x.flatten(1).square().sum(dim=1)


def reference(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Per-record gradients by plain autograd, one record at a time."""
    rows = []
    for row in x:
        network.zero_grad()
        network(row.unsqueeze(0)).sum().backward()
        rows.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
        network.zero_grad()
    return torch.stack(rows)


def columns(found: torch.Tensor, places: Sequence[slice]) -> torch.Tensor:
    """Without the columns between tensors."""
    return torch.cat([found[:, place] for place in places], dim=1)


@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize("shape", [(6, 5), (6, 4, 5), (6, 2, 3, 5)], ids=str)
def test_a_layer_with_bias_that_is_called_again_counts_each_time(
    shape: tuple[int, ...], calls: int
) -> None:
    """For inputs with any number of axes; a second pass over fewer rows keeps nothing of the first."""
    torch.manual_seed(0)
    network, x = Toy(nn.Linear(5, 5), calls), torch.randn(shape)
    with per_record_gradients(network, list(network.parameters())) as found:
        assert isinstance(found, ClosedForm)
        for rows in (6, 2, 6):
            own = columns(found(network(x[:rows]), rows), found.places).clone()
            assert all(parameter.grad is None for parameter in network.parameters())
    for rows in (6, 2):
        with per_record_gradients(network, list(network.parameters())) as found:
            own = columns(found(network(x[:rows]), rows), found.places).clone()
        torch.testing.assert_close(own, reference(network, x[:rows]), atol=1e-5, rtol=1e-4)


def test_a_layer_that_is_not_linear_goes_through_the_hooks() -> None:
    """A trained LayerNorm has no closed form here; Opacus knows it."""
    torch.manual_seed(0)
    network, x = Toy(nn.LayerNorm(5)), torch.randn(6, 4, 5)
    with per_record_gradients(network, list(network.parameters())) as found:
        assert not found.is_aligned
        own = columns(found(network(x), 6), found.places)
    torch.testing.assert_close(own, reference(network, x), atol=1e-5, rtol=1e-4)


def test_a_layer_that_is_not_called_is_refused() -> None:
    """What would be the gradient of an earlier pass is never read."""
    network = Toy(nn.Linear(5, 5))
    with per_record_gradients(network, list(network.parameters())) as found:
        found(network(torch.randn(3, 5)), 3)
        network.calls = 0
        with pytest.raises(TrainingError, match="their layer was not called"):
            found(network(torch.randn(3, 5, requires_grad=True)), 3)


def test_a_layer_that_mixes_records_is_refused() -> None:
    """Rows that are not the batch's are no records."""
    network = Toy(nn.Linear(5, 5))
    with (
        per_record_gradients(network, list(network.parameters())) as found,
        pytest.raises(TrainingError, match="it mixes records"),
    ):
        found(network(torch.randn(6, 5)), 3)
