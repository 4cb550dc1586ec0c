"""A client's own records: streamed or not, held out or trained on."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from support.served import first_request
from support.tiny import PATIENT, PRIVATE, make_rows, write_rows

from fedslm.client.node import Node
from fedslm.client.private import _metric
from fedslm.client.records import ClientRecords, records_of
from fedslm.client.round import ClientRound
from fedslm.client.update import make_update
from fedslm.config import Config
from fedslm.data import store
from fedslm.data.holdout import is_held_out, record_name
from fedslm.data.store import read_client
from fedslm.privacy.gaussian import GaussianNoise
from fedslm.privacy.plan import PrivatePlan
from fedslm.protocol.messages import Request
from fedslm.tasks.lazy import LazyExamples, owners_of

MakeConfig = Callable[..., Config]
METRIC = {"metric_noise_multiplier": 5.0}
ROWS = make_rows(90, 0)


@pytest.fixture
def ask_of(config_in: MakeConfig, tmp_path: Path) -> Callable[..., Request]:
    """The first request of a run on some rows, whose shards are on disk."""

    def make(name: str, rows: list[dict[str, Any]] = ROWS, **sections: dict[str, Any]) -> Request:
        source = tmp_path / f"{name}-source"
        source.mkdir()
        write_rows(source / "train.jsonl", rows)
        write_rows(source / "test.jsonl", make_rows(12, 1))
        data = {"source": str(source), **sections.pop("data", {})}
        return first_request(config_in(tmp_path / name, data=data, **sections))

    return make


def node_of(request: Request, index: int = 0, name: str = "one") -> Node:
    """A simulated node; nodes of one name share their secret keys."""
    run = Path(request.setup.directory)
    return Node(run.parent / f"node-{name}", run / "data", index, deployed=False)


def shard(request: Request, index: int = 0) -> ClientRecords:
    """What a node reads."""
    return records_of(request.setup, node_of(request, index))


def texts(request: Request, index: int) -> dict[str, str]:
    """Owner, and text, of each row of a client."""
    rows = read_client(Path(request.setup.directory) / "data", index)
    return {row["text"]: row["patient"] for row in rows}


@pytest.mark.parametrize("privacy", [{"unit": "none"}, PRIVATE, PATIENT], ids=lambda p: p["unit"])
@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_streamed_examples_are_the_same(
    ask_of: Callable[..., Request], privacy: dict[str, Any], fraction: float
) -> None:
    """Streaming gives the same examples, owners and order, and the same commitment; just lazily."""
    sections = {"privacy": {**privacy, **METRIC}}
    data = {"validation_fraction": fraction}
    plain = shard(ask_of("plain", data=data, **sections), 1)
    streamed = shard(ask_of("streamed", data={**data, "streaming": True}, **sections), 1)
    for lazy, kept in ((streamed.trained, plain.trained), (streamed.measured, plain.measured)):
        assert isinstance(lazy, LazyExamples)
        assert list(lazy) == list(kept)
        assert lazy[2:0:-1] == list(kept)[2:0:-1]
        assert list(owners_of(lazy)) == list(owners_of(kept)) == [each.owner for each in kept]
    assert (plain.commitment, bool(plain.commitment)) == (
        streamed.commitment,
        privacy["unit"] != "none",
    )


def test_streamed_training_is_the_same(ask_of: Callable[..., Request]) -> None:
    """Without noise a streamed round gives the same adapter, bit for bit."""
    adapters = []
    for name, streaming in (("plain", False), ("streamed", True)):
        request = ask_of(name, data={"streaming": streaming})
        adapters.append(trained(request))
    assert adapters[0] == adapters[1]


def trained(request: Request) -> str:
    """Hash of the adapter that a client makes without noise."""
    own = ClientRound(request, node_of(request))
    return make_update(own, own.records(has_begun=False).trained).delta.sha256()


@pytest.mark.parametrize("unit", ["record", "patient"])
def test_a_unit_is_on_one_side(ask_of: Callable[..., Request], unit: str) -> None:
    """What is measured on is not trained on, together they are everything, and patients stay whole."""
    privacy = {**(PATIENT if unit == "patient" else PRIVATE), **METRIC}
    found = shard(ask_of("half", data={"validation_fraction": 0.5}, privacy=privacy))
    whole = shard(ask_of("whole", privacy=privacy))
    assert whole.measured is whole.trained
    both = [*found.trained, *found.measured]
    assert min(len(found.trained), len(found.measured)) > 0
    assert sorted(each.input_ids for each in both) == sorted(each.input_ids for each in whole.trained)
    if unit == "patient":
        assert not set(owners_of(found.trained)) & set(owners_of(found.measured))


@pytest.mark.parametrize("unit", ["record", "patient"])
def test_nobody_decides_for_another(ask_of: Callable[..., Request], unit: str) -> None:
    """Without some units, and with the rows in another order, the others are where they were."""
    sections: dict[str, Any] = {
        "data": {"validation_fraction": 0.5},
        "privacy": {**(PATIENT if unit == "patient" else PRIVATE), **METRIC},
    }
    fewer = [row for number, row in enumerate(ROWS) if number >= 45][::-1]
    before, after = shard(ask_of("all", **sections)), shard(ask_of("fewer", fewer, **sections))
    for name in ("trained", "measured"):
        left = {each.input_ids for each in getattr(after, name)}
        assert left
        assert left <= {each.input_ids for each in getattr(before, name)}


def test_a_record_with_a_column_of_its_own_moves_nobody(
    ask_of: Callable[..., Request], tmp_path: Path
) -> None:
    """One record brings a column that the server asks for, and makes another one floats: all others stay."""
    request = ask_of("run", data={"validation_fraction": 0.5}, privacy={**PRIVATE, **METRIC})
    task = request.setup.task.model_copy(update={"prompt": "{text} {allergy} {age}"})
    setup = replace(request.setup, task=task)
    rows = [{"text": row["text"], "label": row["label"], "age": n} for n, row in enumerate(ROWS)]
    odd = {"text": "odd", "label": "heart", "age": 0.5, "allergy": {"nuts": 1}}
    sides = []
    for name, content in (("all", rows), ("and one more", [*rows, odd])):
        store.write_own(tmp_path / name, Dataset.from_list(content), 0)
        found = records_of(setup, Node(tmp_path / "node", tmp_path / name, 0, deployed=True))
        sides.append([{each.input_ids for each in side} for side in (found.trained, found.measured)])
    assert all(before <= after for before, after in zip(*sides, strict=True))
    assert all(sides[0])


def test_what_is_held_out_is_never_trained_on(ask_of: Callable[..., Request]) -> None:
    """Training with a share held out is training without those records, bit for bit."""
    rows = [{**row, "client": "one"} for row in ROWS]
    one = {"federation": {"num_clients": 1}}
    data, privacy = {"validation_fraction": 0.4}, {"unit": "none", **METRIC}
    request = ask_of("held-out", rows, data=data, privacy=privacy, **one)
    names = [record_name({key: row[key] for key in ("text", "label")}) for row in rows]
    kept = [row for row, name in zip(rows, names, strict=True) if not is_held_out(name, 0.4, 0)]
    assert request.setup.seed == 0
    assert 0 < len(kept) < len(rows)
    assert trained(request) == trained(ask_of("removed", kept, **one))
    assert trained(request) != trained(ask_of("whole", rows, **one))


def test_the_metric_is_measured_on_what_is_held_out(
    ask_of: Callable[..., Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of units that the metric tells (here without noise) is that of the held-out ones."""
    monkeypatch.setattr(GaussianNoise, "draw", lambda self, shape, stddev: np.zeros(shape))
    for fraction in (0.0, 0.5):
        data = {"validation_fraction": fraction}
        request = ask_of(f"share-{fraction}", data=data, privacy={**PATIENT, **METRIC})
        setup, plan = request.setup, request.setup.plan
        assert isinstance(plan, PrivatePlan)
        own = ClientRound(request, node_of(request))
        _, count = _metric(own, own.records(has_begun=False), plan)
        patients = set(texts(request, 0).values())
        expected = {each for each in patients if fraction == 0 or is_held_out(each, 0.5, setup.seed)}
        assert 0 < len(expected) == count


def test_another_seed_holds_others_out() -> None:
    """The share follows the run's seed, and about as many are held out as asked."""
    units = [str(number) for number in range(2000)]
    sides = [[is_held_out(unit, 0.2, seed) for unit in units] for seed in (0, 1)]
    assert sides[0] != sides[1]
    assert all(320 < sum(side) < 480 for side in sides)  # 400, and 4.5 standard deviations of 18
    assert not any(is_held_out(unit, 0.0, 0) for unit in units)


def test_a_shard_of_nothing_usable_is_no_failure(ask_of: Callable[..., Request]) -> None:
    """A deployed node whose records have no known label and no owner takes part with none."""
    request = ask_of("run", privacy=PATIENT)
    setup = replace(request.setup, labels=("other", "names"))
    assert len(records_of(setup, node_of(request)).trained) == 0


def owners_at(request: Request, directory: Path, patients: list[Any]) -> list[str]:
    """Whose examples a node has whose records have these values as patients."""
    rows = [{**row, "patient": each} for row, each in zip(ROWS, patients, strict=False)]
    store.write_own(directory / "data", Dataset.from_list(rows), 0)
    node = Node(directory, directory / "data", 0, deployed=True)
    return list(owners_of(records_of(request.setup, node).trained))


def test_records_of_nobody_are_no_patient(ask_of: Callable[..., Request], tmp_path: Path) -> None:
    """NaN, NaT and missing values are not one person: their records take no part, like those of None."""
    request, nan = ask_of("run", privacy=PATIENT), float("nan")
    assert owners_at(request, tmp_path / "floats", [1.0, nan, 2.0, None, nan]) == ["1", "2"]
    day = datetime(2020, 1, 1)
    assert len(owners_at(request, tmp_path / "times", [day, None, day])) == 2
    assert owners_at(request, tmp_path / "texts", ["a", "", " ", None, "a"]) == ["a", "a"]


def test_one_record_renames_nobody(ask_of: Callable[..., Request], tmp_path: Path) -> None:
    """One record that turns the column into floats leaves all others with their owners."""
    request, patients = ask_of("run", privacy=PATIENT), [1, 12, 12, 0]
    plain = owners_at(request, tmp_path / "plain", patients)
    assert plain == ["1", "12", "12", "0"]
    assert owners_at(request, tmp_path / "odd", [*map(float, patients), 12.5]) == [*plain, "12.5"]


def peaks(directory: Path, *sizes: int) -> dict[str, float]:
    """Growth of memory in MB: a small and a large data set streamed, and the large one in memory."""
    script = Path(__file__).parents[1] / "support" / "peaks.py"
    arguments = [sys.executable, str(script), str(directory), *map(str, sizes)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_streaming_takes_little_memory(tmp_path: Path) -> None:
    """Five times the records, streamed, take hardly more memory."""
    found = peaks(tmp_path, 1500, 7500, 12)
    assert found["large"] < found["small"] + 8


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    """200 000 records of 40 words: 150 000 more take under 25 MB (row numbers, hashes); all tokens 86."""
    found = peaks(tmp_path, 50_000, 200_000, 40)
    assert found["large"] < found["small"] + 25
    assert found["in_memory"] > found["large"] + 25


def test_a_deployed_node_keeps_one_setup_in_memory(ask_of: Callable[..., Request]) -> None:
    """A server that asks in many ways, and is refused each time, does not fill the node's memory."""
    request = ask_of("run")
    run = Path(request.setup.directory)
    node = Node(run.parent / "deployed", run / "data", 0, deployed=True)
    shards = [weakref.ref(records_of(replace(request.setup, run_id=str(n)), node)) for n in range(3)]
    gc.collect()
    assert [shard() is not None for shard in shards] == [False, False, True]
