"""Builds messages from Flower's objects within limits: Flower itself joins whatever the objects list.

A message is a tree of objects: the message, its records, their arrays, and the pieces of 5 MiB that an
array is cut into. An array lists its pieces by number and may list one repeatedly: 5 MiB of received
data can become any number of bytes.

Formal guarantees:
    * Before an object is built, the sizes of all are known and within the limits: each record's own
      bytes, and all arrays together. A piece counts as often as an array lists it, an array as often as
      a record names it, and so on: hashing the message processes all of these bytes.
    * An array is made of pieces, and a record of arrays: an array of arrays is refused.
    * Every failure to build a message is a FederationError, whatever its cause.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import Message

from fedslm.errors import FederationError

_DEEPEST = 8
_LONGEST_HEAD = 1 << 19  # an array of 7,000 pieces lists all of them
_LONGEST_REASON, _MOST_RECORDS = 200, 16
_KINDS = frozenset(
    {"Message", "RecordDict", "ArrayRecord", "ConfigRecord", "MetricRecord", "Array", "ArrayChunk"}
)


_RECORDS = ("ConfigRecord", "MetricRecord")  # the records without arrays


@dataclass(frozen=True)
class _Head:
    """An object's kind, the identifiers of its children, and the start of its body."""

    kind: str
    children: list[str]
    end: int


@dataclass(frozen=True)
class Limits:
    """Limits on the size of a message.

    Attributes:
        most_bytes: Bytes of all arrays together.
        record_bytes: Bytes of a ConfigRecord.
        head_bytes: Bytes of every other object that is not a piece of an array.
        most_objects: Objects of one message.
    """

    most_bytes: int
    record_bytes: int = (2 << 20) + (1 << 18)
    head_bytes: int = 1 << 19
    most_objects: int = 4096


def objects_of(tree: Any, limits: Limits) -> list[str]:
    """The identifiers of a message's objects, each once, before any of them is pulled.

    Raises:
        FederationError: There are too many, they are too deep, or one has no identifier.
    """
    found: dict[str, None] = {}
    level = [tree]
    count = 0
    for _ in range(_DEEPEST):
        count += len(level)
        if count > limits.most_objects:
            raise FederationError(f"a message has more than {limits.most_objects} objects")
        for each in level:
            if len(each.object_id) != 64:
                raise FederationError("an object of a message has no identifier")
            found[each.object_id] = None
        level = [child for each in level for child in each.children]
        if not level:
            return list(found)
    raise FederationError(f"a message has objects more than {_DEEPEST} levels deep")


def inflated(identifier: str, contents: dict[str, bytes], limits: Limits) -> Message:
    """Builds a message from its objects; removes them from ``contents``.

    Raises:
        FederationError: They are too large, or do not form a message.
    """
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

    try:
        _check(contents, limits)
        message = inflate_object_from_contents(identifier, contents)
    except FederationError:
        raise
    except Exception as error:  # bytes from outside: on any error, they are not a message
        reason = f"{type(error).__name__}: {error}"[:_LONGEST_REASON]
        raise FederationError(f"the message cannot be read: {reason}") from error
    if not isinstance(message, Message):
        raise FederationError("the message cannot be read: it is another object")
    return message


def _check(contents: Mapping[str, bytes], limits: Limits) -> None:
    """Refuses objects that are too large, or become too large when they are joined."""
    if len(contents) > limits.most_objects:
        raise FederationError(f"a message has more than {limits.most_objects} objects")
    heads = {key: _head(content) for key, content in contents.items()}
    for key, head in heads.items():
        most = limits.record_bytes if head.kind == "ConfigRecord" else limits.head_bytes
        if head.kind != "ArrayChunk" and len(contents[key]) > most:
            raise FederationError(f"a {head.kind} of a message has more than {most} bytes")
    pieces = {key: head for key, head in heads.items() if head.kind == "ArrayChunk"}
    if sum(head.kind in _RECORDS for head in heads.values()) > _MOST_RECORDS:
        raise FederationError(f"a message has more than {_MOST_RECORDS} records without arrays")
    sizes = {key: len(contents[key]) - head.end for key, head in pieces.items()}
    for whole in ("Array", "ArrayRecord", "RecordDict"):
        if whole == "RecordDict":
            sizes |= {key: 0 for key, head in heads.items() if head.kind in _RECORDS}
        sizes = {
            key: sum(sizes[part] for part in _parts(head, contents[key]))
            for key, head in heads.items()
            if head.kind == whole
        }
        if sum(sizes.values()) > limits.most_bytes:
            raise FederationError(f"the arrays of a message have more than {limits.most_bytes} bytes")


def _parts(head: _Head, content: bytes) -> list[str]:
    """The parts of an object, as often as it lists them; checks that its kind can have parts."""
    body = json.loads(content[head.end :])
    if head.kind == "Array":
        return [head.children[number] for number in body["arraychunk_ids"]]
    return list(body.values())


def _head(content: bytes) -> _Head:
    """Reads an object's head."""
    end = content.find(b"\0", 0, _LONGEST_HEAD)
    kind, _, rest = content[: max(0, end)].decode("ascii").partition(" ")
    children, _, _ = rest.partition(" ")
    if kind not in _KINDS:
        raise FederationError("an object of a message is of no known kind")
    return _Head(kind, children.split(",") if children else [], end + 1)
