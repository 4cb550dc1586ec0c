"""Tests of one round at the server: the norm bound, the spool of a first round, SCAFFOLD's share."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from fedslm.aggregation.server import Aggregation, Round, ServerState
from fedslm.config import AggregationConfig, LoraConfig
from fedslm.errors import FederationError
from fedslm.records import AdapterState, ClientUpdate

A, B = "q.lora_A.weight", "q.lora_B.weight"


def state(seed: int, length: float | None = None) -> AdapterState:
    """A random difference, of a length."""
    generator = np.random.default_rng(seed)
    drawn = {A: generator.standard_normal((2, 5)), B: generator.standard_normal((4, 2))}
    factor = 1.0
    if length is not None:
        factor = length / float(np.sqrt(sum(np.square(each).sum() for each in drawn.values())))
    return AdapterState({key: (factor * each).astype(np.float32) for key, each in drawn.items()})


def after(
    deltas: list[AdapterState],
    before: ServerState,
    directory: Path,
    *,
    fixed: bool = False,
    cohort: int | None = None,
    **config: object,
) -> ServerState:
    """The state after a round of these updates."""
    values = {"method": "fedit", **config}
    how = Aggregation(
        AggregationConfig.model_validate(values),
        LoraConfig(rank=2),
        10,
        fixed_denominator=fixed,
        fresh=before.moving,
    )
    asked = list(range(cohort or len(deltas)))
    with closing(Round(how, before, asked, directory / "updates")) as aggregate:
        for client, delta in enumerate(deltas):
            aggregate.add(ClientUpdate(client, delta, 1.0))
        return aggregate.finish()


def test_one_client_moves_the_adapter_by_its_difference(tmp_path: Path) -> None:
    """N = 1 is the identity, and nothing stays on disk."""
    start, delta = state(0), state(1)
    found = after([delta], ServerState(start), tmp_path)
    for key in start:
        np.testing.assert_allclose(found.moving[key], start[key] + delta[key], rtol=1e-6)
    assert found.turn == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("norms", [{}, {"all": 1.0}], ids=["first round", "later round"])
def test_a_long_update_is_scaled_down(tmp_path: Path, norms: dict[str, float]) -> None:
    """In a first round (from disk) and in a later one (streamed) alike: to three median lengths."""
    start = state(0)
    deltas = [*(state(seed, 1.0) for seed in range(1, 5)), state(9, 500.0)]
    found = after(deltas, ServerState(start, norms=norms), tmp_path)
    bounded = [*deltas[:4], state(9, 3.0)]
    for key in start:
        expected = start[key] + np.mean([each[key] for each in bounded], axis=0)
        np.testing.assert_allclose(found.moving[key], expected, rtol=1e-4, atol=1e-5)
    assert found.norms["all"] == pytest.approx(1.0, rel=1e-5)


def test_streaming_and_spooled_rounds_agree(tmp_path: Path) -> None:
    """With the same reference the sum is the same, bit for bit, whether updates waited or not."""
    deltas = [state(seed, 1.0) for seed in range(1, 6)]
    first = after(deltas, ServerState(state(0)), tmp_path)
    later = after(deltas, ServerState(state(0), norms=dict(first.norms)), tmp_path)
    assert first.moving.sha256() == later.moving.sha256()


@pytest.mark.parametrize("norms", [{}, {"all": 1.0}], ids=["first round", "later round"])
def test_a_missing_client_does_not_move_the_others(tmp_path: Path, norms: dict[str, float]) -> None:
    """Under privacy the denominator is the cohort: two of four updates move half as far."""
    deltas = [state(1, 1.0), state(2, 1.0)]
    start = state(0)
    found = after(deltas, ServerState(start, norms=norms), tmp_path, fixed=True, cohort=4)
    for key in start:
        expected = start[key] + (deltas[0][key] + deltas[1][key]) / 4
        np.testing.assert_allclose(found.moving[key], expected, rtol=1e-5, atol=1e-6)


def test_control_variates_move_by_their_share_of_the_population(tmp_path: Path) -> None:
    """SCAFFOLD: c moves by |S| / N times the mean of what option II moves the clients' by."""
    start, control = state(0), state(1)
    how = Aggregation(
        AggregationConfig(method="fedit"),
        LoraConfig(rank=2),
        10,
        fixed_denominator=False,
        fresh=start,
        local_reach=0.5,
    )
    before = ServerState(start, control=control)
    with closing(Round(how, before, [0, 1], tmp_path)) as aggregate:
        for client in (0, 1):
            aggregate.add(ClientUpdate(client, state(5 + client), 1.0))
        found = aggregate.finish().control
    for key in control:
        own = [-control[key] - state(seed)[key] / 0.5 for seed in (5, 6)]
        expected = control[key] + 2 / 10 * (own[0] + own[1]) / 2
        np.testing.assert_allclose(found[key], expected, rtol=1e-5, atol=1e-6)


def test_too_few_updates_for_a_rule_are_an_error(tmp_path: Path) -> None:
    """The round then moves nothing, and leaves nothing on disk."""
    with pytest.raises(FederationError, match="needs 5"):
        after(
            [state(1), state(2)],
            ServerState(state(0)),
            tmp_path,
            method="ffa",
            rule="median",
            num_byzantine=2,
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["fedex", "hetlora"])
def test_a_factor_that_changes_no_weights_is_bounded_too(tmp_path: Path, method: str) -> None:
    """A huge A beside B = 0 is no drift of the weights; where A itself is averaged it is held all the same."""
    start = AdapterState({A: state(0)[A], B: np.zeros((4, 2), np.float32)})
    honest = [state(seed, 1.0) for seed in range(1, 6)]
    hostile = AdapterState({A: np.full((2, 5), 9999, np.float32), B: np.zeros((4, 2), np.float32)})
    found = after([*honest, hostile], ServerState(start), tmp_path, method=method)
    moved = np.linalg.norm(found.moving[A] - start[A])
    assert moved <= 3.0 + 1e-3


def test_a_giant_does_not_take_all_of_hetloras_weight(tmp_path: Path) -> None:
    """One client's product may count for three median ones: the honest still move the adapter."""
    start = state(0, 1.0)
    honest = [state(seed, 1.0) for seed in range(1, 6)]
    giant = AdapterState({key: np.full_like(start[key], 9999) for key in start})
    found = after([*honest, giant], ServerState(start), tmp_path, method="hetlora")
    assert np.linalg.norm(found.moving[B] - start[B]) > 0.05
    assert found.moving.norm() < 5.0


@pytest.mark.parametrize(("rule", "cohort"), [("median", 3), ("krum", 5), ("bulyan", 7)])
def test_one_silent_client_does_not_stop_a_rule(tmp_path: Path, rule: str, cohort: int) -> None:
    """With the fewest clients that a rule takes, the one that may be hostile cannot stop it by keeping still."""
    deltas = [state(1, 1.0)] * (cohort - 1)
    before = ServerState(state(0))
    found = after(deltas, before, tmp_path, method="ffa", rule=rule, num_byzantine=1, cohort=cohort)
    for key in deltas[0]:
        expected = before.moving[key] + (deltas[0][key] if "lora_A" not in key else 0)
        np.testing.assert_allclose(found.moving[key], expected, rtol=1e-5, atol=1e-6)


def test_control_variates_follow_the_rule(tmp_path: Path) -> None:
    """SCAFFOLD under a robust rule: a hostile client moves the control variate no more than the adapter."""
    start = AdapterState({B: state(0)[B]})
    control = AdapterState({B: np.zeros((4, 2), np.float32)})
    deltas = [AdapterState({B: state(1)[B]})] * 4 + [
        AdapterState({B: np.full((4, 2), 9e3, np.float32)})
    ]
    before = ServerState(start, control=control)
    found = after(deltas, before, tmp_path, method="ffa", rule="median", num_byzantine=1)
    np.testing.assert_allclose(found.control[B], -5 / 10 * state(1)[B], rtol=1e-5)
