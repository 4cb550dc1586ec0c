"""A small SuperLink: Flower's Runtime API over HTTP, with uploads that a test brings along as it likes."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from flwr.app import Message, RecordDict
from flwr.common.serde import message_to_proto
from flwr.proto import message_pb2, runtime_pb2
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.run import Run
from flwr.superlink.grid import HttpGrid

from fedslm.engines.local import LocalGrid
from fedslm.workers import InlinePool


class SuperLink:
    """What is there, and what it answers: :meth:`grid` is Flower's own grid, connected to it."""

    def __init__(self) -> None:
        self.outlines: dict[str, tuple[Any, Any]] = {}
        self.objects: dict[str, bytes] = {}
        self.expired: set[str] = set()
        self.nodes: list[int] = []
        self.calls: Counter[str] = Counter()
        self.asked: list[list[str]] = []
        self.confirmed: list[str] = []
        self.status = 200
        LocalGrid(1, InlinePool())  # tells Flower who sends
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @contextmanager
    def up(self) -> Iterator[SuperLink]:
        """Answers meanwhile."""
        self._thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()

    def grid(self) -> HttpGrid:
        """A ServerApp's grid."""
        grid = HttpGrid(f"127.0.0.1:{self.port}", insecure=True, token="t")  # noqa: S106  (of no use anywhere)
        grid.set_run(Run.create_empty(0))
        return grid

    def upload(self, reply: Message, *, most: int | None = None) -> list[str]:
        """Takes a reply's outline, and some of its objects, or all; gives the names of all objects."""
        reply.metadata.__dict__["_message_id"] = reply.object_id
        objects = {name: each.deflate() for name, each in get_all_nested_objects(reply).items()}
        outline = message_to_proto(reply)
        outline.ClearField("content")
        self.outlines[reply.metadata.reply_to_message_id] = outline, get_object_tree(reply)
        self.objects.update(dict.fromkeys(objects, b""))
        names = list(objects)[: len(objects) if most is None else most]
        self.objects.update({name: objects[name] for name in names})
        return list(objects)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        """What answers a request."""
        superlink = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["content-length"]))
                name = self.path.rsplit("/", 1)[-1].replace("-", "_")
                superlink.calls[name] += 1
                status, answer = superlink.status, b"{}"
                if status == 200:
                    answer = getattr(superlink, name)(content).SerializeToString()
                self.send_response(status)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: Any) -> None:
                """Says nothing."""

        return Handler

    def get_nodes(self, _: bytes) -> Any:
        """The nodes that are there."""
        return runtime_pb2.GetNodesResponse(nodes=[NodeInfo(node_id=node) for node in self.nodes])

    def pull_messages(self, content: bytes) -> Any:
        """Hands an outline out once, as a SuperLink does."""
        names = list(runtime_pb2.PullAppMessagesRequest.FromString(content).message_ids)
        self.asked.append(names)
        found = [self.outlines.pop(name) for name in names if name in self.outlines]
        return runtime_pb2.PullAppMessagesResponse(
            messages_list=[outline for outline, _ in found],
            message_object_trees=[tree for _, tree in found],
        )

    def pull_object(self, content: bytes) -> Any:
        """An object; empty while it is not there; unknown when its upload was given up."""
        name = message_pb2.PullObjectRequest.FromString(content).object_id
        there = None if name in self.expired else self.objects.get(name)
        return message_pb2.PullObjectResponse(
            object_found=there is not None, object_available=bool(there), object_content=there or b""
        )

    def confirm_message_received(self, content: bytes) -> Any:
        """Notes which reply may be deleted."""
        request = message_pb2.ConfirmMessageReceivedRequest.FromString(content)
        self.confirmed.append(request.message_object_id)
        return message_pb2.ConfirmMessageReceivedResponse()


def asked(number: int) -> Message:
    """A message to a node."""
    message = Message(RecordDict({}), number, "train", ttl=60.0)
    message.metadata.__dict__["_message_id"] = message.object_id
    return message
