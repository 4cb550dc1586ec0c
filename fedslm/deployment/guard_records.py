"""The guard's queries to the SuperLink's database."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_INSTRUCTION = """SELECT run_id, dst_node_id, created_at, ttl, message_type, group_id
    FROM message_ins WHERE message_id = :message"""
_OF_OTHERS = """SELECT 1 AS found FROM message_ins
    WHERE message_id IN (SELECT value FROM json_each(:names))
    UNION ALL SELECT 1 FROM message_res
    WHERE message_id IN (SELECT value FROM json_each(:names)) AND src_node_id != :node LIMIT 1"""
_SESSION = """SELECT object_push_session_roots.root_object_id AS root, object_push_sessions.run_id
    FROM object_push_sessions JOIN object_push_session_roots
    ON object_push_session_roots.session_id = object_push_sessions.session_id
    WHERE object_push_sessions.session_id = :session"""
_PULLED = """WITH RECURSIVE contained(name) AS (
        SELECT message_id FROM message_ins WHERE dst_node_id = :node AND run_id = :run
        UNION SELECT object_children.child_id FROM object_children
        JOIN contained ON object_children.parent_id = contained.name)
    SELECT 1 AS found FROM contained WHERE name = :object LIMIT 1"""
_LACKING = """WITH RECURSIVE contained(name) AS (
        SELECT :message
        UNION SELECT object_children.child_id FROM object_children
        JOIN contained ON object_children.parent_id = contained.name)
    SELECT 1 AS found FROM contained JOIN objects ON objects.object_id = contained.name
    WHERE objects.is_available = 0 LIMIT 1"""
_GIVEN = """SELECT message_id FROM message_ins
    JOIN objects ON objects.object_id = message_ins.message_id WHERE dst_node_id = :node
    AND delivered_at != '' AND created_at + ttl > :now
    AND NOT EXISTS (SELECT 1 FROM message_res WHERE reply_to_message_id = message_ins.message_id)"""
_NEXT = """SELECT message_id, created_at FROM message_ins WHERE dst_node_id = :node
    AND delivered_at = '' AND created_at + ttl > :now ORDER BY created_at, message_id LIMIT 1"""
_UPLOAD_SECONDS = 180.0  # after which Flower gives an upload up
_GIVE_AGAIN = "UPDATE message_ins SET delivered_at = '' WHERE message_id = :message"


@dataclass(frozen=True)
class Records:
    """The SuperLink's stored records; only :meth:`give_again` writes.

    Attributes:
        state: Flower's LinkState.
    """

    state: Any

    def node_of(self, key: bytes) -> int | None:
        """The number of an admitted node by its public key (PEM); None if unknown or revoked."""
        found: int | None = self.state.get_node_id_by_public_key(key)
        return found

    def instruction(self, message: str) -> Mapping[str, Any] | None:
        """A stored instruction that its sender has no answer to yet; None if there is none."""
        return self._one(_INSTRUCTION, message=message)

    def session(self, session: str) -> Mapping[str, Any] | None:
        """The run and the root object of an upload in progress."""
        return self._one(_SESSION, session=session)

    def are_of_others(self, names: list[str], node: int) -> bool:
        """Whether one of the names belongs to an instruction, or to another node's reply."""
        return (
            self._one(_OF_OTHERS, names=json.dumps(names, allow_nan=False), node=_signed(node))
            is not None
        )

    def may_pull(self, node: int, run: int, name: str) -> bool:
        """Whether an instruction for the node, in the run, contains an object."""
        found = self._one(_PULLED, node=_signed(node), run=_signed(run), object=name)
        return found is not None

    def lacks_objects(self, message: str) -> bool:
        """Whether an object of an instruction is still to be uploaded."""
        return self._one(_LACKING, message=message) is not None

    def given(self, node: int) -> list[str]:
        """Instructions that were delivered to the node, and that it neither confirmed nor answered."""
        rows = self.state.query(_GIVEN, {"node": _signed(node), "now": time.time()})
        return [str(row["message_id"]) for row in rows]

    def can_give(self, node: int) -> bool:
        """Whether the node's next instruction, which Flower would give it now, has been uploaded.

        An instruction that is not whole after three minutes is given, too: its sender has gone, which
        Flower finds out when a node asks for an object, and later instructions wait behind it.
        """
        now = time.time()
        found = self._one(_NEXT, node=_signed(node), now=now)
        if found is None:
            return False
        is_late = now - float(found["created_at"]) > _UPLOAD_SECONDS
        return is_late or not self.lacks_objects(str(found["message_id"]))

    def give_again(self, message: str) -> None:
        """Makes the SuperLink deliver an instruction's outline again at the next request for one."""
        self.state.query(_GIVE_AGAIN, {"message": message})

    def check(self) -> None:
        """Runs each query once, so that a database with another schema is detected at the start."""
        for ask in (
            lambda: self.node_of(b""),
            lambda: self.instruction(""),
            lambda: self.session(""),
            lambda: self.are_of_others([""], 0),
            lambda: self.may_pull(0, 0, ""),
            lambda: self.lacks_objects(""),
            lambda: self.given(0),
            lambda: self.can_give(0),
            lambda: self.give_again(""),
        ):
            ask()

    def _one(self, query: str, **values: Any) -> Mapping[str, Any] | None:
        """The first row of a query's result."""
        rows = self.state.query(query, values)
        return rows[0] if rows else None


def _signed(number: int) -> int:
    """A number in the form in which SQLite stores it."""
    return number - (1 << 64) if number >= 1 << 63 else number
