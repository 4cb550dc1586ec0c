"""Classifies one value of a record: text, a number that is meant as text, or something else."""

from __future__ import annotations

from typing import Any

from fedslm.data.missing import is_missing, is_nothing, written
from fedslm.data.turns import is_turns, turns_of

ROLES = "system, user (human), assistant (gpt) and tool"
NOTHING, BYTES, HOLES = "nothing", "bytes", "a list in which a value is missing"
_NO_TEXT = (list, tuple, dict, set, bytes, bytearray, memoryview)


def text_in(value: Any) -> str:
    """Returns a value as text, in the form of :func:`written`; empty where there is no text.

    >>> text_in("a"), text_in(0), text_in(None), text_in(float("nan")), text_in(["a"]), text_in(b"a")
    ('a', '0', '', '', '', '')
    """
    if isinstance(value, _NO_TEXT) or is_nothing(value):
        return ""
    return written(value)


def is_value(value: Any) -> bool:
    """Whether a value is a scalar or missing: not a list, an object or bytes."""
    return not isinstance(value, _NO_TEXT)


def described(value: Any) -> tuple[str, str]:
    """Describes a value of the wrong kind, and how to correct it.

    >>> described(b"a")
    ('bytes', 'decode them to text first')
    """
    if isinstance(value, bytes | bytearray | memoryview):
        return BYTES, "decode them to text first"
    if is_turns(value) and not turns_of(value):
        return "turns without text, or of an unknown role", f"roles are {ROLES}; contents are texts"
    if is_turns(value):
        return "turns of a conversation", 'task.name="instruction" and "preference" read them'
    if isinstance(value, dict) and value and all(str(key).isdecimal() for key in value):
        return (
            "a table by row numbers, as pandas writes columns",
            'write it with to_json(path, orient="records", lines=True)',
        )
    if isinstance(value, dict):
        return (
            f"an object with {', '.join(map(str, list(value)[:5]))}",
            "put its text into a column",
        )
    if isinstance(value, list | tuple) and not value:
        return "an empty list", "remove them"
    if isinstance(value, list | tuple) and any(map(is_missing, value)):
        return HOLES, "remove what is missing from the lists"
    if isinstance(value, list | tuple):
        return (
            f"a list of {type(value[0]).__name__} values",
            "join each list into one text, or name another column",
        )
    if not text_in(value).strip():
        return NOTHING, "remove them"
    return "a text" if isinstance(value, str) else f"a {type(value).__name__}", "name another column"
