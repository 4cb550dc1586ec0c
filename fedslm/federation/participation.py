"""Reasons why a run did not move the adapter."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from fedslm.errors import plural
from fedslm.records import RoundRecord

_OF_CLIENT = re.compile(r"client (\d+): (.*)", re.DOTALL)
_MOST_CLIENTS, _LONGEST = 5, 200


def came_to_nothing(records: Sequence[RoundRecord]) -> str:
    """Why no round of a run moved the adapter.

    Args:
        records: All rounds of the run.

    Returns:
        The most frequent reason of each of the first clients (and of the rounds themselves), one per
        line; empty if a round moved the adapter, or if there was no round.
    """
    if not all(record.kept for record in records) or not records:
        return ""
    reasons: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for text in (text for record in records for text in record.reasons):
        name, _, reason = text.partition(": ")
        reasons[name][reason] += 1
    if any(record.completed for record in records):
        lines = [f"no round of {len(records)} moved the adapter"]
    else:
        lines = [f"no node took part in any of the {plural(len(records), 'round')}"]
    for name in list(reasons)[:_MOST_CLIENTS]:
        ((reason, count),) = reasons[name].most_common(1)
        lines.append(f"{name}, {plural(count, 'time')}: {reason[:_LONGEST]}")
    if len(reasons) > _MOST_CLIENTS:
        lines.append(f"and {plural(len(reasons) - _MOST_CLIENTS, 'more client')}")
    return "\n".join(lines)


def unknown_rounds(records: Sequence[RoundRecord], client: int, after: int) -> int:
    """Number of rounds that a client may have paid for, of which no statement of its own came.

    A client pays before its update leaves, and the charge stays if training fails. A refusal is free.

    Args:
        records: All rounds of the run.
        client: Index of the client.
        after: The round of its last statement.
    """
    return sum(client in record.unknown for record in records if record.round > after)


def reasons_of(record: RoundRecord) -> dict[int, str]:
    """Client to the reason why it was not in a round's aggregate."""
    if record.left_out:
        reasons = (text.partition(": ")[2] for text in record.reasons)
        return dict(zip(record.left_out, reasons, strict=False))
    found = (_OF_CLIENT.fullmatch(text) for text in record.reasons)
    return {int(match[1]): match[2] for match in found if match is not None}
