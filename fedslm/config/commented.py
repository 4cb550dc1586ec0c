"""Writes a short config for people: only the keys that someone chose, each with its meaning."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fedslm.config.sections import Config
from fedslm.errors import printable


def commented_toml(sections: Mapping[str, Mapping[str, Any]], header: Sequence[str] = ()) -> str:
    """Writes sections as TOML that :func:`fedslm.config.from_toml` can read.

    Args:
        sections: Section to its keys; values of None are left out.
        header: Lines of a comment at the top.

    >>> print(commented_toml({"run": {"seed": 1, "directory": None}}, ["Mine."]), end="")
    # Mine.
    <BLANKLINE>
    [run]
    seed = 1 # Seed of everything reproducible
    """
    lines = [f"# {printable(line)}".rstrip() for line in header]
    for section, values in sections.items():
        kept = {key: value for key, value in values.items() if value is not None}
        if kept:
            lines += ["", f"[{section}]"]
            lines += [
                f"{key} = {toml_value(value)}{_meaning(section, key)}" for key, value in kept.items()
            ]
    return "\n".join(lines).lstrip("\n") + "\n"


def toml_value(value: Any) -> str:
    """Writes a text, a number, a truth value or a list of them as TOML."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("\x7f", "\\u007f")


def _meaning(section: str, key: str) -> str:
    """The first words of a key's description, as a comment; empty for an unknown key."""
    part = Config.model_fields.get(section)
    field = None if part is None else getattr(part.annotation, "model_fields", {}).get(key)
    words = " ".join(((field.description if field else None) or "").split())
    first = re.split(r"[:;(]|\. |, or ", words)[0].strip().rstrip(".")
    return f" # {first}" if first else ""
