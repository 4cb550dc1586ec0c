"""Which rounds are evaluated, and that nothing else depends on it; time is told by injected clocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import record
from support.served import StopAfter, changed, failing, records_of, run_with

from fedslm import simulation
from fedslm.config import Config, FederationConfig
from fedslm.federation import public_model, rounds
from fedslm.federation.evaluations import FREE_SECONDS, LARGEST_SHARE, Evaluations
from fedslm.federation.observers import Observer
from fedslm.records import AdapterState, RoundRecord

MakeConfig = Callable[..., Config]
AUTO = {"evaluate_every": "auto"}


def evaluated(
    every: Any, times: list[tuple[float, float]], moved: frozenset[int] | None = None
) -> list[RoundRecord]:
    """The rounds of a run, each with its seconds of training and of an evaluation, if it has one."""
    evaluations, lines = Evaluations(FederationConfig(rounds=len(times), evaluate_every=every), []), []
    for number, (training, evaluation) in enumerate(times, start=1):
        is_due = moved is None or number in moved
        took = evaluation if is_due and evaluations.is_due(number, training) else 0.0
        line = replace(record(number), seconds=training + took, evaluation_seconds=took)
        evaluations.count(line)
        lines.append(line)
    return lines


def rounds_of(lines: list[RoundRecord]) -> list[int]:
    """The rounds that were evaluated."""
    return [line.round for line in lines if line.evaluation_seconds]


@pytest.mark.parametrize(
    ("every", "found"),
    [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [3, 6, 7]), (7, [7]), (100, [7])],
)
def test_every_nth_round_and_the_last(every: int, found: list[int]) -> None:
    """Whatever an evaluation costs, a number is followed."""
    assert rounds_of(evaluated(every, [(0.1, 1000.0)] * 7)) == found


def test_cheap_evaluations_are_all_made() -> None:
    """A third of the training's time is a quarter of the run's."""
    assert len(rounds_of(evaluated("auto", [(3.0, 0.9)] * 100))) == 100


def test_few_seconds_are_free() -> None:
    """A short run is evaluated in every round, however short its training is."""
    assert len(rounds_of(evaluated("auto", [(0.01, 0.1)] * 50))) == 50


def test_a_dear_evaluation_has_the_first_round_and_the_last() -> None:
    """What never fits in a quarter is done where it is always done."""
    assert rounds_of(evaluated("auto", [(1.0, 500.0)] * 30)) == [1, 30]


def test_evaluations_as_dear_as_training_take_a_quarter() -> None:
    """They come about every third round."""
    lines = evaluated("auto", [(10.0, 10.0)] * 40)
    found = rounds_of(lines)
    assert (found[0], found[-1]) == (1, 40)
    assert {after - before for before, after in pairwise(found[1:-1])} == {3}
    spent = sum(line.evaluation_seconds for line in lines)
    assert 0.2 < spent / sum(line.seconds for line in lines) <= 0.3


@given(
    st.lists(st.tuples(st.floats(0.0, 100.0), st.floats(0.01, 100.0)), min_size=1, max_size=40),
    st.sampled_from([1.0, 0.1]),
)
def test_evaluations_stay_within_their_share(times: list[tuple[float, float]], factor: float) -> None:
    """Between the first and the last round only what was expected to fit in a quarter is evaluated."""
    lines = evaluated("auto", [(training, factor * cost) for training, cost in times])
    assert {1, len(times)} <= set(rounds_of(lines))
    expected = lines[0].evaluation_seconds
    for number in range(2, len(lines)):
        before, line = lines[: number - 1], lines[number - 1]
        spent = sum(each.evaluation_seconds for each in before) + expected
        total = sum(each.seconds for each in before) + line.seconds - line.evaluation_seconds + expected
        fits = spent <= max(LARGEST_SHARE * total, FREE_SECONDS)
        near = abs(spent - max(LARGEST_SHARE * total, FREE_SECONDS)) < 1e-6
        assert (line.evaluation_seconds > 0) == fits or near
        expected = line.evaluation_seconds or expected


def test_the_first_round_that_moves_is_evaluated() -> None:
    """A first round without enough replies has nothing to evaluate; the next one takes its place."""
    assert rounds_of(evaluated("auto", [(1.0, 500.0)] * 9, frozenset(range(3, 10)))) == [3, 9]


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_resumed_run_goes_on_alike(cut: int) -> None:
    """From the lines of rounds.jsonl the same rounds follow."""
    times = [(10.0, 8.0 + number % 3) for number in range(12)]
    whole = evaluated("auto", times)
    resumed = Evaluations(FederationConfig(rounds=12, evaluate_every="auto"), whole[:cut])
    for line, (training, _) in zip(whole[cut:], times[cut:], strict=True):
        assert resumed.is_due(line.round, training) == (line.evaluation_seconds > 0)
        resumed.count(line)


class Clock(Observer):
    """Stands for the time module: a client's answer takes a second, an evaluation six."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now, evaluate = 0.0, public_model.evaluate

        def slow(*arguments: Any) -> dict[str, float]:
            self.now += 6.0
            return evaluate(*arguments)

        patch.setattr(public_model, "evaluate", slow)
        patch.setattr(rounds, "time", self)

    def monotonic(self) -> float:
        """The time."""
        return self.now

    def on_client(self, round: int, done: int, cohort: int) -> None:
        """A second passes."""
        self.now += 1.0


def test_a_run_is_evaluated_as_time_allows_and_trains_alike(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three seconds of training, six of evaluation: in rounds 1, 12 and 13, with the same adapter."""
    usual = simulation.simulate(make_config(federation={"rounds": 13}))
    config = make_config(federation={"rounds": 13, **AUTO}, run={"directory": str(tmp_path / "auto")})
    report = simulation.simulate(config, [Clock(monkeypatch)])
    lines = records_of(config)
    assert [line["round"] for line in lines if line["metrics"]] == [1, 12, 13]
    assert [line["evaluation_seconds"] for line in lines] == [6.0] + [0.0] * 10 + [6.0] * 2
    assert [line["seconds"] for line in lines] == [9.0] + [3.0] * 10 + [9.0] * 2
    assert report["adapter_sha256"] == usual["adapter_sha256"]
    assert report["metrics_after"] == usual["metrics_after"]
    assert (report["evaluations"], report["seconds_in_evaluations"]) == (3, 18.0)
    page = (Path(report["directory"]) / "report.md").read_text()
    assert "\n- Time in rounds: 57.0 s; evaluation took 32 % of it (after 3 of 13 rounds)\n" in page


def test_a_stopped_run_is_evaluated_as_its_schedule_says(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between rounds and resumed, a run evaluates no other rounds."""
    config = make_config(federation={"rounds": 13, **AUTO})
    clock = Clock(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        simulation.simulate(config, [clock, StopAfter(4)])
    simulation.resume(Path(str(config.run.directory)), [clock], config)
    assert [line["round"] for line in records_of(config) if line["metrics"]] == [1, 12, 13]


def failing_from(first: int) -> Callable[[Message], Message]:
    """A client that answers as it should, until it raises in every round."""
    count = 0

    def answer(message: Message) -> Message:
        nonlocal count
        count += 1
        return failing(message) if count >= first else message

    return answer


@pytest.mark.parametrize("rounds", [9, 4], ids=["stopped early", "in the last round"])
def test_the_last_metrics_are_those_of_the_last_adapter(
    make_config: MakeConfig, tmp_path: Path, rounds: int
) -> None:
    """A round that moves nothing is not evaluated; the adapter that stays is, once, at the end."""
    config = make_config(federation={"rounds": rounds, "evaluate_every": 2})
    report = run_with(config, {client: failing_from(4) for client in range(3)})
    lines = records_of(config)
    assert [line["kept"] for line in lines] == [False] * 3 + [True] * (len(lines) - 3)
    assert [bool(line["metrics"]) for line in lines][:4] == [False, True, False, False]
    whole = make_config(federation={"rounds": 3}, run={"directory": str(tmp_path / "whole")})
    assert report["metrics_after"] == simulation.simulate(whole)["metrics_after"]
    assert report["metrics_after"] != lines[1]["metrics"]


def test_a_run_that_moved_nothing_keeps_its_first_metrics(make_config: MakeConfig) -> None:
    """There is nothing to evaluate at its end."""
    config = make_config(federation={"rounds": 2, **AUTO})
    wrong = changed(lambda state: AdapterState({key: state[key][:1] for key in state}))
    report = run_with(config, dict.fromkeys(range(3), wrong))
    assert report["metrics_after"] == report["metrics_before"]
    assert report["evaluations"] == 0
    page = (Path(report["directory"]) / "report.md").read_text()
    assert "evaluation took" not in page
