"""A node: what it sends again for free, whose policy it follows, and the self-test before it trains."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.served import ask, chain_of, context_of, first_request, write_policy
from support.tiny import PRIVATE

from fedslm import fingerprint, layout
from fedslm.client import self_test_gate
from fedslm.config import Config
from fedslm.privacy.lines import ADAPTER, METRIC
from fedslm.protocol.messages import Request
from fedslm.verification import self_test
from fedslm.verification.self_test import Check, SelfTest

MakeConfig = Callable[..., Config]
METRIC_ALLOWED = {"metrics": "noisy", "min_metric_noise_multiplier": 5.0}


@pytest.fixture(scope="module")
def requests(config_in: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Request]:
    """The first request of a run without a metric, and of one with it."""
    directory = tmp_path_factory.mktemp("server")
    metric = {**PRIVATE, "metric_noise_multiplier": 10.0}
    return {
        name: first_request(config_in(directory / name, privacy=privacy))
        for name, privacy in (("plain", PRIVATE), ("metric", metric))
    }


@pytest.fixture(params=["plain", "metric"])
def request_of_a_run(request: pytest.FixtureRequest, requests: dict[str, Request]) -> Request:
    """Either request."""
    return requests[request.param]


def test_a_repeated_request_gets_the_same_bytes_for_free(
    request_of_a_run: Request, tmp_path: Path
) -> None:
    """The same request again, also to a new process: the same release and metric, the same ledger."""
    node = write_policy(tmp_path / "node", **METRIC_ALLOWED)
    first = ask(request_of_a_run, context_of(0, node))
    ledger = (node / "ledger.jsonl").read_bytes()
    again = ask(request_of_a_run, context_of(0, node))
    assert first.status == again.status == "ok"
    assert again.delta is not None
    assert again.delta.sha256() == again.delta_sha256 == first.delta_sha256
    assert (again.metric, again.statement) == (first.metric, first.statement)
    plan = json.loads(request_of_a_run.setup.plan.to_json())
    assert (first.metric is None) == (plan["metric_noise_multiplier"] is None)
    assert (node / "ledger.jsonl").read_bytes() == ledger


def test_a_metric_is_charged_beside_the_adapter(requests: dict[str, Request], tmp_path: Path) -> None:
    """A round with a metric has two charges, each committed with the hash of what it paid for."""
    node = write_policy(tmp_path / "node", **METRIC_ALLOWED)
    assert ask(requests["metric"], context_of(0, node)).metric is not None
    chain = chain_of(node)
    assert [charge.purpose for charge in chain.charges] == [ADAPTER, METRIC]
    assert [entry.reserve for entry in chain.entries if entry.reserve is not None] == [1, 2]
    assert len({entry.release_sha256 for entry in chain.entries if entry.release_sha256}) == 2


@pytest.mark.parametrize("name", ["release.safetensors", "release.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "flipped"])
def test_a_damaged_release_is_paid_again(
    requests: dict[str, Request], tmp_path: Path, name: str, damage: str
) -> None:
    """A kept release that is not what the ledger says is never sent: a new one is trained and charged."""
    node = write_policy(tmp_path / "node", **METRIC_ALLOWED)
    first = ask(requests["metric"], context_of(0, node))
    path = node / name
    content = path.read_bytes()
    match damage:
        case "cut":
            path.write_bytes(content[:-3])
        case "gone":
            path.unlink()
        case _:
            path.write_bytes(content[:-4] + bytes(4) if name.endswith("s") else b'{"metric": [0, 1]}')
    again = ask(requests["metric"], context_of(0, node))
    assert again.status == "ok"
    assert again.delta_sha256 != first.delta_sha256
    assert again.metric != first.metric
    assert len(chain_of(node).charges) == 4


def test_another_request_is_not_the_same(requests: dict[str, Request], tmp_path: Path) -> None:
    """The kept release answers its own request alone: another round or adapter is trained and paid."""
    node, request = write_policy(tmp_path / "node"), requests["plain"]
    adapter = type(request.adapter)({k: request.adapter[k] + 1 for k in request.adapter})
    asked = (request, replace(request, round=2), replace(request, adapter=adapter))
    replies = [ask(each, context_of(0, node)) for each in asked]
    assert len({reply.delta_sha256 for reply in replies}) == 3
    assert len(chain_of(node).charges) == 3


def test_the_policy_is_read_anew_for_every_request(
    requests: dict[str, Request], tmp_path: Path
) -> None:
    """A policy that was tightened or loosened counts from the next request on, kept releases included."""
    node, request = write_policy(tmp_path / "node"), requests["plain"]
    context = context_of(0, node)
    assert ask(request, context).status == "ok"
    write_policy(node, max_clip_norm=0.5)
    assert "clip_norm 1 is above 0.5" in ask(replace(request, round=2), context).reason
    assert ask(request, context).status == "refused"
    write_policy(node, max_clip_norm=2.0)
    assert ask(replace(request, round=2), context).status == "ok"


def test_a_nodes_own_policy_comes_before_the_shared_one(config_in: MakeConfig, tmp_path: Path) -> None:
    """In a simulation the shared policy holds for nodes without one of their own, and for no other."""
    request = first_request(config_in(tmp_path / "run", privacy=PRIVATE))
    nodes = tmp_path / "run" / "nodes"
    write_policy(nodes, max_clip_norm=0.5)
    write_policy(nodes / "client-00001")
    replies = [ask(request, context_of(client)) for client in range(2)]
    assert [reply.status for reply in replies] == ["refused", "ok"]
    (nodes / "policy.toml").unlink()
    write_policy(nodes / "client-00001", max_clip_norm=0.5)
    replies = [ask(replace(request, round=2), context_of(client)) for client in range(2)]
    assert [reply.status for reply in replies] == ["ok", "refused"]


def test_an_operators_directory_is_the_only_place(requests: dict[str, Request], tmp_path: Path) -> None:
    """A deployed node looks at no policy beside its directory, and writes nowhere else."""
    (tmp_path / "node").mkdir()
    write_policy(tmp_path)  # would be the shared policy of a simulation
    reply = ask(requests["plain"], context_of(0, tmp_path / "node"))
    assert (reply.status, "has no policy.toml" in reply.reason) == ("refused", True)
    write_policy(tmp_path / "node")
    assert ask(requests["plain"], context_of(0, tmp_path / "node")).status == "ok"
    assert {path.name for path in tmp_path.iterdir()} == {"node", "policy.toml"}
    assert {path.name for path in (tmp_path / "node").iterdir() if path.suffix != ".lock"} == {
        "policy.toml",
        "ledger.jsonl",
        "ledger.jsonl.head",
        "ledger-key.pem",
        "ledger-key.pub.pem",
        "commitment.key",
        "frozen.safetensors",
        "release.safetensors",
        "release.json",
        "attestations",
        "runs",
    }


class SelfTests:
    """Stands for the self-test: counts its runs, and fails when told to."""

    def __init__(self) -> None:
        self.ran: list[bool] = []
        self.devices: list[str] = []
        self.pending: list[bool] = []

    def __call__(self, device: str) -> SelfTest:
        """Passes unless told otherwise."""
        verdict = self.pending.pop() if self.pending else True
        self.ran.append(verdict)
        self.devices.append(device)
        return SelfTest((Check("a promise", verdict, "figures of /the/node"),), 0.1)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[SelfTests]:
    """A self-test that counts, for a user and a process that remember none."""
    tests = SelfTests()
    monkeypatch.setenv("FEDSLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(self_test, "run_self_test", tests)
    new_process()
    yield tests
    new_process()


def new_process() -> None:
    """Forgets what this process remembers of self-tests."""
    self_test_gate._self_test.cache_clear()


def result_of(node: Path) -> Path:
    """The only result of a self-test that a node keeps."""
    (path,) = (node / layout.ATTESTATIONS).glob("self-test-*.json")
    return path


def test_the_self_test_runs_once_for_one_code(
    counted: SelfTests, requests: dict[str, Request], tmp_path: Path
) -> None:
    """The first training runs it and keeps the result; neither later requests nor processes run it again."""
    node = write_policy(tmp_path / "node")
    for number in (1, 2, 3):
        assert ask(replace(requests["plain"], round=number), context_of(0, node)).status == "ok"
        new_process()
    assert counted.ran == [True]
    kept = json.loads(result_of(node).read_text())
    assert kept["test"]["code"] == kept["values"]["fingerprint"] == fingerprint.code_fingerprint()
    assert list(kept["values"]["checks"]) == ["a promise"]


def test_the_simulations_of_a_machine_share_a_self_test(
    counted: SelfTests, config_in: MakeConfig, tmp_path: Path
) -> None:
    """The second run finds the first one's result, and each keeps a copy for its audit."""
    copies = []
    for name in ("one", "two"):
        request = first_request(config_in(tmp_path / name, privacy=PRIVATE))
        for client in range(2):
            assert ask(request, context_of(client)).status == "ok"
            new_process()
        copies.append((tmp_path / name / "nodes" / layout.SELF_TEST).read_text())
    assert counted.ran == [True]
    assert copies[0] == copies[1]
    assert json.loads(copies[0])["fingerprint"] == fingerprint.code_fingerprint()


def test_a_deployed_node_believes_no_shared_self_test(
    counted: SelfTests, requests: dict[str, Request], tmp_path: Path
) -> None:
    """What a simulation left in the user's cache saves a real node nothing, nor one node another."""
    assert ask(requests["plain"], context_of(0)).status == "ok"
    for name in ("one", "two"):
        new_process()
        node = write_policy(tmp_path / name)
        assert ask(requests["plain"], context_of(0, node)).status == "ok"
    assert counted.ran == [True] * 3


def test_the_device_that_trains_is_tested(
    counted: SelfTests, config_in: MakeConfig, tmp_path: Path
) -> None:
    """The self-test runs where the request has the base compute."""
    request = first_request(config_in(tmp_path / "run", model={"device": "cpu"}, privacy=PRIVATE))
    node = write_policy(tmp_path / "node")
    assert ask(request, context_of(0, node)).status == "ok"
    assert counted.devices == ["cpu"]


def test_a_request_that_is_refused_runs_no_self_test(
    counted: SelfTests, requests: dict[str, Request], tmp_path: Path
) -> None:
    """What the policy refuses costs the node nothing."""
    node = write_policy(tmp_path / "node", max_clip_norm=0.1)
    assert ask(requests["plain"], context_of(0, node)).status == "refused"
    assert counted.ran == []


@pytest.mark.parametrize("kept", ["other code", "cut", "{}", "[]", ""])
def test_other_code_is_tested_anew(
    counted: SelfTests, requests: dict[str, Request], tmp_path: Path, kept: str
) -> None:
    """A result of other code, or one that cannot be read, counts for nothing."""
    node = write_policy(tmp_path / "node")
    assert ask(requests["plain"], context_of(0, node)).status == "ok"
    new_process()
    path = result_of(node)
    content = path.read_text()
    own = fingerprint.code_fingerprint()
    texts = {"other code": content.replace(own, "0" * 64), "cut": content[: len(content) // 2]}
    path.write_text(texts.get(kept, kept))
    assert ask(replace(requests["plain"], round=2), context_of(0, node)).status == "ok"
    assert counted.ran == [True, True]
    assert json.loads(path.read_text())["values"]["fingerprint"] == own


def test_a_failed_self_test_refuses_and_is_not_kept(
    counted: SelfTests, requests: dict[str, Request], tmp_path: Path
) -> None:
    """Nothing is trained, charged or attested; the reason has no detail; it is tried again next time."""
    node = write_policy(tmp_path / "node")
    context = context_of(0, node)
    for _ in range(2):
        counted.pending.append(False)
        reply = ask(requests["plain"], context)
        assert (reply.status, reply.delta) == ("refused", None)
        assert reply.reason == "this node's self-test failed, so it trains nothing"
        assert not list((node / layout.ATTESTATIONS).glob("self-test-*.json"))
        assert not (node / "ledger.jsonl").exists()
    assert ask(requests["plain"], context).status == "ok"
    assert counted.ran == [False, False, True]


def test_a_result_that_cannot_be_kept_refuses(
    counted: SelfTests, requests: dict[str, Request], tmp_path: Path
) -> None:
    """Where the node cannot record its self-test it trains nothing, and says no path."""
    node = write_policy(tmp_path / "node")
    (node / layout.ATTESTATIONS).touch()
    reply = ask(requests["plain"], context_of(0, node))
    assert (reply.status, "cannot record its self-test" in reply.reason) == ("refused", True)
    assert "/" not in reply.reason
    assert not (node / "ledger.jsonl").exists()


@pytest.mark.parametrize("what", ["threads", "kernels", "precision", "device"])
def test_another_way_to_compute_is_tested_anew(
    counted: SelfTests,
    requests: dict[str, Request],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    """The same code with other threads, kernels, precision or device has not passed here, in one process neither."""
    node = write_policy(tmp_path / "node")
    assert ask(requests["plain"], context_of(0, node)).status == "ok"
    if what == "threads":
        torch.set_num_threads(torch.get_num_threads() + 1)
    elif what == "device":
        monkeypatch.setattr(self_test, "device_of", lambda model: torch.device("mps"))
    elif what == "precision":
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    else:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "OTHER")
    assert ask(replace(requests["plain"], round=2), context_of(0, node)).status == "ok"
    assert counted.ran == [True, True]
    kept = [
        json.loads(path.read_text()) for path in (node / layout.ATTESTATIONS).glob("self-test-*.json")
    ]
    assert len(kept) == 2
    assert self_test.kernels() in [each["test"]["key"]["kernels"] for each in kept]
