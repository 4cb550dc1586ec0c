"""A server cannot choose where a node keeps its own, which data it reads, or what couples records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from served import ask, context_of, first_request, with_plan, write_policy
from tiny import PRIVATE

from fedslm.config import Config
from fedslm.errors import FederationError
from fedslm.federation.node import Node
from fedslm.federation.wire import Request


@pytest.fixture(scope="module")
def honest(config_in: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Request:
    """An honest server's first request."""
    return first_request(config_in(tmp_path_factory.mktemp("server") / "run", privacy=PRIVATE))


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """A node's directory, with the usual policy."""
    return write_policy(tmp_path / "node")


@pytest.mark.parametrize(
    "values",
    [
        {"partition-id": 0, "node_directory": "x", "data-directory": "x"},
        {"partition-id": 0, "node-directory": "", "data-directory": "x"},
        {"partition-id": 0, "node-directory": "x"},
        {"partition-id": 0},
        {"partition-id": 0, "num-partitions": 3, "node-directory": "x", "data-directory": "x"},
    ],
    ids=["misspelt", "empty", "no data", "nothing", "both"],
)
def test_a_misspelt_node_is_no_simulated_client(honest: Request, values: dict[str, str | int]) -> None:
    """Only a config that is exactly a simulation's, or exactly a node's, trains."""
    context = context_of(0)
    context.node_config = dict(values)
    with pytest.raises(FederationError, match="node's config"):
        Node.of(context, honest.setup.directory)


def test_the_server_does_not_choose_the_data(honest: Request, tmp_path: Path) -> None:
    """A deployed node reads what its operator named, whatever directory a message names."""
    context = context_of(0, write_policy(tmp_path / "node"))
    context.node_config["data-directory"] = str(tmp_path)
    assert Node.of(context, honest.setup.directory).data == tmp_path


def test_data_that_changes_in_a_run_are_refused(honest: Request, node: Path, tmp_path: Path) -> None:
    """Another data set under the same run and ledger is refused, and nothing is charged for it."""
    request, context = honest, context_of(0, node)
    assert ask(request, context).status == "ok"
    before = (node / "ledger.jsonl").read_bytes()
    reply = ask(replace(request, round=2), context_of(1, node))
    assert (reply.status, "data changed" in reply.reason) == ("refused", True)
    assert (node / "ledger.jsonl").read_bytes() == before


def test_dropout_is_refused(honest: Request, node: Path) -> None:
    """Masks are drawn over a batch, so that they would couple records; a server may not ask for them."""
    setup = honest.setup
    asked = replace(setup, lora=setup.lora.model_copy(update={"dropout": 0.5}))
    reply = ask(replace(honest, setup=asked), context_of(0, node))
    assert (reply.status, "dropout" in reply.reason) == ("refused", True)


def test_shared_passes_are_refused(honest: Request, node: Path) -> None:
    """Rounding couples units that share a pass, and a hostile adapter can blow it up."""
    reply = ask(with_plan(honest, batched=True), context_of(0, node))
    assert (reply.status, "in one pass" in reply.reason) == ("refused", True)
