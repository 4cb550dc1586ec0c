"""Clients' metrics on their own held-out records, and their spread over clients."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from flwr.app import Message

from fedslm.protocol import bounds

_LOWER_IS_BETTER = ("loss", "perplexity")
_LARGEST, _MOST_METRICS, _LONGEST_TEXT = 1e12, 100, 16_384
_NAME = re.compile(r"[A-Za-z0-9_]{1,100}")  # it appears in reports, as text and in table cells

Metrics = dict[str, float]


@dataclass(frozen=True)
class ClientMetrics:
    """One client's metrics on its held-out records.

    Attributes:
        records: Number of held-out records.
        shared: Metrics of the shared adapter (FedSA: with the tensors that the client keeps).
        personal: Metrics of the client's own adapter; empty without personalization.
    """

    records: int
    shared: Metrics
    personal: Metrics


def read_metrics(message: Message) -> ClientMetrics | str | None:
    """Reads a client's answer: metrics, the reason why there are none, or None if it keeps them."""
    if message.has_error():
        return bounds.cut(f"error {message.error.code}: {message.error.reason}")
    try:
        bounds.records(message.content, configs=("measured",), arrays=())
        values = message.content.config_records["measured"]
        bounds.exactly(values, ("status", "metrics", "salt"), "the answer")
        bounds.text(values, "salt", bounds.LONGEST_REASON)
        status = bounds.text(values, "status", bounds.LONGEST_REASON)
        text = bounds.text(values, "metrics", _LONGEST_TEXT)
        if status != "ok":
            return bounds.cut(status)
        found = ClientMetrics(**bounds.parsed(text, _LONGEST_TEXT, "metrics")) if text else None
        if found is not None:
            _check(found)
    except Exception as error:  # bytes from outside: on any error, they are not metrics
        return bounds.cut(f"the metrics cannot be read: {error}")
    return found


def spread(values: Sequence[Metrics]) -> dict[str, Metrics]:
    """Spread of each metric over clients, a measure of fairness.

    Args:
        values: The metrics of each client.

    Returns:
        For each metric min, median, max, and the mean of the worst tenth (at least one client).

    >>> spread([{"accuracy": 0.5}, {"accuracy": 1.0}])["accuracy"]["worst_decile"]
    0.5
    """
    found: dict[str, Metrics] = {}
    for name in sorted(set().union(*values)) if values else ():
        ordered = sorted(each[name] for each in values if name in each)
        worst_first = ordered[::-1] if name.endswith(_LOWER_IS_BETTER) else ordered
        worst = worst_first[: max(1, len(ordered) // 10)]
        found[name] = {
            "min": ordered[0],
            "median": float(np.median(ordered)),
            "max": ordered[-1],
            "worst_decile": float(np.mean(worst)),
        }
    return found


def _check(found: ClientMetrics) -> None:
    """Refuses metrics without a valid count or with numbers that are not finite."""
    numbers: Iterator[Any] = (
        value for part in (found.shared, found.personal) for value in part.values()
    )
    if type(found.records) is not int or not 0 <= found.records <= _LARGEST:
        raise ValueError("records must be a count")
    names = [*found.shared, *found.personal]
    if len(names) > _MOST_METRICS or not all(map(_NAME.fullmatch, names)):
        raise ValueError(f"there must be at most {_MOST_METRICS} metrics, named by a word each")
    if not all(isinstance(value, float) and abs(value) <= _LARGEST for value in numbers):
        raise ValueError(f"a metric must be a number up to {_LARGEST:g}")


def as_json(measured: Mapping[str, ClientMetrics]) -> dict[str, Any]:
    """Each client's metrics by name, and their spread."""
    shared = [each.shared for each in measured.values() if each.shared]
    personal = [each.personal for each in measured.values() if each.personal]
    return {
        "clients": {name: asdict(each) for name, each in measured.items()},
        "shared": spread(shared),
        "personal": spread(personal),
    }
