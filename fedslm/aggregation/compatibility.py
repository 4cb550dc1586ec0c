"""Incompatible settings as data: each refused combination, with the reason and the nearest valid one.

A combination is refused if a guarantee would not hold, if the result would be meaningless, or if a
setting would silently have no effect. Every combination that matches no row is valid.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from fedslm.aggregation.methods import METHODS
from fedslm.config import (
    AggregationConfig,
    CompressionConfig,
    LoraConfig,
    PrivacyConfig,
    RuleName,
    TrainingConfig,
)

Axis = Literal[
    "method",
    "unit",
    "noise",
    "rule",
    "weights",
    "ranks",
    "server optimizer",
    "drift",
    "local optimizer",
    "upload",
    "share sent",
    "error feedback",
]

KEYS: dict[Axis, str] = {
    "method": "aggregation.method",
    "unit": "privacy.unit",
    "noise": "privacy.noise",
    "rule": "aggregation.rule",
    "weights": "aggregation.weights",
    "ranks": "lora.client_ranks",
    "server optimizer": "aggregation.server_optimizer",
    "drift": "training.drift",
    "local optimizer": "training.optimizer",
    "upload": "compression.upload",
    "share sent": "compression.keep_fraction",
    "error feedback": "compression.error_feedback",
}


def _names(text: str) -> frozenset[str]:
    """Splits a string into a set of words."""
    return frozenset(text.split())


_LINEAR = frozenset(name for name, row in METHODS.items() if row.family == "linear")
_FACTORS = frozenset(METHODS) - _LINEAR
_SHARED_A = _names("ffa rolora fed-sb head")
_ROBUST = frozenset(get_args(RuleName)) - {"mean"}
_ADAPTIVE = _names("fedavgm fedadam fedyogi fedadagrad")
_PRIVATE = _names("record user client")
_GRADIENTS = _names("record user")  # units whose clients send gradients of one step to a sum
_SHARED: Mapping[Axis, frozenset[str]] = {"noise": frozenset({"distributed"})}
_SUMMED = _names("fedit ffa rolora fed-sb head")


@dataclass(frozen=True)
class Conflict:
    """One refused combination.

    Attributes:
        where: The values on each axis whose combination is refused.
        axis: The axis to change.
        reason: Why the combination is refused.
        nearest: The nearest valid choice.
    """

    where: Mapping[Axis, frozenset[str]]
    axis: Axis
    reason: str
    nearest: str


CONFLICTS: tuple[Conflict, ...] = (
    Conflict(
        {"rule": _ROBUST, "method": frozenset(METHODS) - _SHARED_A}, "rule",
        "compares updates by coordinates, which have no meaning if A and B both change: a client may "
        "rotate both without changing their product",
        "mean, or aggregation.method = ffa or rolora",
    ),
    Conflict(
        {"rule": _ROBUST, "ranks": frozenset({"several"})}, "rule",
        "compares updates with the same coordinates, which clients of several ranks do not have",
        "mean, or one rank",
    ),
    Conflict(
        {"rule": _ROBUST, "weights": frozenset({"records"})}, "weights",
        "a rule against hostile clients cannot trust the record counts that they state",
        "uniform",
    ),
    Conflict(
        {"weights": frozenset({"records"}), "unit": _PRIVATE}, "weights",
        "reveals how many records a client has",
        "uniform",
    ),
    Conflict(
        {"ranks": frozenset({"several"}), "method": _names("fedit fedrot fedsa fedex")}, "ranks",
        "the method averages factors that must have one rank",
        "one rank, or aggregation.method = stack, flexlora, hetlora, or ffa under privacy",
    ),
    Conflict(
        {"ranks": frozenset({"several"}), "method": _FACTORS, "unit": _PRIVATE}, "ranks",
        "noise would change rows and columns that a client of a lower rank does not have",
        "one rank, or aggregation.method = ffa",
    ),
    Conflict(
        {"server optimizer": _ADAPTIVE, "method": _FACTORS}, "server optimizer",
        "the method makes new factors, not a step in the coordinates of the old ones",
        "fedavg",
    ),
    Conflict(
        {"drift": frozenset({"scaffold"}), "unit": _PRIVATE}, "drift",
        "control variates are differences that are smaller than the noise",
        "fedprox",
    ),
    Conflict(
        {"drift": frozenset({"scaffold"}), "local optimizer": frozenset({"adamw"})}, "drift",
        "control variates are gradients, and AdamW's steps have another scale",
        'fedprox, or training.optimizer = "sgd"',
    ),
    Conflict(
        {"drift": frozenset({"scaffold"}), "method": frozenset(METHODS) - _names("fedit ffa fed-sb")},
        "drift",
        "control variates need the same trained coordinates in every round",
        "fedprox, or aggregation.method = fedit, ffa or fed-sb",
    ),
    Conflict(
        {"drift": frozenset({"scaffold"}), "ranks": frozenset({"several"})}, "drift",
        "control variates need the same trained coordinates at every client",
        "fedprox, or one rank",
    ),
    Conflict(
        {"error feedback": frozenset({"yes"}), "upload": frozenset({"float32"}),
         "share sent": frozenset({"all"})}, "error feedback",
        "nothing is lost on the wire, so there is no error to feed back",
        "false",
    ),
    Conflict(
        {"error feedback": frozenset({"yes"}), "method": _FACTORS | {"fedrot"}}, "error feedback",
        "the lost part is in coordinates that the next round no longer has",
        "false, or aggregation.method = fedit, ffa or rolora",
    ),
    Conflict(
        {**_SHARED, "unit": frozenset({"none"})}, "noise",
        "without privacy there is no noise to share",
        "local",
    ),
    Conflict(
        {"noise": frozenset({"local"}), "unit": frozenset({"client"})}, "noise",
        "a client that hides all that it has in its own update leaves nothing to learn from",
        "distributed",
    ),
    Conflict(
        {**_SHARED, "method": frozenset(METHODS) - _SUMMED}, "method",
        "clients share the noise of one sum, and the method needs more than the sum of what they send",
        "ffa, fedit, rolora, fed-sb or head",
    ),
    Conflict(
        {**_SHARED, "rule": _ROBUST}, "rule",
        "the server sees the sum of all clients only, and no update that it could compare",
        "mean",
    ),
    Conflict(
        {**_SHARED, "ranks": frozenset({"several"})}, "ranks",
        "clients of several ranks have no common sum",
        "one rank",
    ),
    Conflict(
        {**_SHARED, "unit": _GRADIENTS, "drift": _names("fedprox scaffold")}, "drift",
        "a client sends the gradient at the round's start, from which it has not drifted",
        "none",
    ),
    Conflict(
        {**_SHARED, "unit": _GRADIENTS, "local optimizer": frozenset({"adamw"})}, "local optimizer",
        "clients send gradients, and no sum of them gives a step of AdamW",
        'sgd, with aggregation.server_optimizer = "fedadam" for an adaptive step',
    ),
    Conflict(
        {**_SHARED, "upload": _names("bfloat16 int8")}, "upload",
        "rounding a part of a sum modulo 2^32 would change the sum",
        "float32, which sends 4 bytes a value here too",
    ),
    Conflict(
        {**_SHARED, "share sent": frozenset({"some"})}, "share sent",
        "values that are left out would have to be hidden as well",
        "1",
    ),
    Conflict(
        {**_SHARED, "error feedback": frozenset({"yes"})}, "error feedback",
        "a sum is sent whole, so there is no error to feed back",
        "false",
    ),
)  # fmt: skip


def choices(
    lora: LoraConfig,
    training: TrainingConfig,
    privacy: PrivacyConfig,
    aggregation: AggregationConfig,
    compression: CompressionConfig,
) -> dict[Axis, str]:
    """Returns a config's value on each axis."""
    ranks = {lora.rank, *lora.client_ranks} if lora.client_ranks else {lora.rank}
    return {
        "method": aggregation.method,
        "unit": privacy.unit,
        "noise": privacy.noise,
        "rule": aggregation.rule,
        "weights": aggregation.weights,
        "ranks": "several" if len(ranks) > 1 else "one",
        "server optimizer": aggregation.server_optimizer,
        "drift": training.drift,
        "local optimizer": training.optimizer,
        "upload": compression.upload,
        "share sent": "all" if compression.keep_fraction == 1 else "some",
        "error feedback": "yes" if compression.error_feedback else "no",
    }


def conflicts(chosen: Mapping[Axis, str]) -> Iterator[Conflict]:
    """Yields the refused combinations that the choices match; a missing axis matches none."""
    for conflict in CONFLICTS:
        if all(chosen.get(axis) in values for axis, values in conflict.where.items()):
            yield conflict


def refusal(conflict: Conflict, chosen: Mapping[Axis, str]) -> str:
    """Returns the error message for a refused combination."""
    others = ", ".join(
        f"{KEYS.get(axis, axis)}={_written(axis, chosen)}"
        for axis in conflict.where
        if axis != conflict.axis
    )
    return (
        f"value {_written(conflict.axis, chosen)} cannot be combined with {others}: {conflict.reason}; "
        f"nearest: {conflict.nearest}"
    )


def _written(axis: Axis, chosen: Mapping[Axis, str]) -> str:
    """Returns a choice as it is written in a config, where the axis uses another word for it."""
    words = {"yes": "true", "no": "false", "all": "1", "some": "below 1"}
    if axis == "ranks":
        return "several ranks" if chosen[axis] == "several" else "one rank"
    if axis in ("error feedback", "share sent"):
        return words[chosen[axis]]
    return repr(chosen[axis])
