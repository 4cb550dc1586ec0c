"""The guard before the real SuperLink application of the installed Flower, in one process: each rule."""

from __future__ import annotations

import asyncio
import logging
import math
import sqlite3
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flwr
import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
    RegisterNodeFleetRequest,
)
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectResponse,
)
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan, _parse_superlink_lifespan_config
from flwr.superlink.main import create_app
from support.fleet_client import MIB, Sender, answer_to, arrays, instruction

from fedslm.deployment import authority, fleet_api
from fedslm.deployment.guard import Guard, guarded
from fedslm.deployment.server import children
from fedslm.errors import RunError

MESSAGE_MB = 8
Change = Callable[["World", PushMessagesRequest], Any]


@dataclass
class World:
    """A SuperLink with one run and two nodes; whatever reaches it passes the guard."""

    guard: Guard
    state: Any
    run: int
    task: int
    nodes: list[Sender] = field(default_factory=list)

    def post(self, path: str, body: Any, headers: Any = ()) -> httpx.Response:
        """Sends a request through the guard, as uvicorn would hand it over.

        The run's process is there and says so, however slow the machine is.
        """
        assert self.state.acknowledge_task_heartbeat(self.task)

        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(app=self.guard, client=("127.0.0.9", 1))
            async with httpx.AsyncClient(transport=transport, base_url="https://superlink") as client:
                return await client.post(path, content=body, headers=headers)

        return asyncio.run(send())

    def add_node(self) -> Sender:
        """Admits a node."""
        key = ec.generate_private_key(ec.SECP384R1())
        pem = public_key_to_bytes(key.public_key())
        number = self.state.create_node("owner", "owner", pem, 30)
        assert self.state.acknowledge_node_heartbeat(number, 30)
        self.nodes.append(Sender(key, number, self.post))
        return self.nodes[-1]

    def instruct(
        self,
        node: Sender,
        content: RecordDict | None = None,
        kind: str = "train",
        *,
        uploads: bool = True,
    ) -> Message:
        """Stores an instruction for a node, with all its objects or none, as a server's side does."""
        content = content or RecordDict({"request": ConfigRecord({"round": len(self.nodes)})})
        made = instruction(self.run, node.node_id, content, kind)
        session = self.state.start_session(self.run)
        stored, wanted = self.state.store_message_and_object_tree(made, get_object_tree(made), session)
        assert stored
        for name, each in get_all_nested_objects(made).items():
            if name in wanted and uploads:
                assert self.state.store_object(self.run, session, name, each.deflate())
        return made

    @property
    def counts(self) -> tuple[int, int]:
        """How many instructions and replies are stored."""
        return self.state.num_message_ins(), self.state.num_message_res()


def application(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Flower's own application, from the command line that `fedslm server up` gives it."""
    (directory / "federation.toml").write_text('name = "t"\nhost = "127.0.0.1"\n')
    authority.certify(directory)
    (command, *_) = (child.command for child in children(directory))
    monkeypatch.setattr(sys, "argv", list(command[command.index("flower-superlink") :]))
    return create_app(_parse_superlink_lifespan_config(), SuperLinkLifespan)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A SuperLink with a database on disk, a run that is under way, and two admitted nodes."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        app = application(tmp_path_factory.mktemp("server"), monkeypatch)
    state = app.state.linkstate_factory.state()
    run = state.create_run(
        *("fedslm/app", "1", "hash", {}, NOOP_FEDERATION_ID), None, None, TaskType.SERVER_APP
    )
    task = state.get_run_info(run_ids=[run])[0].primary_task_id
    assert state.claim_task(task)
    assert state.activate_task(task)
    made = World(guarded(app, MESSAGE_MB), state, run, task)
    made.add_node()
    made.add_node()
    return made


def refused(answer: httpx.Response, status: int, word: str) -> None:
    """The guard's own answer: one line that names what is wrong."""
    assert answer.status_code == status, answer.text
    assert word in answer.text
    assert answer.text.count("\n") == 1
    assert answer.headers["content-type"] == "text/plain"


def accepted(answer: httpx.Response) -> bytes:
    """Flower's own answer."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/protobuf"
    return answer.content


# ---- paths and headers


@pytest.mark.parametrize(
    "path",
    [
        *fleet_api.REFUSED_PATHS,
        *(
            "/v1/fleet",
            "/v1/fleet/",
            "/v1/fleet/nothing",
            "/v1/fleet/pull-messages/",
            "/V1/fleet/get-run",
        ),
        *("/v1/fleet/pull-messages%23", "/v1/fleet/pull-messages%3F", "/v1/fleet/%70ull-messages"),
        *("/v1/fleet/pull-messages?a=1", "/v1/fleet/pull-messages%0A", "/v1/fleet/x%2F..%2Fget-run"),
    ],
)
def test_only_the_known_paths_exist(world: World, path: str) -> None:
    """Another path, another spelling or a query is not there, even for an admitted node."""
    node = world.nodes[0]
    body = RegisterNodeFleetRequest(public_key=b"x").SerializeToString()
    refused(world.post(path, body, node.headers()), 404, "path")


def test_flower_has_the_paths_that_the_guard_knows(world: World) -> None:
    """The table of paths is the installed Flower's, and each of them gets through with a node's key."""
    paths = {path for _, path in PROTOBUF_REQUEST_TYPES if path.startswith("/v1/fleet/")}
    assert paths == {*fleet_api.PATHS, *fleet_api.REFUSED_PATHS}
    node = world.nodes[0]
    request = ActivateNodeRequest(
        public_key=public_key_to_bytes(node.key.public_key()), heartbeat_interval=30.0
    )
    world.state.deactivate_node(node.node_id)
    accepted(node.send("activate-node", request))
    for path in fleet_api.PATHS:
        got = world.post(path, b"", node.headers())
        assert got.headers["content-type"] != "text/plain" or "node.node_id" in got.text, path


def test_other_interfaces_pass_untouched(world: World) -> None:
    """The Control API, which is for loopback alone, is Flower's own."""
    got = world.post("/v1/control/list-nodes", b"", {"content-type": "application/protobuf"})
    accepted(got)


@dataclass
class Counted:
    """A body that counts how much of it was asked for."""

    size: int = 1000
    asked: int = 0

    async def receive(self) -> dict[str, Any]:
        """One piece, and another one to come."""
        self.asked += 1
        return {"type": "http.request", "body": b"x" * self.size, "more_body": True}


def call(
    app: Any, node: Sender, body: Counted, *, path: str = fleet_api.PUSH_OBJECT, **headers: str
) -> int:
    """The status of a request whose headers say what a test wants.

    A refusal closes the connection unless the body was read to its end.
    """
    named = {**node.headers(), "host": "superlink", "content-length": "1000", **headers}
    raw = [(key.replace("_", "-").encode(), value.encode()) for key, value in named.items() if value]
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "headers": raw}
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope, body.receive, send))
    assert (b"connection", b"close") in sent[0]["headers"]
    return int(sent[0]["status"])


def test_a_body_is_not_read_before_its_sender_is_known(world: World) -> None:
    """A stranger, a revoked node, an old or a future time, another's signature: 401, and nothing is read."""
    node = world.nodes[0]
    stranger = Sender(ec.generate_private_key(ec.SECP384R1()), node.node_id, world.post)
    gone = world.add_node()
    world.state.delete_node("owner", gone.node_id)
    cases: list[tuple[Sender, dict[str, str]]] = [
        (stranger, {}),
        (gone, {}),
        (node, node.headers(-306)),
        (node, node.headers(6)),
        (node, {"flwr-signature": stranger.headers()["flwr-signature"]}),
        (node, {"flwr-signature": "!"}),
        (node, {"flwr-timestamp": "yesterday"}),
        (node, {"flwr-public-key": ""}),
        (node, {"flwr-public-key": "eA==" * 1000}),
    ]
    for sender, headers in cases:
        body = Counted()
        assert call(world.guard, sender, body, **headers) == 401, headers
        assert body.asked == 0
    for seconds in (-200, 4):
        body = Counted()
        assert (
            call(world.guard, node, body, **node.headers(seconds)) == 413
        )  # known, then read too much
        assert body.asked == 2
    world.nodes.remove(gone)


def test_a_doubled_header_is_none(world: World) -> None:
    """Flower reads the first of two headers: a key that stands there twice names nobody."""
    node, other = world.nodes
    both = httpx.Headers(
        [*node.headers().items(), ("flwr-public-key", other.headers()["flwr-public-key"])]
    )
    refused(world.post(fleet_api.PULL_MESSAGES, b"", both), 401, "name")


def test_a_length_is_stated_and_small(world: World) -> None:
    """Without a length, with a chunked body, or with a length beyond the path's bound nothing is read."""
    node = world.nodes[0]
    for status, path, headers in [
        (411, fleet_api.PUSH_OBJECT, {"content-length": ""}),
        (411, fleet_api.PUSH_OBJECT, {"content-length": "-1"}),
        (411, fleet_api.PUSH_OBJECT, {"transfer-encoding": "chunked"}),
        (413, fleet_api.PUSH_OBJECT, {"content-length": str(fleet_api.MOST_REQUEST_BYTES + 1)}),
        (413, fleet_api.PULL_MESSAGES, {"content-length": str(64 * 1024 + 1)}),
        (413, fleet_api.PUSH_MESSAGES, {"content-length": "70000"}),
        (400, fleet_api.PULL_MESSAGES, {"host": "a/v1/fleet/get-run?"}),
    ]:
        body = Counted()
        assert call(world.guard, node, body, path=path, **headers) == status, headers
        assert body.asked == 0
    accepted(node.send("pull-messages", PullMessagesRequest(node=Node(node_id=node.node_id))))


def test_a_body_has_its_stated_length(world: World) -> None:
    """Reading stops where the stated length is passed; a shorter body is refused as well."""
    body = Counted()
    assert call(world.guard, world.nodes[0], body, **{"content-length": "4500"}) == 413
    assert body.asked == 5

    class Short(Counted):
        async def receive(self) -> dict[str, Any]:
            return {"type": "http.request", "body": b"x", "more_body": False}

    assert call(world.guard, world.nodes[0], Short()) == 400


def test_a_node_has_eight_bodies_under_way(world: World) -> None:
    """Further requests of the same node wait unread; another node's, and small ones, do not."""
    node, other = world.nodes
    waiting: list[str] = []

    async def send(message: Any) -> None: ...

    def request(sender: Sender, path: str) -> asyncio.Task[None]:
        async def receive() -> dict[str, Any]:
            waiting.append(f"{sender.node_id} {path}")
            await asyncio.sleep(60)
            raise AssertionError

        headers = {**sender.headers(), "host": "superlink", "content-length": "1000"}
        raw = [(key.encode(), value.encode()) for key, value in headers.items()]
        scope = {"type": "http", "method": "POST", "path": path, "headers": raw}
        return asyncio.get_running_loop().create_task(world.guard(scope, receive, send))

    async def all_at_once() -> None:
        tasks = [request(node, fleet_api.PUSH_OBJECT) for _ in range(12)]
        await asyncio.sleep(1)
        tasks += [request(other, fleet_api.PUSH_OBJECT), request(node, fleet_api.HEARTBEAT)]
        await asyncio.sleep(1)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(all_at_once())
    assert waiting.count(f"{node.node_id} {fleet_api.PUSH_OBJECT}") == 8
    assert waiting.count(f"{other.node_id} {fleet_api.PUSH_OBJECT}") == 1
    assert waiting.count(f"{node.node_id} {fleet_api.HEARTBEAT}") == 1


# ---- pushed messages


def of_metadata(**values: Any) -> Change:
    """Changes metadata of the pushed message."""

    def change(_: World, push: PushMessagesRequest) -> None:
        for key, value in values.items():
            setattr(push.messages_list[0].metadata, key, value)

    return change


def with_tree(tree: Callable[[ObjectTree], ObjectTree]) -> Change:
    """Changes the pushed object tree."""
    return lambda _, push: push.message_object_trees[0].CopyFrom(tree(push.message_object_trees[0]))


def deep(levels: int) -> Callable[[ObjectTree], ObjectTree]:
    """A tree of so many levels below the same root."""

    def make(root: ObjectTree) -> ObjectTree:
        tree = ObjectTree(object_id=f"d{levels:063x}")
        for level in range(levels - 2, 0, -1):
            tree = ObjectTree(object_id=f"d{level:063x}", children=[tree])
        return ObjectTree(object_id=root.object_id, children=[tree])

    return make


def wide(objects: int) -> Callable[[ObjectTree], ObjectTree]:
    """A tree of so many objects below the same root."""
    return lambda root: ObjectTree(
        object_id=root.object_id,
        children=[ObjectTree(object_id=f"{index:064x}") for index in range(objects - 1)],
    )


def child(name: str) -> Callable[[ObjectTree], ObjectTree]:
    """A tree with one child."""
    return lambda root: ObjectTree(object_id=root.object_id, children=[ObjectTree(object_id=name)])


def names_anothers(world: World, push: PushMessagesRequest) -> None:
    """An object that has the name of another node's instruction: it would be deleted with the reply."""
    asked = world.instruct(world.nodes[1], kind="train.named")
    push.message_object_trees[0].CopyFrom(
        child(asked.metadata.message_id)(push.message_object_trees[0])
    )


def answers_anothers(world: World, push: PushMessagesRequest) -> None:
    """An answer to what another node was asked."""
    asked = world.instruct(world.nodes[1], kind="train.other")
    push.messages_list[0].metadata.reply_to_message_id = asked.metadata.message_id


def takes_anothers_name(world: World, push: PushMessagesRequest) -> None:
    """A reply under the name of another node's reply: its upload would take the other's place."""
    other = world.nodes[1]
    made = other.reply(world.instruct(other, kind="train.taken"))
    accepted(other.send("push-messages", other.push(made)))
    push.messages_list[0].metadata.message_id = made.metadata.message_id
    push.message_object_trees[0].object_id = made.metadata.message_id


TOO_MANY = fleet_api.most_objects(MESSAGE_MB) + 1
PUSHES: dict[str, tuple[Change, int, str]] = {
    "two messages": (
        lambda _, push: push.messages_list.append(push.messages_list[0]),
        400,
        "one message",
    ),
    "no message": (lambda _, push: push.ClearField("messages_list"), 400, "one message"),
    "two trees": (
        lambda _, push: push.message_object_trees.append(push.message_object_trees[0]),
        *(400, "one object tree"),
    ),
    "no tree": (lambda _, push: push.ClearField("message_object_trees"), 400, "one object tree"),
    "another's request": (
        lambda world, push: push.node.CopyFrom(Node(node_id=world.nodes[1].node_id)),
        *(400, "node.node_id"),
    ),
    "another's name": (
        lambda world, push: of_metadata(src_node_id=world.nodes[1].node_id)(world, push),
        *(400, "src_node_id"),
    ),
    "the server's name": (of_metadata(src_node_id=1), 400, "src_node_id"),
    "to another node": (
        lambda world, push: of_metadata(dst_node_id=world.nodes[1].node_id)(world, push),
        *(400, "dst_node_id"),
    ),
    "an instruction": (of_metadata(reply_to_message_id=""), 400, "not instructions"),
    "to nothing": (of_metadata(reply_to_message_id="0" * 64), 403, "reply_to_message_id"),
    "to another's": (answers_anothers, 403, "reply_to_message_id"),
    "another run": (of_metadata(run_id=5), 403, "reply_to_message_id"),
    "created never": (of_metadata(created_at=math.nan), 400, "finite"),
    "created at infinity": (of_metadata(created_at=-math.inf), 400, "finite"),
    "ttl nan": (of_metadata(ttl=math.nan), 400, "finite"),
    "ttl infinite": (of_metadata(ttl=math.inf), 400, "finite"),
    "ttl overflows": (of_metadata(ttl=1e308, created_at=1.7e308), 400, "finite"),
    "ttl zero": (of_metadata(ttl=0.0), 400, "positive"),
    "ttl negative": (of_metadata(ttl=-1.0), 400, "positive"),
    "ttl longer": (of_metadata(ttl=601.0), 400, "ttl is larger"),
    "another type": (of_metadata(message_type="evaluate"), 400, "message_type"),
    "another group": (of_metadata(group_id="x"), 400, "group_id"),
    "another root": (of_metadata(message_id="0" * 64), 400, "root"),
    "too many objects": (with_tree(wide(TOO_MANY)), 400, "objects"),
    "too deep": (with_tree(deep(6)), 400, "deeper"),
    "no hash": (with_tree(child("x" * 64)), 400, "SHA-256"),
    "an odd hash": (with_tree(child(" " + "0" * 63)), 400, "SHA-256"),
    "a child twice": (
        with_tree(
            lambda root: ObjectTree(
                object_id=root.object_id, children=[ObjectTree(object_id="1" * 64)] * 2
            )
        ),
        *(400, "twice"),
    ),
    "names another's instruction": (names_anothers, 400, "another message's name"),
    "takes another's name": (takes_anothers_name, 400, "another message's name"),
    "content and an error": (
        lambda _, push: push.messages_list[0].error.CopyFrom(type(push.messages_list[0].error)(code=1)),
        *(400, "content or an error"),
    ),
    "neither": (
        lambda _, push: push.messages_list[0].ClearField("content"),
        400,
        "content or an error",
    ),
    "content inside": (
        lambda world, push: push.messages_list[0].content.CopyFrom(full_content(world)),
        *(400, "objects"),
    ),
    "runtime nan": (
        lambda _, push: push.clientapp_runtime_list.__setitem__(0, math.nan),
        *(400, "runtime"),
    ),
    "two runtimes": (lambda _, push: push.clientapp_runtime_list.append(1.0), 400, "runtime"),
}


def full_content(world: World) -> Any:
    """Content in the message itself."""
    from flwr.common.serde import recorddict_to_proto

    return recorddict_to_proto(RecordDict({"a": ConfigRecord({"a": world.run % 7})}))


@pytest.mark.parametrize("name", PUSHES)
def test_a_pushed_message_keeps_each_rule(world: World, name: str) -> None:
    """One rule is broken: refused, and nothing is stored; the same message without the change is taken."""
    change, status, word = PUSHES[name]
    node = world.nodes[0]
    made = node.reply(world.instruct(node, kind=f"train.rule{list(PUSHES).index(name)}"))
    wrong = node.push(made)
    change(world, wrong)
    before = world.counts
    refused(node.send("push-messages", wrong), status, word)
    assert world.counts == before
    found = PushMessagesResponse.FromString(accepted(node.send("push-messages", node.push(made))))
    assert found.session_id
    assert len(found.objects_to_push) >= 1
    assert world.counts == (before[0], before[1] + 1)


def test_the_largest_allowed_tree_is_taken(world: World) -> None:
    """A reply may have as many objects and levels as the bound says."""
    node = world.nodes[0]
    for index, change in enumerate((wide(TOO_MANY - 1), deep(5))):
        push = node.push(node.reply(world.instruct(node, kind=f"train.large{index}")))
        with_tree(change)(world, push)
        accepted(node.send("push-messages", push))


def test_an_error_has_a_short_reason(world: World) -> None:
    """A reason of a kibibyte is taken, a longer one is not."""
    node = world.nodes[0]
    for letters, is_taken in ((1025, False), (1024, True)):
        asked = world.instruct(node, kind=f"train.error{letters}")
        push = node.push(answer_to(asked, node.node_id, Error(code=7, reason="x" * letters)))
        if is_taken:
            accepted(node.send("push-messages", push))
        else:
            refused(node.send("push-messages", push), 400, "reason")


def test_what_is_no_message_is_refused(world: World) -> None:
    """Bytes that are no protobuf message do not reach Flower."""
    node = world.nodes[0]
    answer = world.post(fleet_api.PUSH_MESSAGES, b"\xff" * 50, node.headers())
    refused(answer, 400, "parsed")
    assert "connection" not in answer.headers


def test_three_thousand_objects_are_not_even_read(world: World) -> None:
    """A tree that would lock the database for most of a minute is beyond the body's bound."""
    node = world.nodes[0]
    push = node.push(node.reply(world.instruct(node, kind="train.thousands")))
    with_tree(wide(3000))(world, push)
    refused(node.send("push-messages", push), 413, "bytes")


# ---- objects


def uploading(world: World, node: Sender, mib: float, kind: str) -> tuple[Message, list[Any]]:
    """A reply with an array that was announced, and its pieces."""
    made = answer_to(world.instruct(node, kind=kind), node.node_id, arrays(mib))
    found = PushMessagesResponse.FromString(accepted(node.send("push-messages", node.push(made))))
    return made, node.pieces(made, found.session_id)


def test_a_reply_is_stored_whole(world: World) -> None:
    """An honest reply of 6 MiB passes piece by piece, and Flower has all of it."""
    node = world.nodes[0]
    made, pieces = uploading(world, node, 6, "train.whole")
    assert len(pieces) == 6
    for piece in pieces:
        assert PushObjectResponse.FromString(accepted(node.send("push-object", piece))).stored
    for name, each in get_all_nested_objects(made).items():
        assert world.state.get_object(world.run, name) == each.deflate()


def test_a_piece_belongs_to_an_upload_of_its_node(world: World) -> None:
    """No session, an unknown one, another node's, or another run: refused; its own: stored."""
    node, other = world.nodes
    made, pieces = uploading(world, node, 0.1, "train.session")
    (mine,) = (piece for piece in pieces if piece.object_id == made.metadata.message_id)
    theirs = uploading(world, other, 0.2, "train.session")[1][0]
    for key, value in [("session_id", ""), ("session_id", "x"), ("run_id", 5)]:
        wrong = type(mine)()
        wrong.CopyFrom(mine)
        setattr(wrong, key, value)
        refused(node.send("push-object", wrong), 400, "session_id")
    wrong = type(mine)()
    wrong.CopyFrom(theirs)
    wrong.node.node_id = node.node_id
    refused(node.send("push-object", wrong), 400, "session_id")
    assert PushObjectResponse.FromString(accepted(node.send("push-object", mine))).stored


NO_HASHES = {
    "empty": "",
    "large": "x" * MIB,
    "capitals": "A" * 64,
    "short": "0" * 63,
    "line": "0" * 64 + "\n",
}


@pytest.mark.parametrize("kind", NO_HASHES)
def test_a_piece_is_named_by_a_hash(world: World, kind: str) -> None:
    """The guard keeps the names of pieces, and Flower logs them: a node's own words are not a name."""
    node = world.nodes[0]
    made, pieces = uploading(world, node, 0.1, f"train.named_{kind}")
    pieces[0].object_id = NO_HASHES[kind]
    refused(node.send("push-object", pieces[0]), 400, "object_id is not a SHA-256")
    assert not world.guard._rules._pieces.get(made.metadata.message_id)


def test_an_upload_goes_on_when_its_outline_was_fetched(world: World) -> None:
    """The server's side of a run may take a reply's outline, and its row, before the pieces have come."""
    node, other = world.nodes
    made, pieces = uploading(world, node, 0.3, "train.fetched")
    assert world.state.get_message_res({made.metadata.reply_to_message_id}, world.run)
    world.state.delete_messages({made.metadata.reply_to_message_id})
    for piece in pieces:
        piece.node.node_id = other.node_id
        refused(other.send("push-object", piece), 400, "session_id")
        piece.node.node_id = node.node_id
        accepted(node.send("push-object", piece))
        accepted(node.send("push-object", piece))  # the connection broke: sent again
    for name, each in get_all_nested_objects(made).items():
        assert world.state.get_object(world.run, name) == each.deflate()


def test_an_upload_goes_on_after_a_restart(world: World) -> None:
    """A guard that was started anew takes the pieces of an upload that began before, of one node alone."""
    node, other = world.nodes
    _, pieces = uploading(world, node, 0.4, "train.restarted")
    world.guard._rules._sessions.clear()
    accepted(node.send("push-object", pieces[0]))
    pieces[1].node.node_id = other.node_id
    refused(other.send("push-object", pieces[1]), 400, "session_id")


def test_a_reply_is_at_most_message_mb(world: World) -> None:
    """The piece with which a reply would pass message_mb is refused; the ones before it count once."""
    node = world.nodes[0]
    _, pieces = uploading(world, node, 9.5, "train.large")
    large = [piece for piece in pieces if len(piece.object_content) > MIB]
    assert len(large) == 2
    accepted(node.send("push-object", large[0]))
    accepted(node.send("push-object", large[0]))  # the connection broke: sent again
    refused(node.send("push-object", large[1]), 400, "message_mb=8")


def test_a_node_pulls_what_it_was_sent(world: World) -> None:
    """A piece of an instruction is given to the node that it is for, and of a shared one to both."""
    node, other = world.nodes
    asked = world.instruct(node, RecordDict({"a": ConfigRecord({"own": 1})}), "train.pull")
    own = list(get_all_nested_objects(asked))
    shared = [world.instruct(each, arrays(0.1), "train.shared") for each in world.nodes]
    common = set(get_all_nested_objects(shared[0])) & set(get_all_nested_objects(shared[1]))
    assert len(common) == 4  # content, record, array, piece

    def pull(sender: Sender, name: str, run: int = world.run) -> httpx.Response:
        request = PullObjectRequest(node=Node(node_id=sender.node_id), run_id=run, object_id=name)
        return sender.send("pull-object", request)

    for name in own:
        assert PullObjectResponse.FromString(accepted(pull(node, name))).object_available
        refused(pull(other, name), 403, "object_id")
    refused(pull(node, own[0], 5), 403, "object_id")
    refused(pull(node, "0" * 64), 403, "object_id")
    for name in common:
        for sender in world.nodes:
            assert PullObjectResponse.FromString(accepted(pull(sender, name))).object_available


def test_a_node_confirms_what_it_was_sent(world: World) -> None:
    """Confirming deletes: another node's instruction, a reply or a piece stays; one's own goes."""
    node, other = world.nodes
    asked = world.instruct(node, kind="train.confirm")
    made, pieces = uploading(world, node, 0.1, "train.confirmed")
    for piece in pieces:
        accepted(node.send("push-object", piece))

    def confirm(sender: Sender, name: str) -> httpx.Response:
        return sender.send(
            "confirm-message-received",
            ConfirmMessageReceivedRequest(
                node=Node(node_id=sender.node_id), run_id=world.run, message_object_id=name
            ),
        )

    for name in (asked.metadata.message_id, made.metadata.message_id, pieces[0].object_id):
        refused(confirm(other, name), 403, "message_object_id")
        assert name in world.state.object_store
    refused(confirm(node, made.metadata.message_id), 403, "message_object_id")
    accepted(confirm(node, asked.metadata.message_id))
    assert asked.metadata.message_id not in world.state.object_store


def test_an_instruction_is_not_confirmed_before_it_has_come(world: World) -> None:
    """Confirming deletes what the server is still uploading, and would end that upload for all nodes."""
    (node, *_), content = world.nodes, RecordDict({"request": ConfigRecord({"early": 1})})
    asked = world.instruct(node, content, kind="train.early", uploads=False)
    request = ConfirmMessageReceivedRequest(
        node=Node(node_id=node.node_id),
        run_id=world.run,
        message_object_id=asked.metadata.message_id,
    )
    refused(node.send("confirm-message-received", request), 400, "when all of it has come")
    assert asked.metadata.message_id in world.state.object_store


def test_a_reply_is_announced_a_few_times(world: World) -> None:
    """A broken connection is tried again; announcing without end, which locks the database, is refused."""
    (node, *_), content = world.nodes, RecordDict({"request": ConfigRecord({"often": 1})})
    asked = world.instruct(node, content, kind="train.often")
    push = node.push(node.reply(asked, often=1))
    for _ in range(16):
        accepted(node.send("push-messages", push))
    refused(node.send("push-messages", push), 429, "at most 16 times")


@pytest.mark.parametrize("name", ["", "\x1b]0;owned\x07", "A" * 64, "0" * 63])
def test_a_bundle_is_asked_for_by_its_hash(world: World, name: str) -> None:
    """Flower logs what was asked for: nothing of a node's own words gets there."""
    (node, *_) = world.nodes
    request = GetFabRequest(node=Node(node_id=node.node_id), hash_str=name, run_id=world.run)
    refused(node.send("get-fab", request), 400, "not a SHA-256")


def test_an_instruction_is_pulled_as_it_was(world: World) -> None:
    """What passes is Flower's own answer, byte by byte as without the guard."""
    sender = world.add_node()
    asked = world.instruct(sender, kind="train.pulled")
    request = PullMessagesRequest(node=Node(node_id=sender.node_id))
    found = PullMessagesResponse.FromString(accepted(sender.send("pull-messages", request)))
    assert found.message_object_trees[0].object_id == asked.metadata.message_id
    world.nodes.remove(sender)


def test_an_instruction_whose_outline_was_lost_is_given_again(world: World) -> None:
    """Flower gives an outline once: if nobody heard it, the node's next questions get it again, twice."""
    sender, other = world.add_node(), world.add_node()
    request = PullMessagesRequest(node=Node(node_id=sender.node_id))

    def pulled() -> list[str]:
        found = PullMessagesResponse.FromString(accepted(sender.send("pull-messages", request)))
        return [tree.object_id for tree in found.message_object_trees]

    lost = world.instruct(sender, kind="train.lost").metadata.message_id
    given = world.instruct(other, kind="train.given").metadata.message_id
    assert [pulled() for _ in range(4)] == [[lost], [lost], [lost], []]
    theirs = PullMessagesRequest(node=Node(node_id=other.node_id))
    answer = PullMessagesResponse.FromString(accepted(other.send("pull-messages", theirs)))
    assert [tree.object_id for tree in answer.message_object_trees] == [given]
    confirmed, answered = (world.instruct(sender, kind=f"train.{kind}") for kind in ("done", "said"))
    assert pulled() == [confirmed.metadata.message_id]
    word = ConfirmMessageReceivedRequest(
        node=Node(node_id=sender.node_id),
        run_id=world.run,
        message_object_id=confirmed.metadata.message_id,
    )
    accepted(sender.send("confirm-message-received", word))
    assert pulled() == [answered.metadata.message_id]
    accepted(sender.send("push-messages", sender.push(sender.reply(answered, said=1))))
    assert pulled() == []
    world.nodes.remove(sender)
    world.nodes.remove(other)


def test_flower_is_not_asked_when_nothing_waits(world: World) -> None:
    """The answer is Flower's, byte by byte; an instruction waits if it is new, good and uploaded."""
    sender, other = world.add_node(), world.add_node()
    request = PullMessagesRequest(node=Node(node_id=sender.node_id)).SerializeToString()
    reached: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["path"])
        await world.guard._app(scope, receive, send)

    guard = Guard(app, world.guard._records, MESSAGE_MB)

    def asked(before: Any) -> httpx.Response:
        shown = World(before, world.state, world.run, world.task)
        return shown.post(fleet_api.PULL_MESSAGES, request, sender.headers())

    ours, flowers = asked(guard), asked(world.guard._app)
    assert not reached
    assert (ours.status_code, ours.content) == (flowers.status_code, flowers.content) == (200, b"")
    assert dict(ours.headers) == dict(flowers.headers)
    world.instruct(other, kind="train.other")
    expired = world.instruct(sender, kind="train.old").metadata.message_id
    world.state.query("UPDATE message_ins SET ttl = 0 WHERE message_id = :id", {"id": expired})
    content = RecordDict({"request": ConfigRecord({"still": "uploaded"})})
    world.instruct(sender, content, kind="train.waits", uploads=False)
    assert accepted(asked(guard)) == b""
    assert not reached
    late = {"then": time.time() - 181.0}
    world.state.query("UPDATE message_ins SET created_at = :then", late)
    assert accepted(asked(guard)) != b""  # its sender has gone: others must not wait behind it
    assert reached == [fleet_api.PULL_MESSAGES]
    reached.clear()
    world.state.query("UPDATE message_ins SET ttl = 0", {})
    world.instruct(sender, content, kind="train.waits_too", uploads=False)
    assert accepted(asked(guard)) == b""
    world.state.query("UPDATE objects SET is_available = 1", {})
    assert accepted(asked(guard)) != b""
    assert reached == [fleet_api.PULL_MESSAGES]
    world.nodes.remove(sender)
    world.nodes.remove(other)


# ---- the guard itself


def test_a_guard_that_fails_lets_nothing_through(world: World) -> None:
    """If the database cannot be asked, the request does not reach Flower."""
    reached = threading.Event()

    class Broken:
        def get_node_id_by_public_key(self, key: bytes) -> int:
            raise sqlite3.OperationalError("database is locked")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.set()

    from fedslm.deployment.guard_records import Records

    with pytest.raises(sqlite3.OperationalError):
        call(Guard(app, Records(Broken()), 8), world.nodes[0], Counted())
    assert not reached.is_set()


def test_refusals_are_logged_sparsely(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """A refusal names the node once in ten seconds, however often it comes."""
    sender = world.add_node()
    with caplog.at_level(logging.WARNING, "fedslm"):
        for _ in range(20):
            refused(world.post(fleet_api.PUSH_MESSAGES, b"\xff", sender.headers()), 400, "parsed")
    lines = [record.getMessage() for record in caplog.records if "parsed" in record.getMessage()]
    assert len(lines) == 1
    assert f"node {sender.node_id}" in lines[0]
    world.nodes.remove(sender)


@pytest.mark.parametrize("missing", ["object_push_session_roots", "message_res", "object_children"])
def test_another_flower_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    """A database that is not as the guard knows it: the SuperLink does not start, and the version is named."""
    app = application(tmp_path, monkeypatch)
    guarded(app, 8)
    with sqlite3.connect(tmp_path / "state" / "superlink.db") as database:
        database.execute(f"DROP TABLE {missing}")
    with pytest.raises(
        RunError, match=f"flwr {flwr.__version__} is not as the guard knows it: .*{missing}"
    ):
        guarded(app, 8)


def test_another_path_of_flower_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Fleet API with a path that nobody has looked at: the SuperLink does not start."""
    app = application(tmp_path, monkeypatch)
    monkeypatch.setitem(PROTOBUF_REQUEST_TYPES, ("POST", "/v1/fleet/new"), PushMessagesRequest)
    with pytest.raises(RunError, match=r"not as the guard knows it: its Fleet API has the paths .*new"):
        guarded(app, 8)
