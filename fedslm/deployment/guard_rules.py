"""Rules on a node's requests to the SuperLink, given one parsed request and the SuperLink's database.

Flower's Fleet API knows who sent a request, and trusts the content of the request. These rules check
the content against the SuperLink's stored records.

Formal guarantees, for a request of node n that passes (``tests/deployment/test_guard.py`` has a refused
and a passing case of each):

- A pushed message is one reply from n to the server, to an instruction that is stored for n in the same
  run, of that instruction's type and group; it ends no later than the instruction, and its times are
  finite numbers.
- Its tree has at most ``fleet_api.most_objects`` objects, five levels, and hexadecimal SHA-256 names;
  none of them is the name of an instruction, or of another node's reply.
- An object is pushed under a SHA-256 (names are kept and logged), into a session that was opened for a
  reply of n. A session from before the guard's start is assigned to whoever names it first; its name is
  a secret of 122 random bits. The objects of one reply have at most ``message_mb`` MiB together, as
  counted since the guard started.
- An object is pulled only if an instruction for n, in the run that the request names, contains it. Only
  an instruction for n, all of which has been uploaded, is confirmed: confirming deletes it.
- A reply is announced at most 16 times; a bundle is requested by its hash.
- A node that requests the next instruction gets one again, at most twice, that was delivered to it and
  that it neither confirmed nor answered: its outline was lost when a connection or the SuperLink broke.
"""

from __future__ import annotations

import math
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedslm.deployment import fleet_api
from fedslm.deployment.guard_records import Records

_SERVER = 1  # Flower's number of the SuperLink
_REASON_BYTES, _TOLERANCE_SECONDS, _LONGEST_RUNTIME = 1024, 0.1, 1e9
_COUNTED_REPLIES, _KNOWN_SESSIONS, _MOST_ANNOUNCEMENTS, _MOST_AGAIN = 512, 4096, 16, 2
_NAME = re.compile(r"[0-9a-f]{64}")
RULED = (
    *(fleet_api.PULL_MESSAGES, fleet_api.PUSH_MESSAGES, fleet_api.PUSH_OBJECT),
    *(fleet_api.PULL_OBJECT, fleet_api.CONFIRM, fleet_api.GET_BUNDLE),
)
"""Paths whose requests name more than the node itself, which Flower holds against the key, or have a
rule of their own."""


class Refused(Exception):
    """A request that does not reach Flower.

    Args:
        status: The answer's HTTP status. 403 means to a node that its run is over, and 401 that it is
            not admitted: it exits.
        reason: One line.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


@dataclass
class Rules:
    """The rules, and counts of how much of each reply has arrived.

    Attributes:
        records: The SuperLink's stored records.
        message_mb: Largest reply, in MiB.
    """

    records: Records
    message_mb: int
    _sessions: OrderedDict[str, tuple[int, int, str]] = field(default_factory=OrderedDict)
    _pieces: OrderedDict[str, dict[str, int]] = field(default_factory=OrderedDict)
    _announcements: OrderedDict[str, int] = field(default_factory=OrderedDict)
    _given: OrderedDict[str, int] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def check(self, path: str, body: bytes, node: int) -> None:
        """Checks a request against the rules of its path.

        Args:
            path: One of ``fleet_api.PATHS``.
            body: The protobuf message, no longer than ``fleet_api.most_bytes`` allows.
            node: The sender, identified by its key.

        Raises:
            Refused: It breaks a rule; the reason names the problem.
        """
        if path not in RULED:
            return
        kind, rule = _rules(self)[path]
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

        try:
            request = kind.FromString(body)
        except DecodeError as error:
            raise Refused(400, "the request cannot be parsed") from error
        _require(request.node.node_id == node, "node.node_id is not the node whose key signed")
        rule(request, node)

    def pushed_message(self, request: Any, node: int) -> None:
        """Checks a reply's outline, and the names of its objects.

        Raises:
            Refused: It is not a reply, or not this node's.
        """
        _require(len(request.messages_list) == 1, "one message is pushed at a time")
        _require(len(request.message_object_trees) == 1, "a message has one object tree")
        _require(
            len(request.clientapp_runtime_list) <= 1
            and all(0 <= each <= _LONGEST_RUNTIME for each in request.clientapp_runtime_list),
            "clientapp_runtime is one number of seconds",
        )
        message, tree = request.messages_list[0], request.message_object_trees[0]
        metadata = message.metadata
        _require(metadata.src_node_id == node, "metadata.src_node_id is another node's")
        _require(metadata.dst_node_id == _SERVER, "metadata.dst_node_id is not the server")
        _require(metadata.reply_to_message_id != "", "a node sends replies, not instructions")
        _check_outline(message)
        names = _names_of(tree, fleet_api.most_objects(self.message_mb))
        _require(metadata.message_id == tree.object_id, "metadata.message_id is not its tree's root")
        self._check_against_instruction(metadata, node)
        with self._lock:
            uploaded = {root for owner, _, root in self._sessions.values() if owner != node}
        is_free = uploaded.isdisjoint(names) and not self.records.are_of_others(names, node)
        _require(is_free, "an object has another message's name")
        # each announcement locks the database for a while
        if self._times(self._announcements, metadata.reply_to_message_id) > _MOST_ANNOUNCEMENTS:
            raise Refused(429, f"a reply is announced at most {_MOST_ANNOUNCEMENTS} times")

    def asked_message(self, request: Any, node: int) -> None:
        """Handles a request for the next instruction: the node is done with the last one."""
        for message in self.records.given(node):
            if self._times(self._given, message) <= _MOST_AGAIN:
                self.records.give_again(message)

    def _times(self, counts: OrderedDict[str, int], instruction: str) -> int:
        """Counts how often an event has happened to an instruction, this time included."""
        with self._lock:
            count = counts.pop(instruction, 0) + 1
            counts[instruction] = count
            while len(counts) > _KNOWN_SESSIONS:
                counts.popitem(last=False)
        return count

    def pushed_object(self, request: Any, node: int) -> None:
        """Checks a piece of a reply.

        Raises:
            Refused: Its session is not one of this node's replies, or the reply is too large.
        """
        _require(_NAME.fullmatch(request.object_id) is not None, "object_id is not a SHA-256")
        known = self._sessions.get(request.session_id)
        if known is None and (found := self.records.session(request.session_id)) is not None:
            known = (node, _unsigned(found["run_id"]), str(found["root"]))
            self._remember(request.session_id, known)
        if known is None or known[:2] != (node, request.run_id):
            raise Refused(400, "session_id is not that of an upload of this node in this run")
        self._count(known[2], request.object_id, len(request.object_content))

    def opened(self, body: bytes, answer: bytes, node: int) -> None:
        """Records the owner of an upload session, which Flower's database does not contain.

        Args:
            body: The pushed message, as it passed.
            answer: Flower's answer to it.
            node: The node that pushed it.
        """
        from flwr.proto.fleet_pb2 import PushMessagesRequest, PushMessagesResponse

        request, found = PushMessagesRequest.FromString(body), PushMessagesResponse.FromString(answer)
        if found.session_id:
            run, root = (
                request.messages_list[0].metadata.run_id,
                request.message_object_trees[0].object_id,
            )
            self._remember(found.session_id, (node, run, root))

    def _remember(self, session: str, value: tuple[int, int, str]) -> None:
        """Keeps the latest sessions."""
        with self._lock:
            self._sessions[session] = value
            while len(self._sessions) > _KNOWN_SESSIONS:
                self._sessions.popitem(last=False)

    def pulled_object(self, request: Any, node: int) -> None:
        """Checks a request for a piece of an instruction.

        Raises:
            Refused: No instruction for this node contains it.
        """
        if not self.records.may_pull(node, request.run_id, request.object_id):
            raise Refused(403, "object_id is in no instruction for this node in this run")

    def confirmed(self, request: Any, node: int) -> None:
        """Checks a confirmation that an instruction has arrived; it is deleted then.

        Raises:
            Refused: It is not for this node.
        """
        found = self.records.instruction(request.message_object_id)
        if not _is_for(found, node, request.run_id):
            raise Refused(403, "message_object_id is not an instruction for this node in this run")
        is_whole = not self.records.lacks_objects(request.message_object_id)
        _require(is_whole, "an instruction is confirmed when all of it has come")

    def asked_bundle(self, request: Any, node: int) -> None:
        """Checks a request for an application bundle.

        Raises:
            Refused: It does not name one by its hash.
        """
        _require(_NAME.fullmatch(request.hash_str) is not None, "hash_str is not a SHA-256")

    def _check_against_instruction(self, metadata: Any, node: int) -> None:
        """Refuses a message that is not an answer to a stored instruction for this node."""
        found = self.records.instruction(metadata.reply_to_message_id)
        if found is None or not _is_for(found, node, metadata.run_id):
            raise Refused(403, "reply_to_message_id is not an instruction for this node in this run")
        times = (metadata.created_at, metadata.ttl, metadata.created_at + metadata.ttl)
        _require(all(map(math.isfinite, times)), "created_at and ttl must be finite")
        _require(metadata.ttl > 0 and metadata.created_at > 0, "created_at and ttl must be positive")
        latest = found["created_at"] + found["ttl"] + _TOLERANCE_SECONDS
        _require(times[2] <= latest, "ttl is larger than the instruction leaves")
        for key in ("message_type", "group_id"):
            _require(getattr(metadata, key) == found[key], f"{key} is not the instruction's")

    def _count(self, reply: str, name: str, size: int) -> None:
        """Counts a reply's objects; one that is sent again counts only once."""
        with self._lock:
            pieces = self._pieces.setdefault(reply, {})
            self._pieces.move_to_end(reply)
            while len(self._pieces) > _COUNTED_REPLIES:
                self._pieces.popitem(last=False)
            total = sum(pieces.values()) - pieces.get(name, 0) + size
            _require(
                total <= self.message_mb * fleet_api.MIB,
                f"the reply has more than message_mb={self.message_mb} MiB",
            )
            _require(
                name in pieces or len(pieces) < fleet_api.most_objects(self.message_mb),
                "the reply has more objects than it declared",
            )
            pieces[name] = size


def _rules(rules: Rules) -> dict[str, tuple[Any, Callable[[Any, int], None]]]:
    """Request type and rule of each of ``RULED``."""
    from flwr.proto.fab_pb2 import GetFabRequest
    from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest
    from flwr.proto.message_pb2 import (
        ConfirmMessageReceivedRequest,
        PullObjectRequest,
        PushObjectRequest,
    )

    return {
        fleet_api.PULL_MESSAGES: (PullMessagesRequest, rules.asked_message),
        fleet_api.PUSH_MESSAGES: (PushMessagesRequest, rules.pushed_message),
        fleet_api.PUSH_OBJECT: (PushObjectRequest, rules.pushed_object),
        fleet_api.PULL_OBJECT: (PullObjectRequest, rules.pulled_object),
        fleet_api.CONFIRM: (ConfirmMessageReceivedRequest, rules.confirmed),
        fleet_api.GET_BUNDLE: (GetFabRequest, rules.asked_bundle),
    }


def _check_outline(message: Any) -> None:
    """Refuses a message that is not an outline, or does not have exactly one of content and error."""
    is_error = message.HasField("error")
    _require(is_error != message.HasField("content"), "a message has content or an error")
    _require(message.content.ByteSize() == 0, "content belongs into the message's objects")
    length = len(message.error.reason.encode(errors="replace"))
    _require(length <= _REASON_BYTES, f"error.reason has more than {_REASON_BYTES} bytes")


def _names_of(tree: Any, most: int) -> list[str]:
    """The names in an object tree; stops when there are too many."""
    names, waiting = [], [(tree, 1)]
    while waiting:
        node, depth = waiting.pop()
        names.append(node.object_id)
        _require(len(names) + len(waiting) + len(node.children) <= most, f"more than {most} objects")
        _require(depth <= fleet_api.DEEPEST, f"an object tree deeper than {fleet_api.DEEPEST}")
        _require(_NAME.fullmatch(node.object_id) is not None, "an object's name is not a SHA-256")
        children = {child.object_id for child in node.children}
        _require(len(children) == len(node.children), "an object has one child twice")
        waiting.extend((child, depth + 1) for child in node.children)
    return names


def _is_for(found: Mapping[str, Any] | None, node: int, run: int) -> bool:
    """Whether an instruction is for a node, in a run."""
    return (
        found is not None
        and _unsigned(found["dst_node_id"]) == node
        and _unsigned(found["run_id"]) == run
    )


def _require(holds: bool, reason: str) -> None:
    """Refuses a request that breaks a rule."""
    if not holds:
        raise Refused(400, reason)


def _unsigned(number: int) -> int:
    """A number in the form in which messages contain it."""
    return number % (1 << 64)
