"""What the round loop does with the answers of a round: a mean of updates, or a step along a sum."""

from __future__ import annotations

import math
from pathlib import Path

from fedslm.aggregation.server import Aggregation, Round, ServerState
from fedslm.aggregation.summed import Sum, SummedRound, Summing
from fedslm.errors import FederationError
from fedslm.federation.tally import Tally
from fedslm.protocol.messages import Reply
from fedslm.records import ClientUpdate

Combining = Round | SummedRound


def combining(
    how: tuple[Aggregation, Summing | None],
    state: ServerState,
    cohort: list[int],
    directory: Path,
    total: Sum | None = None,
) -> Combining:
    """Starts a round.

    Args:
        how: The aggregation, and how a step is made of a sum; None: clients send their updates.
        state: The state before the round.
        cohort: The clients of the round.
        directory: Where updates may be kept on disk.
        total: The sum that a protocol forms from the clients' parts.
    """
    aggregation, summing = how
    if summing is not None:
        return SummedRound(aggregation, summing, state, len(cohort), total)
    return Round(aggregation, state, cohort, directory)


def take(round: Combining, client: int, answer: Reply | str) -> None:
    """Adds a client's checked answer, if it has something to add."""
    if isinstance(answer, str):
        return
    if isinstance(round, SummedRound):
        if answer.words is not None:
            round.add(answer.words)
    elif answer.delta is not None:
        round.add(ClientUpdate(client, answer.delta, answer.weight))


def finished(aggregate: Combining, min_replies: int, *, tally: Tally) -> ServerState | None:
    """The state after a round; None if it moves nothing: the tally gets the reason if any replied."""
    if aggregate.count < min_replies:
        if aggregate.count:
            few = f"{aggregate.count} replies are fewer than federation.min_replies={min_replies}"
            tally.add_reason(few)
        return None
    try:
        return aggregate.finish()
    except FederationError as error:
        tally.add_reason(str(error))
        return None


def finite(value: float | None) -> float | None:
    """The value if it is finite, else None: JSON has no infinity."""
    return value if value is not None and math.isfinite(value) else None
