"""Somebody who speaks Flower's Fleet API by hand: what an honest node sends, to be changed by tests."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import httpx
import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.app.metadata import Metadata
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message

Post = Callable[[str, bytes, Mapping[str, str]], httpx.Response]
MIB = 1 << 20


@dataclass
class Sender:
    """A node's key, and a way to the SuperLink.

    Attributes:
        key: Its private key.
        node_id: Its number.
        post: Sends (path, body, headers).
    """

    key: ec.EllipticCurvePrivateKey
    node_id: int
    post: Post

    def headers(self, seconds: float = 0.0) -> dict[str, str]:
        """What proves the key: the time, so many seconds from now, signed."""
        stamp = (now() + timedelta(seconds=seconds)).isoformat()
        return {
            "flwr-public-key": b64encode(public_key_to_bytes(self.key.public_key())).decode(),
            "flwr-timestamp": stamp,
            "flwr-signature": b64encode(sign_message(self.key, stamp.encode())).decode(),
            "content-type": "application/protobuf",
        }

    def send(self, name: str, request: Any) -> httpx.Response:
        """Sends a protobuf message to a path of the Fleet API."""
        return self.post(f"/v1/fleet/{name}", request.SerializeToString(), self.headers())

    def reply(self, to: Message, **config: int) -> Message:
        """An answer to an instruction."""
        return answer_to(
            to, self.node_id, RecordDict({"reply": ConfigRecord(dict(config or {"a": 1}))})
        )

    def push(self, message: Message) -> PushMessagesRequest:
        """How a node announces a message."""
        return PushMessagesRequest(
            node=Node(node_id=self.node_id),
            messages_list=[message_to_proto(remove_content_from_message(message))],
            message_object_trees=[get_object_tree(message)],
            clientapp_runtime_list=[0.0],
        )

    def pieces(self, message: Message, session: str) -> list[PushObjectRequest]:
        """How a node sends a message's objects."""
        return [
            PushObjectRequest(
                node=Node(node_id=self.node_id),
                run_id=message.metadata.run_id,
                session_id=session,
                object_id=name,
                object_content=each.deflate(),
            )
            for name, each in get_all_nested_objects(message).items()
        ]


def instruction(run: int, node: int, content: RecordDict, kind: str = "train") -> Message:
    """What a server asks a node."""
    return _named(_metadata(run, 1, node, "", kind), content)


def answer_to(to: Message, sender: int, content: RecordDict | Error) -> Message:
    """What a node answers, as Flower's own client makes it."""
    asked = to.metadata
    metadata = _metadata(asked.run_id, sender, 1, asked.message_id, asked.message_type)
    metadata.__dict__["_group_id"] = asked.group_id
    metadata.ttl = asked.created_at + asked.ttl - metadata.created_at
    return _named(metadata, content)


def arrays(mib: float) -> RecordDict:
    """Content with one array of a size."""
    values = np.random.default_rng(0).integers(0, 255, int(mib * MIB), dtype=np.uint8)
    return RecordDict({"delta": ArrayRecord([values])})


def _metadata(run: int, source: int, target: int, reply_to: str, kind: str) -> Metadata:
    return Metadata(
        run_id=run,
        message_id="",
        src_node_id=source,
        dst_node_id=target,
        reply_to_message_id=reply_to,
        group_id="",
        created_at=now().timestamp(),
        ttl=600.0,
        message_type=kind,
    )


def _named(metadata: Metadata, content: RecordDict | Error) -> Message:
    """A message with the name that its content gives it."""
    is_error = isinstance(content, Error)
    made = make_message(
        metadata, content=None if is_error else content, error=content if is_error else None
    )
    made.metadata.__dict__["_message_id"] = made.object_id
    return made
