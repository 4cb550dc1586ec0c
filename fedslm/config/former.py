"""Configs that earlier versions stored in run directories: their keys, and the hashes that they had."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedslm.config.sections import Config, content_sha256

RENAMED = {"aggregation.hostile": "aggregation.num_byzantine"}
"""Old key to new key."""
REPLACED = {
    "privacy.batched": 'is now privacy.passes: write passes = "isolated" (false), "shared" (true) or '
    '"fixed"',
    "batched": 'is now weakest_passes: write "isolated" (false), "shared" (true) or "fixed"',
}
"""Old key to what to write now."""
_PASSES = {True: "shared", False: "isolated"}  # privacy.batched
_UNITS = {"user": "patient"}


def with_new_names(stored: Any) -> Any:
    """The sections of a stored config, under the keys of this version; anything else as it is.

    >>> with_new_names({"aggregation": {"rule": "median", "hostile": 2}})
    {'aggregation': {'rule': 'median', 'num_byzantine': 2}}
    """
    if not isinstance(stored, Mapping):
        return stored
    names = {tuple(old.split(".")): new.split(".")[1] for old, new in RENAMED.items()}
    found = {
        section: {names.get((section, key), key): value for key, value in values.items()}
        if isinstance(values, Mapping)
        else values
        for section, values in stored.items()
    }
    privacy = found.get("privacy")
    if isinstance(privacy, dict) and isinstance(privacy.get("batched"), bool):
        privacy["passes"] = _PASSES[privacy.pop("batched")]
    return found


def former_sha256s(config: Config) -> tuple[str, ...]:
    """The hashes that earlier versions gave to this config, the oldest first; none if it is newer."""
    content = config.hashed_content()
    passes = content["privacy"].pop("passes")
    if passes not in _PASSES.values():
        return ()
    content["privacy"]["batched"] = passes == _PASSES[True]
    newer = content_sha256(content)
    for old, new in RENAMED.items():
        section, key = new.split(".")
        content[section][old.split(".")[1]] = content[section].pop(key)
    unit = content["privacy"]["unit"]
    content["privacy"]["unit"] = _UNITS.get(unit, unit)
    return content_sha256(content), newer
