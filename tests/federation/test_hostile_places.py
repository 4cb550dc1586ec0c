"""A server cannot choose where a node keeps its own, which data it reads, or what couples records."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.served import ask, context_of, first_request, with_plan, write_policy
from support.tiny import PRIVATE

from fedslm.client.node import Node
from fedslm.config import Config
from fedslm.errors import FederationError
from fedslm.protocol.messages import Request


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


def test_dropout_is_refused(honest: Request, node: Path) -> None:
    """Masks are drawn over a batch, so that they would couple records; a server may not ask for them."""
    setup = honest.setup
    asked = replace(setup, lora=setup.lora.model_copy(update={"dropout": 0.5}))
    reply = ask(replace(honest, setup=asked), context_of(0, node))
    assert (reply.status, "dropout" in reply.reason) == ("refused", True)


def test_shared_passes_are_refused(honest: Request, node: Path) -> None:
    """Rounding couples units that share a pass, and a hostile adapter can blow it up."""
    reply = ask(with_plan(honest, passes="shared"), context_of(0, node))
    assert (reply.status, "weaker than" in reply.reason) == ("refused", True)


@pytest.mark.parametrize(
    ("names", "fetched"), [(["any"], [True]), (["some/body"], [False]), (["demo"], [])]
)
def test_the_server_does_not_choose_what_is_fetched(
    honest: Request,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    names: list[str],
    fetched: list[bool],
) -> None:
    """A deployed node fetches a base from a hub only if its policy names it; another name is refused."""
    from transformers.utils import hub

    asked = []

    def snapshot_download(name: str, *, local_files_only: bool, **_: object) -> str:
        asked.append(local_files_only)
        raise OSError(f"{name} is not there")

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    node = write_policy(tmp_path / "node", base_names=names)
    model = honest.setup.model.model_copy(update={"base": "some/body"})
    reply = ask(replace(honest, setup=replace(honest.setup, model=model)), context_of(0, node))
    assert asked == fetched
    assert reply.status == ("failed" if fetched else "refused")
    assert not (node / "ledger.jsonl").exists()


def test_the_server_does_not_read_the_environment(
    honest: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No variable of a deployed node is put into a base model's name that its policy does not list."""
    from fedslm.models.base import DEMO_DIRECTORY

    monkeypatch.setenv("SECRET_PLACE", str(DEMO_DIRECTORY))
    model = honest.setup.model.model_copy(update={"base": "$SECRET_PLACE"})
    request = replace(honest, setup=replace(honest.setup, model=model))
    assert ask(request, context_of(0, write_policy(tmp_path / "a"))).status == "failed"
    listed = write_policy(tmp_path / "b", base_names=["$SECRET_PLACE"])
    assert ask(request, context_of(0, listed)).status == "ok"


def test_a_column_that_is_not_declared_is_refused_and_free(honest: Request, tmp_path: Path) -> None:
    """What the operator declares decides, not what the records have: nothing is charged for a wrong name."""
    node = write_policy(tmp_path / "node")
    context = context_of(0, node)
    data = tmp_path / "data"
    shutil.copytree(Path(honest.setup.directory) / "data", data)
    context.node_config["data-directory"] = str(data)
    for declared, status in ((["text"], "refused"), (["label", "text"], "ok"), ([], "ok")):
        (data / "columns.json").write_text(json.dumps(declared))
        reply = ask(replace(honest, round=honest.round + (declared == [])), context)
        assert reply.status == status, reply.reason
        assert (node / "ledger.jsonl").exists() == (status == "ok")
        if status == "refused":
            assert "this node has no column 'label'; it declares text" in reply.reason
