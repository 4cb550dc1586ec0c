"""Bounds on messages: everything from outside is checked against them before it is parsed.

Formal guarantees:
    * JSON is parsed only from a text of bounded length; NaN and infinities are refused.
    * Tensors are allocated only after a check of their header: their number, names, number types and
      shapes, and that their sizes add up to the bytes received.
    * Every error is a FederationError of at most 300 characters.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import ArrayRecord, RecordDict

from fedslm.errors import FederationError
from fedslm.privacy.keys import masked
from fedslm.protocol.envelopes import ENVELOPE, SEAL

MOST_ROUNDS = 1_000_000
MOST_SETUP_BYTES = 2 << 20
LONGEST_REASON = 1_000
_LONGEST_ERROR = 300
_LARGEST_NUMBER = 10**12
_HEADER_BYTES, _MOST_TENSORS, _LONGEST_KEY = 2 << 20, 8_192, 256
_MOST_AXES, _LONGEST_AXIS = 4, 1 << 31
_ITEM_BYTES = {"F32": 4, "U32": 4, "U16": 2, "I8": 1}
_TENSORS = "tensors"


def cut(text: object, longest: int = _LONGEST_ERROR) -> str:
    """Shortens a text from outside to a maximum length.

    >>> cut("too long", 3)
    'too…'
    """
    whole = str(text)
    return whole if len(whole) <= longest else f"{whole[:longest]}…"


def parsed(text: object, most: int, what: str) -> Any:
    """Parses JSON from outside.

    Args:
        text: The text.
        most: Its maximum length.
        what: Name of the value, for the error.

    Raises:
        FederationError: It is too long, or not valid JSON.
    """
    if type(text) is not str or len(text) > most:
        raise FederationError(f"{what} must be a text of at most {most} characters")
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise FederationError(f"{what} cannot be read: {cut(error, 100)}") from error


def _refuse(name: str) -> None:
    """Refuses NaN and infinities, which are not JSON."""
    raise ValueError(f"{name} is not a number")


def text(values: Mapping[str, Any], key: str, longest: int) -> str:
    """Reads a text of a bounded length.

    Raises:
        FederationError: It is not a text, or is longer.
    """
    value = values[key]
    if type(value) is not str or len(value) > longest:
        raise FederationError(f"{key} must be a text of at most {longest} characters")
    return value


def count(values: Mapping[str, Any], key: str, least: int, most: int) -> int:
    """Reads a whole number within bounds; a boolean is not one.

    Raises:
        FederationError: It is not a whole number, or is out of bounds.
    """
    value = values[key]
    if type(value) is not int or not least <= value <= most:
        raise FederationError(f"{key} must be a whole number from {least} to {most}")
    return value


def texts(values: Mapping[str, Any], key: str, most: int, longest: int) -> tuple[str, ...]:
    """Reads a list of at most ``most`` texts.

    Raises:
        FederationError: It is not a list of texts, has more, or one is longer.
    """
    value = values[key]
    if type(value) is not list or len(value) > most:
        raise FederationError(f"{key} must be a list of at most {most} texts")
    if not all(type(each) is str and len(each) <= longest for each in value):
        raise FederationError(f"{key} must hold texts of at most {longest} characters")
    return tuple(value)


def exactly(values: Any, keys: Iterable[str], what: str, *, perhaps: Iterable[str] = ()) -> None:
    """Refuses a mapping whose keys differ from these.

    Raises:
        FederationError: A key is missing or unknown.
    """
    wanted = set(keys)
    allowed = wanted | set(perhaps)
    if not isinstance(values, Mapping):
        raise FederationError(f"{what} must have {', '.join(sorted(wanted))}")
    if missing := sorted(wanted - set(values)):
        raise FederationError(f"{what} lacks {missing[0]}")
    unknown = next((key for key in values if key not in allowed), None)
    if unknown is not None:
        raise FederationError(f"{what} has an unknown {cut(unknown, 40)!r}")


def records(
    content: RecordDict, *, configs: Iterable[str], arrays: Iterable[str], perhaps: Iterable[str] = ()
) -> None:
    """Refuses a message whose records differ from these.

    Args:
        content: The records of the message.
        configs: Required ConfigRecords; an envelope or a seal is allowed as well.
        arrays: Required ArrayRecords.
        perhaps: Optional ArrayRecords.

    Raises:
        FederationError: A record is missing or unknown.
    """
    exactly(content.config_records, configs, "the message", perhaps=(ENVELOPE, SEAL))
    exactly(content.array_records, arrays, "the message", perhaps=perhaps)
    exactly(content.metric_records, (), "the message")


def moderate(values: Any, what: str, depth: int = 4) -> None:
    """Refuses numbers beyond 10^12, texts of more than 20,000 characters and lists of more than 10,000.

    Raises:
        FederationError: A value is beyond these bounds, or values are nested too deeply.
    """
    match values:
        case None | bool():
            return
        case int() | float():
            good = abs(values) <= _LARGEST_NUMBER  # NaN fails this as well
        case str():
            good = len(values) <= 20_000
        case list() | dict() if depth > 0:
            good = len(values) <= 10_000
            inner = values.items() if isinstance(values, dict) else enumerate(values)
            for key, value in inner if good else ():
                moderate(
                    value, f"{what}.{cut(key, 40)}" if isinstance(values, dict) else what, depth - 1
                )
        case _:
            good = False
    if not good:
        raise FederationError(f"{what} is too large, or is not a value of a config")


def tensor_bytes(
    record: ArrayRecord,
    number_types: Iterable[str],
    most_bytes: int | None = None,
    *,
    mask: tuple[bytes, str] | None = None,
) -> bytes:
    """The safetensors content of a record whose header is valid; empty if it has no tensors.

    Args:
        record: It contains one array or none.
        number_types: The safetensors names of the allowed number types, such as "F32".
        most_bytes: Largest content; None: no limit but the message's own.
        mask: Key and name of the keystream that masks the content; None: it is not masked.

    Raises:
        FederationError: It has other arrays, is too large, or its header is not valid.
    """
    if not record:
        return b""
    exactly(record, (_TENSORS,), "a record of tensors")
    array = record[_TENSORS]
    content = array.data
    if (array.dtype, tuple(array.shape), array.stype) != ("uint8", (len(content),), "safetensors"):
        raise FederationError(f"tensors come as bytes of one array called {_TENSORS!r}")
    if most_bytes is not None and len(content) > most_bytes:
        raise FederationError(f"the tensors have {len(content)} bytes, more than {most_bytes}")
    content = content if mask is None else masked(*mask, content)
    _check_header(content, frozenset(number_types))
    return content


def most_tensor_bytes(keys: Iterable[str], value_bytes: int) -> int:
    """Largest number of bytes of a safetensors content with these tensors.

    >>> most_tensor_bytes(["a"], 4)
    271
    """
    return value_bytes + 64 + sum(len(json.dumps(key)) + 200 for key in keys)


def _check_header(content: bytes, number_types: frozenset[str]) -> None:
    """Refuses a safetensors content whose header does not match its data."""
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or not 2 <= length <= min(_HEADER_BYTES, len(content) - 8):
        raise FederationError("the tensors have no header, or one that is too long")
    raw = content[8 : 8 + length]
    if raw.count(b"{") > _MOST_TENSORS + 1 or raw.count(b"[") > 2 * _MOST_TENSORS:
        raise FederationError(f"there are more than {_MOST_TENSORS} tensors")
    try:
        header = parsed(raw.decode("utf-8"), _HEADER_BYTES, "the tensors' header")
    except UnicodeDecodeError as error:
        raise FederationError("the tensors' header is not text") from error
    if type(header) is not dict:
        raise FederationError("the tensors' header is not a list of tensors")
    claimed = sum(_claimed(key, entry, number_types) for key, entry in header.items())
    if claimed != len(content) - 8 - length:
        raise FederationError("the tensors' header claims other sizes than there are bytes")


def _claimed(key: str, entry: Any, number_types: frozenset[str]) -> int:
    """Number of bytes of one tensor, as claimed by the header."""
    name = cut(key, 60)
    if len(key) > _LONGEST_KEY:
        raise FederationError(f"a tensor's name is longer than {_LONGEST_KEY} characters")
    exactly(entry, ("dtype", "shape", "data_offsets"), f"tensor {name!r}")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(kind) is not str or kind not in number_types:
        raise FederationError(f"tensor {name!r} must be {' or '.join(sorted(number_types))}")
    if not (_are_counts(shape, _MOST_AXES) and _are_counts(offsets, 2) and len(offsets) == 2):
        raise FederationError(f"tensor {name!r} has no shape, or no place")
    size: int = math.prod(shape) * _ITEM_BYTES[kind]
    if offsets[1] - offsets[0] != size:
        raise FederationError(f"tensor {name!r} has another size than its shape")
    return size


def _are_counts(values: Any, most: int) -> bool:
    """Whether a value is a list of whole numbers within bounds."""
    if type(values) is not list or len(values) > most:
        return False
    return all(type(each) is int and 0 <= each <= _LONGEST_AXIS << 8 for each in values)
