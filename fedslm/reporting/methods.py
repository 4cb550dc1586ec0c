"""The table of aggregation methods and of compatible settings, for people and programs."""

from __future__ import annotations

from typing import Any

from fedslm.adapter_keys import Part
from fedslm.aggregation.compatibility import CONFLICTS, KEYS, Axis, Conflict, conflicts
from fedslm.aggregation.methods import METHODS, Method
from fedslm.config import MethodName
from fedslm.rendering import render

# The requirement of each column on a method: the values that it fixes.
_COLUMNS: dict[str, dict[Axis, str]] = {
    "no privacy": {"unit": "none"},
    "record": {"unit": "record", "noise": "local"},
    "user": {"unit": "user", "noise": "local"},
    "several ranks": {"ranks": "several", "unit": "none"},
    "ranks, private": {"ranks": "several", "unit": "record"},
    "robust rules": {"rule": "median"},
    "server optimizer": {"server optimizer": "fedadam"},
    "scaffold": {"drift": "scaffold", "local optimizer": "sgd", "unit": "none"},
    "error feedback": {"error feedback": "yes", "upload": "int8"},
    "shared noise": {"noise": "distributed", "unit": "record", "local optimizer": "sgd"},
    "client": {"noise": "distributed", "unit": "client"},
}
_VALUES: dict[Part, str] = {"lora_A": "r·in", "lora_B": "r·out", "lora_R": "r²"}


def as_data() -> dict[str, Any]:
    """Returns all tables as JSON values."""
    return {
        "columns": list(_COLUMNS),
        "methods": [_row(name, method) for name, method in METHODS.items()],
        "conflicts": [_conflict(conflict) for conflict in CONFLICTS],
    }


def as_page() -> str:
    """Returns the page ``docs/aggregation.md``."""
    return render("aggregation.md.j2", **as_data())


def _row(name: MethodName, method: Method) -> dict[str, Any]:
    """Describes one method."""
    sent = [_up(parts - method.local) for parts in (method.odd, method.even)]
    return {
        "name": name,
        "title": method.title,
        "source": method.source,
        "family": method.family,
        "exact": method.exact,
        "note": method.note,
        "up": sent[0] if sent[0] == sent[1] else " / ".join(sent),
        "valid": {
            column: not any(conflicts({"method": name, **fixed})) for column, fixed in _COLUMNS.items()
        },
    }


def _up(parts: frozenset[Part]) -> str:
    """Returns the number of values of one layer that a client sends."""
    return " + ".join(_VALUES[part] for part in _VALUES if part in parts)


def _conflict(conflict: Conflict) -> dict[str, Any]:
    """Describes one refused combination."""
    where = {axis: sorted(values) for axis, values in conflict.where.items()}
    return {
        "where": where,
        "combination": ", with ".join(
            f"{KEYS.get(axis, axis)} = {' | '.join(values)}" for axis, values in where.items()
        ),
        "change": KEYS.get(conflict.axis, conflict.axis),
        "reason": conflict.reason,
        "nearest": conflict.nearest,
    }
