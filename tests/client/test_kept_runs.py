"""A run keeps the records that it began with: nothing that leaves tells that others came or went."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from flwr.app import Context
from support.served import ask, chain_of, context_of, first_request, with_plan, write_policy
from support.tiny import PRIVATE, make_rows

from fedslm import layout
from fedslm.client import records
from fedslm.client.kept_runs import NOT_KEPT, remove_old, with_own_records
from fedslm.client.node import OWN_SHARD, Node
from fedslm.config import Config
from fedslm.data import store
from fedslm.privacy.plan import NoPrivacy
from fedslm.protocol.loading import model_for
from fedslm.protocol.messages import Reply, Request

ROWS = make_rows(30, 0)
CHANGES: dict[str, list[dict[str, Any]]] = {
    "admitted": [*ROWS, *make_rows(1, 7)],
    "withdrawn": ROWS[:-1],
    "replaced": make_rows(3, 8),
}


@pytest.fixture(scope="module")
def honest(config_in: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Request:
    """A server's first request; its plan pays for three rounds."""
    return first_request(config_in(tmp_path_factory.mktemp("server") / "run", privacy=PRIVATE))


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """No test finds another's records in memory."""
    yield
    started_again()


def started_again() -> None:
    """The node's process remembers nothing of what it read."""
    records._only.cache_clear()


def node_with(directory: Path, rows: list[dict[str, Any]], **policy: Any) -> Context:
    """A deployed node whose records were imported."""
    context = context_of(0, write_policy(directory, **policy))
    context.node_config["data-directory"] = str(directory / "data")
    imported(directory, rows)
    return context


def imported(directory: Path, rows: list[dict[str, Any]]) -> None:
    """The node's records are others from here on, and its process is a new one."""
    store.write_own(directory / "data", Dataset.from_list(rows), OWN_SHARD)
    started_again()


def run_of(request: Request, name: str) -> Request:
    """The same request of another run."""
    return replace(request, setup=replace(request.setup, run_id=name))


def kept_of(directory: Path) -> list[Path]:
    """The files of records that a node keeps for runs."""
    return sorted(directory.glob("runs/*/records/**/*.*"))


def what_the_server_sees(reply: Reply) -> tuple[object, ...]:
    """All of a reply that is not random: noise, hashes and signatures are."""
    return (reply.status, reply.reason, reply.round, reply.weight, reply.metric, reply.base_sha256)


@pytest.mark.parametrize("change", CHANGES)
def test_records_that_come_and_go_do_not_show(honest: Request, tmp_path: Path, change: str) -> None:
    """Over a restart a run reads what it began with and answers as if nothing had changed; a new one reads the new."""
    context = node_with(tmp_path, ROWS)
    first = what_the_server_sees(ask(honest, context))
    imported(tmp_path, CHANGES[change])
    second = what_the_server_sees(ask(replace(honest, round=2), context))
    assert what_the_server_sees(ask(run_of(honest, "new"), context)) == first
    assert (second, first[:2]) == ((*first[:2], 2, *first[3:]), ("ok", ""))
    commitments = [charge.dataset_commitment for charge in chain_of(tmp_path).charges]
    assert commitments[0] == commitments[1] != commitments[2]


def test_a_run_outlives_the_nodes_own_records(honest: Request, tmp_path: Path) -> None:
    """Where the node's own records are gone or cannot be read, a run that has begun does not notice."""
    context = node_with(tmp_path, ROWS)
    assert ask(honest, context).status == "ok"
    shutil.rmtree(tmp_path / "data")
    started_again()
    assert ask(replace(honest, round=2), context).status == "ok"
    assert ask(run_of(honest, "new"), context).reason == "failed; see the client's log"


@pytest.mark.parametrize("refused_for", ["plan", "day"])
def test_no_record_is_read_for_a_refusal(honest: Request, tmp_path: Path, refused_for: str) -> None:
    """What policy and ledger refuse takes no time that tells how many records there are: they may even be gone."""
    limits = {"max_rounds_per_day": 1} if refused_for == "day" else {}
    context = node_with(tmp_path, ROWS, **limits)
    assert ask(honest, context).status == "ok"
    other = with_plan(honest, rounds=2) if refused_for == "plan" else run_of(honest, "new")
    found = []
    for _ in range(2):
        found.append(what_the_server_sees(ask(other, context)))
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        started_again()
    assert found[0] == found[1]
    assert found[0][0] == "refused"
    assert len(list((tmp_path / layout.NODE_RUNS).iterdir())) == 1  # nothing is kept for it


def test_a_run_without_privacy_keeps_its_records_too(honest: Request, tmp_path: Path) -> None:
    """Its weight, which is the number of records, stays what it was when the run began."""
    weights = honest.setup.aggregation.model_copy(update={"weights": "records"})
    setup = replace(honest.setup, plan=NoPrivacy(4, 2), aggregation=weights)
    request, context = replace(honest, setup=setup), node_with(tmp_path, ROWS, unit="none")
    found = [ask(request, context).weight]
    imported(tmp_path, CHANGES["admitted"])
    found += [ask(each, context).weight for each in (replace(request, round=2), run_of(request, "new"))]
    assert found == [30.0, 30.0, 31.0]


def test_a_column_that_one_record_brings_does_not_show(honest: Request, tmp_path: Path) -> None:
    """A server that asks for another column in mid-run does not learn whether a record has it."""
    asked = honest.setup.task.model_copy(update={"prompt": "{text} {allergy}"})
    second = replace(honest, round=2, setup=replace(honest.setup, task=asked))
    answers = []
    for name, rows in (("with", [{**ROWS[0], "allergy": "nuts"}, *ROWS[1:]]), ("without", ROWS)):
        context = node_with(tmp_path / name, rows)
        assert ask(honest, context).status == "ok"
        answers.append(what_the_server_sees(ask(second, context)))
    assert answers[0] == answers[1]
    assert answers[0][0] == "ok"


@pytest.mark.parametrize("own", [True, False], ids=["own copy", "elsewhere"])
def test_the_records_of_a_run_are_the_owners_only(honest: Request, tmp_path: Path, own: bool) -> None:
    """Whatever the process's mask: files 0600 in a directory 0700. Own files share bytes, others are copied."""
    context = node_with(tmp_path / "node", ROWS)
    data = tmp_path / "node" / "data"
    if not own:
        data = data.rename(tmp_path / "data")
        context.node_config["data-directory"] = str(data)
    before = os.umask(0)
    try:
        assert ask(honest, context).status == "ok"
    finally:
        os.umask(before)
    (file,) = kept_of(tmp_path / "node")
    assert file.stat().st_mode & 0o777 == 0o600
    (run,) = (tmp_path / "node" / layout.NODE_RUNS).iterdir()
    assert run.stat().st_mode & 0o777 == 0o700
    source = data / "train" / file.name
    assert os.path.samefile(file, source) == own
    if not own:
        source.write_bytes(b"written into")
        started_again()
        assert ask(replace(honest, round=2), context).status == "ok"


def test_what_was_left_of_a_killed_process_is_not_taken(tmp_path: Path) -> None:
    """A copy that was cut off is made anew."""
    store.write_own(tmp_path / "data", Dataset.from_list(ROWS), OWN_SHARD)
    torn = tmp_path / "kept" / "train" / f"00000.arrow.{os.getpid()}.partial"
    torn.parent.mkdir(parents=True)
    torn.write_bytes(b"half")
    store.pin(tmp_path / "data", OWN_SHARD, tmp_path / "kept", linked=False)
    assert list(store.read_client(tmp_path / "kept", OWN_SHARD)) == ROWS
    assert not torn.exists()


@pytest.mark.parametrize("change", [None, *CHANGES])
def test_a_run_whose_records_are_not_kept_is_refused(
    honest: Request, tmp_path: Path, change: str | None
) -> None:
    """Eight runs are kept; the one that asked longest ago is refused, the same whatever changed, and not charged."""
    context = node_with(tmp_path, ROWS)
    assert ask(honest, context).status == "ok"
    node = Node.of(context, honest.setup.directory)
    for number in range(8):
        with_own_records(run_of(honest, f"run {number}").setup, node, has_begun=False)
    assert len(kept_of(tmp_path)) == 8
    if change is not None:
        imported(tmp_path, CHANGES[change])
    reply = ask(replace(honest, round=2), context)
    assert (reply.status, reply.reason) == ("refused", NOT_KEPT)
    assert len(chain_of(tmp_path).charges) == 1
    assert len(kept_of(tmp_path)) == 8


def test_a_run_that_has_not_asked_for_a_month_is_removed(honest: Request, tmp_path: Path) -> None:
    """A start removes everything of it, also what it kept from round to round, and nothing of another."""
    node = Node.of(node_with(tmp_path, ROWS), honest.setup.directory)
    for name, days in (("old", 31), ("late", 29)):
        setup = run_of(honest, name).setup
        with_own_records(setup, node, has_begun=False)
        own = node.run_directory(setup.run_id, setup.plan)
        (own / "memory-00001.safetensors").touch()
        asked = time.time() - days * 86_400
        os.utime(own, (asked, asked))
    remove_old(tmp_path)
    assert list((tmp_path / layout.NODE_RUNS).iterdir()) == [own]


def test_the_records_of_a_run_go_with_its_last_round(honest: Request, tmp_path: Path) -> None:
    """After the last round that the plan pays for they are gone; the same request is still answered, for free."""
    context, model = node_with(tmp_path, ROWS), model_for(honest.setup)
    assert model.cached_layers is not None
    model.forget_records()
    for number in (1, 2, 3):
        assert bool(kept_of(tmp_path)) == bool(len(model.cached_layers)) == (number > 1)
        last = ask(replace(honest, round=number), context)
        assert last.status == "ok"
    assert not kept_of(tmp_path)
    assert len(model.cached_layers) == 0
    shutil.rmtree(tmp_path / "data")
    started_again()
    assert ask(replace(honest, round=3), context).delta_sha256 == last.delta_sha256
    fourth = ask(replace(honest, round=4), context)
    assert (fourth.status, "budget exhausted" in fourth.reason) == ("refused", True)
    assert len(chain_of(tmp_path).charges) == 3


def test_records_that_were_changed_on_disk_are_not_told_of(honest: Request, tmp_path: Path) -> None:
    """If what is kept of a run is written into, the node fails with its one sentence, and charges nothing."""
    context = node_with(tmp_path, ROWS)
    assert ask(honest, context).status == "ok"
    (file,) = kept_of(tmp_path)
    file.unlink()
    imported(tmp_path, CHANGES["withdrawn"])
    os.link(tmp_path / "data" / "train" / file.name, file)
    reply = ask(replace(honest, round=2), context)
    assert (reply.status, reply.reason) == ("failed", "failed; see the client's log")
    assert len(chain_of(tmp_path).charges) == 1
