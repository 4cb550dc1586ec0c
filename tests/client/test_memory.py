"""Tests of what a client keeps from round to round."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context
from support.served import RawPlan, context_of, first_request, message_to, write_policy
from support.tiny import PRIVATE

from fedslm.client.memory import ClientMemory, Kept
from fedslm.client.node import Node
from fedslm.client.start import start_of
from fedslm.config import Config
from fedslm.errors import FederationError
from fedslm.privacy.plan import NoPrivacy, from_json
from fedslm.protocol.messages import Request
from fedslm.protocol.setup import Setup
from fedslm.records import AdapterState


def kept(value: float) -> Kept:
    """Something in every room."""
    return Kept(*(AdapterState({"a/b": np.full(2, value + n, np.float32)}) for n in range(3)))


def same(one: Kept, other: Kept) -> bool:
    """Both hold the same bits."""
    rooms = ("local", "control", "error")
    return all(getattr(one, room).sha256() == getattr(other, room).sha256() for room in rooms)


def test_a_round_starts_from_the_last_one_before_it(tmp_path: Path) -> None:
    """Rounds that a client took no part in leave nothing; a round asked again starts where it started."""
    memory = ClientMemory(tmp_path)
    memory.keep(2, kept(2))
    memory.keep(5, kept(5))
    for number, expected in [(1, Kept()), (2, Kept()), (3, kept(2)), (5, kept(2)), (6, kept(5))]:
        assert same(memory.before(number), expected)


def test_two_rounds_are_kept(tmp_path: Path) -> None:
    """Disk use does not grow with the rounds."""
    memory = ClientMemory(tmp_path)
    for number in range(1, 6):
        memory.keep(number, kept(number))
    assert len(list(tmp_path.iterdir())) == 2
    assert same(memory.before(5), kept(4))
    assert same(memory.before(6), kept(5))


def test_a_round_that_goes_back_leaves_the_later_ones_behind(tmp_path: Path) -> None:
    """Two rounds are kept whatever the order, and none of a way that the run did not take."""
    memory = ClientMemory(tmp_path)
    for number in (7, 8, 9, 3, 2):
        memory.keep(number, kept(number))
    assert [path.name for path in tmp_path.iterdir()] == ["memory-00002.safetensors"]
    memory.keep(4, kept(4))
    assert len(list(tmp_path.iterdir())) == 2
    assert same(memory.before(9), kept(4))


def test_nothing_leaves_no_file(tmp_path: Path) -> None:
    """A method that keeps nothing writes nothing."""
    ClientMemory(tmp_path).keep(1, Kept())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../other", "/x", "a*", "ü\n", "", "\ud800"])
def test_a_runs_name_cannot_leave_the_directory(tmp_path: Path, name: str) -> None:
    """A run is named by the server: whatever it calls it, files stay here, and runs apart."""
    node = Node(tmp_path / "node", tmp_path, 0, deployed=True)
    memory = ClientMemory(node.run_directory(name, RawPlan("{}")))
    memory.keep(1, kept(1))
    (path,) = (tmp_path / "node" / "runs").iterdir()
    assert path == memory.directory
    assert same(memory.before(2), kept(1))
    assert same(ClientMemory(node.run_directory(name + "x", RawPlan("{}"))).before(2), Kept())
    assert [each.name for each in tmp_path.iterdir()] == ["node"]


def test_no_two_runs_and_plans_have_one_name(tmp_path: Path) -> None:
    """Identifier and plan cannot be shifted into one another, and no part of the hash is cut off."""
    node = Node(tmp_path, tmp_path, 0, deployed=True)
    pairs = [("a", "b"), ("ab", ""), ("", "ab"), ("a\0b", ""), ("a", "\0b"), ('a", "b', ""), ("b", "a")]
    names = {node.run_directory(run, RawPlan(plan)).name for run, plan in pairs}
    assert len(names) == len(pairs)
    assert {len(name) for name in names} == {64}


@pytest.mark.parametrize("room", ["control", "error"])
def test_what_was_kept_must_fit_the_adapter(
    make_config: Callable[..., Config], tmp_path: Path, room: str
) -> None:
    """A run that goes on at another rank is refused before the charge; numpy would stretch rank 1 to 2."""
    request = replace(first_request(make_config()), round=2)
    node = Node(tmp_path / "node", tmp_path, 0, deployed=True)
    memory = ClientMemory(node.run_directory(request.setup.run_id, request.setup.plan))
    memory.keep(1, replace(Kept(), **{room: request.adapter}))
    assert same(start_of(request, node).kept, memory.before(2))
    narrow = {
        key: value[:1] if ".lora_A." in key else value for key, value in request.adapter.tensors.items()
    }
    memory.keep(1, replace(Kept(), **{room: AdapterState(narrow)}))
    with pytest.raises(FederationError, match="does not fit the adapter"):
        start_of(request, node)


@pytest.mark.parametrize(
    "options",
    [
        {"aggregation": {"method": "fedsa"}},
        {"compression": {"upload": "int8", "keep_fraction": 0.25, "error_feedback": True}},
    ],
    ids=["own factors", "compression's error"],
)
def test_nothing_of_a_run_without_privacy_enters_a_private_one(
    make_config: Callable[..., Config], tmp_path: Path, options: dict[str, Any]
) -> None:
    """A server that gives a private run the name of one without privacy finds nothing of it there."""
    private = first_request(make_config(privacy=PRIVATE, **options))
    setup = private.setup
    plain = replace(private, setup=replace(setup, plan=NoPrivacy(4, 2)))
    context = context_of(0, write_policy(tmp_path / "node", unit="none"))
    assert status(plain, context) == "ok"
    node = Node.of(context, setup.directory)
    second = replace(private, round=2)
    assert not same(start_of(replace(plain, round=2), node).kept, Kept())
    start, fresh = start_of(second, node), start_of(second, replace(node, directory=tmp_path / "new"))
    assert same(start.kept, Kept())
    assert start.adapter.sha256() == fresh.adapter.sha256()
    assert start_of(replace(second, setup=other_unit(setup)), node).adapter.sha256() == (
        fresh.adapter.sha256()
    )
    assert status(second, context) == "ok"


def status(request: Request, context: Context) -> str:
    """What a node answers; how the update is packed does not matter."""
    return str(message_to(request, context).content.config_records["reply"]["status"])


def other_unit(setup: Setup) -> Setup:
    """The setup with patients as units."""
    values = {**json.loads(setup.plan.to_json()), "unit": "patient"}
    values |= {"unit_column": "patient", "max_records_per_unit": 1}
    return replace(setup, plan=from_json(json.dumps(values)))
