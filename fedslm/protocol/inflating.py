"""From Flower's objects to a message, within limits: Flower joins whatever the objects say.

A message is a tree of objects: the message, its records, their arrays, and the pieces of 5 MiB that an
array is cut into. An array lists its pieces by number and may list one again and again: 5 MiB that were
sent become any number of bytes.

Formal guarantees:
    * Before an object is built, the sizes of all are known and within the limits: each record's own
      bytes, and all arrays together. A piece counts as often as an array lists it, and an array as
      often as a record names it, and so on: whoever hashes the message goes through all of that.
    * An array is made of pieces, and a record of arrays: an array of arrays is refused.
    * What cannot be built is a FederationError, whatever is wrong with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import Message

from fedslm.errors import FederationError

_DEEPEST = 8
_LONGEST_HEAD = 1 << 19  # an array of 7,000 pieces names them all
_LONGEST_REASON, _MOST_RECORDS = 200, 16
_KINDS = frozenset(
    {"Message", "RecordDict", "ArrayRecord", "ConfigRecord", "MetricRecord", "Array", "ArrayChunk"}
)


_RECORDS = ("ConfigRecord", "MetricRecord")  # those without arrays


@dataclass(frozen=True)
class _Head:
    """An object's kind, the identifiers of its children, and where its body begins."""

    kind: str
    children: list[str]
    end: int


@dataclass(frozen=True)
class Limits:
    """How large a message may be.

    Attributes:
        most_bytes: All arrays together.
        record_bytes: A ConfigRecord.
        head_bytes: Every other object that is no piece of an array.
        most_objects: Objects of one message.
    """

    most_bytes: int
    record_bytes: int = (2 << 20) + (1 << 18)
    head_bytes: int = 1 << 19
    most_objects: int = 4096


def objects_of(tree: Any, limits: Limits) -> list[str]:
    """The identifiers of a message's objects, each once, before any of them is pulled.

    Raises:
        FederationError: They are too many or too deep, or one has no identifier.
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
    """Builds a message from its objects; takes them out of ``contents``.

    Raises:
        FederationError: They are too large, or are no message.
    """
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

    try:
        _check(contents, limits)
        message = inflate_object_from_contents(identifier, contents)
    except FederationError:
        raise
    except Exception as error:  # bytes from outside: whatever they do, they are no message
        reason = f"{type(error).__name__}: {error}"[:_LONGEST_REASON]
        raise FederationError(f"the message cannot be read: {reason}") from error
    if not isinstance(message, Message):
        raise FederationError("the message cannot be read: it is another object")
    return message


def _check(contents: Mapping[str, bytes], limits: Limits) -> None:
    """Refuses objects that are too large, or become so when they are put together."""
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
    """What an object is made of, as often as it says; its kind is one that has parts."""
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
