"""The trial that `fedslm model info` times: what it builds, how it counts, and what it advises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import task_of
from support.tiny import CONFIGS, family_config

from fedslm.config import LoraConfig, ModelConfig, TaskConfig
from fedslm.errors import TrainingError
from fedslm.models import footprint
from fedslm.models.loaded import LoadedModel
from fedslm.training import probe
from fedslm.training.probe import Speed, Trial, Variant, extrapolated, fastest, measure

TASKS = {
    **dict.fromkeys(("bert", "distilbert", "modernbert", "roberta"), "classification"),
    "xlm-roberta": "token-classification",
    "t5": "seq2seq",
}
LAYERS = 9


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two turns are enough where the time itself is not looked at."""
    monkeypatch.setattr(probe, "_MOST_TURNS", 2)


def trial_of(directory: Path, family: str, layers: int = LAYERS, **changes: Any) -> Trial:
    """A trial of a deep and narrow base, of which there is no more than the config."""
    config = family_config(family)
    config.num_hidden_layers = layers
    values = config.to_dict()
    for key, value in values.items():
        if isinstance(value, list) and len(value) == 2:  # what is said of each layer
            values[key] = (value * layers)[:layers]
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(values))
    name = TASKS.get(family, "causal-lm")
    task = TaskConfig(name=name, max_length=24)  # type: ignore[arg-type]
    options = {"lora": LoraConfig(rank=2), "records": 2, **changes}
    model = ModelConfig(base=str(directory), device="cpu", **options.pop("model", {}))
    return Trial(directory, model, task=task, learning=task_of(name), **options)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[LoadedModel]:
    """The models that a measurement makes."""
    made: list[LoadedModel] = []
    build = probe._built

    def seen(*arguments: Any) -> LoadedModel:
        made.append(build(*arguments))
        return made[-1]

    monkeypatch.setattr(probe, "_built", seen)
    return made


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_is_timed(family: str, tmp_path: Path, built: list[LoadedModel]) -> None:
    """One and six of nine layers of each proved architecture, in both precisions, from its config."""
    speed = measure(trial_of(tmp_path, family))
    assert [each.name for each in speed.seconds] == ["float32", "bfloat16"]
    assert all(seconds > 0 for seconds in speed.seconds.values())
    assert (speed.records, speed.tokens) == (2, 24)
    depths = [model.adapter.network.config.num_hidden_layers for model in built]  # type: ignore[union-attr]
    assert depths == [1, 6, 1, 6]
    sizes = [len(model.adapter.parameters) for model in built]
    assert sizes[0] < sizes[1]
    halves = [model.dtype for model in built]
    assert halves == [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]
    gradients = [p.grad for model in built for p in model.adapter.parameters.values()]
    assert all(each is not None and each.dtype == torch.float32 for each in gradients)


@pytest.mark.parametrize(
    ("lora", "layers", "depths"),
    [
        (LoraConfig(rank=2), 6, [6, 6]),
        (LoraConfig(rank=2), 7, [1, 6, 1, 6]),
        (LoraConfig(rank=2, target_modules=("8.mlp.up_proj",)), 9, [9, 9]),
        (LoraConfig(rank=2, target_modules=("up_proj",)), 9, [1, 6, 1, 6]),
    ],
)
def test_how_deep_it_is(
    lora: LoraConfig, layers: int, depths: list[int], tmp_path: Path, built: list[LoadedModel]
) -> None:
    """A shallow base is timed whole, as is one whose targets name a layer by its number."""
    measure(trial_of(tmp_path, "llama", layers, lora=lora))
    assert [model.adapter.network.config.num_hidden_layers for model in built] == depths  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantised_base_is_compared_with_a_whole_one(kind: str, tmp_path: Path) -> None:
    """Float32 without quantization, and the configured one in both precisions."""
    speed = measure(trial_of(tmp_path, "llama", model={"quantization": kind}))
    names = [each.name for each in speed.seconds]
    assert names == ["float32", f"{kind} in float32", f"{kind} in bfloat16"]
    pair = [speed.seconds[each] for each in list(speed.seconds)[1:]]
    assert speed.gain == pair[0] / pair[1]


def test_checkpointing_is_timed_too(tmp_path: Path, built: list[LoadedModel]) -> None:
    """The layers forget their activations, as in training."""
    measure(trial_of(tmp_path, "llama", model={"gradient_checkpointing": True}))
    for model in built:
        layer = model.adapter.network.get_submodule("base_model.model.model.layers.0")
        assert layer.gradient_checkpointing
        assert layer.training


def test_nothing_else_changes(tmp_path: Path) -> None:
    """Threads and random numbers are afterwards what they were."""
    torch.manual_seed(1)
    before = torch.get_rng_state()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    measure(trial_of(tmp_path, "bert"))
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_base_that_is_too_large_is_not_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built: list[LoadedModel]
) -> None:
    """A trial that would take more than a quarter of the memory ends before it begins."""
    monkeypatch.setattr(footprint, "machine", lambda model: ("cpu", 1000))
    with pytest.raises(TrainingError, match="GB of memory"):
        measure(trial_of(tmp_path, "llama"))
    assert built == []


@pytest.mark.parametrize(("work", "expected"), [(1e12, (2, 24)), (0.0, (1, 24)), (1.0, (1, 24))])
def test_a_large_base_gets_fewer_records(
    work: float, expected: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First records are left out, then tokens beyond the thirty-second."""
    monkeypatch.setattr(probe, "_WORK", work)
    monkeypatch.setattr(probe, "_EMULATED", work)
    speed = measure(trial_of(tmp_path, "bert"))
    assert (speed.records, speed.tokens) == expected


class Machine:
    """A clock that only the work moves, and the order of the work."""

    def __init__(self, seconds: dict[str, list[float]]) -> None:
        self.seconds, self.now, self.order = seconds, 100.0, [""]

    def work(self, model: Any) -> None:
        """Takes as long as it is told to; the last time again and again."""
        times = self.seconds[model]
        self.now += times.pop(0) if len(times) > 1 else times[0]
        self.order.append(model)


def test_the_fastest_turn_counts_but_not_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models take turns; the first turn compiles, and a disturbed one is no measure."""
    monkeypatch.setattr(probe, "_MOST_TURNS", 4)
    machine = Machine({"a": [0.01, 0.3, 0.2, 0.25], "b": [0.01, 0.1, 0.5, 0.1]})
    found = fastest({"a": "a", "b": "b"}, machine.work, lambda: machine.now)  # type: ignore[dict-item]
    assert machine.order[1:] == ["a", "b"] * 4
    assert found == pytest.approx({"a": 0.2, "b": 0.1})


@pytest.mark.parametrize(("seconds", "turns"), [(0.01, 12), (0.45, 5), (2.5, 2), (100.0, 2)])
def test_it_ends_after_about_two_seconds(
    seconds: float, turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve turns at most, and two at least, since the first is no measure."""
    monkeypatch.setattr(probe, "_MOST_TURNS", 12)
    machine = Machine({"a": [seconds]})
    found = fastest({"a": "a"}, machine.work, lambda: machine.now)  # type: ignore[dict-item]
    assert len(machine.order) - 1 == turns
    assert found["a"] == pytest.approx(seconds)


def test_layers_cost_alike() -> None:
    """The time of all layers follows from two depths; noise never makes a deeper base faster."""
    assert extrapolated({1: 2.0 + 0.5, 6: 2.0 + 3.0}, 30) == pytest.approx(2.0 + 15.0)
    assert extrapolated({1: 3.0, 6: 2.9}, 30) == 2.9


@pytest.mark.parametrize(
    ("dtype", "gain", "said"),
    [
        ("float32", 0.5, ""),
        ("float32", 1.0, ""),
        ("float32", 1.5, 'model.dtype="bfloat16" saves time here'),
        ("bfloat16", 0.5, 'model.dtype="float32" saves time here'),
        ("bfloat16", 1.0, "saves memory here, but no time"),
        ("bfloat16", 1.5, ""),
    ],
)
def test_advice(dtype: str, gain: float, said: str) -> None:
    """Only a setting that is not the faster one is commented, and only if the difference matters."""
    speed = Speed({Variant("float32"): gain, Variant("bfloat16"): 1.0}, 1, 8, "none")
    assert speed.gain == gain
    found = speed.advice(dtype)
    assert said in found
    assert bool(found) is bool(said)
    assert speed.as_json(dtype)["advice"] == found


def test_what_cannot_be_timed_says_why(tmp_path: Path) -> None:
    """Whatever goes wrong in the trial is one error."""
    lora = LoraConfig(target_modules=("nothing",))
    with pytest.raises(TrainingError, match=r"no pass could be timed: .*no layer"):
        measure(trial_of(tmp_path, "llama", lora=lora))
