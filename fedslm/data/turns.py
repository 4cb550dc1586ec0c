"""Conversations in the formats of TRL (role, content) and ShareGPT (from, value)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Turn = dict[str, str]  # "role" (system, user, assistant, tool) and "content"
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
}
_KEYS = (("role", "content"), ("from", "value"))


def is_turns(value: Any) -> bool:
    """Whether a value looks like a conversation, even if some turns cannot be read."""
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(isinstance(each, Mapping) and _keys_of(each) is not None for each in value)
    )


def turns_of(value: Any) -> tuple[Turn, ...]:
    """Returns the turns with text, in order; empty if it is not a conversation or a role is unknown.

    >>> turns_of([{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}])[1]
    {'role': 'assistant', 'content': 'So.'}
    """
    if not is_turns(value):
        return ()
    found = [_turn(each) for each in value]
    read = tuple(turn for turn in found if turn is not None)
    return tuple(turn for turn in read if turn["content"].strip()) if len(read) == len(found) else ()


def answered(turns: tuple[Turn, ...]) -> tuple[tuple[Turn, ...], str]:
    """Splits a conversation into the turns before its last answer and that answer; drops later turns.

    Returns:
        All turns and "" if there is no assistant turn.
    """
    for at in reversed(range(len(turns))):
        if turns[at]["role"] == "assistant":
            return turns[:at], turns[at]["content"]
    return turns, ""


def slim(value: Any) -> Any:
    """Reduces turns to role and text; other values stay unchanged, and the parsed result is the same.

    So other fields of a turn (tool calls, images, weights) need not have the same type in all records.

    >>> slim([{"role": "user", "content": [{"type": "text", "text": "Why?"}], "weight": 1}])
    [{'role': 'user', 'content': 'Why?'}]
    """
    if not is_turns(value):
        return value
    return [_turn(each) or {"role": "unknown", "content": ""} for each in value]


def _keys_of(turn: Mapping[str, Any]) -> tuple[str, str] | None:
    """Names of a turn's two fields; Arrow adds those of other records, but their role is null."""
    found = [keys for keys in _KEYS if keys[0] in turn and keys[1] in turn]
    return next((keys for keys in found if turn[keys[0]] is not None), found[0] if found else None)


def _turn(value: Mapping[str, Any]) -> Turn | None:
    """Returns one turn; None if its role is unknown or its content is not text."""
    keys = _keys_of(value)
    if keys is None:
        return None
    role, content = _ROLES.get(str(value[keys[0]]).strip().lower()), _content(value[keys[1]])
    return None if role is None or content is None else {"role": role, "content": content}


def _content(value: Any) -> str | None:
    """Returns a turn's text, also if it is a list of parts; None for images and other content."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        return None
    parts = [part.get("text") if isinstance(part, Mapping) else part for part in value]
    texts = [part for part in parts if isinstance(part, str)]
    return "".join(texts) if len(texts) == len(parts) else None
