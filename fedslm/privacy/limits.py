"""The limits of a ledger, and the refusal of charges that would exceed them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from fedslm.errors import BudgetExceeded, LedgerError, PolicyRefused, plural
from fedslm.privacy import accounting, clock
from fedslm.privacy.chain import Chain
from fedslm.privacy.lines import Charge
from fedslm.records import Event


@dataclass(frozen=True)
class Limits:
    """The limits of a ledger.

    Attributes:
        run: (epsilon, delta) over the charges of one run, as requested by the server.
        lifetime: (epsilon, delta) over all charges; None: no limit but the run's.
        per_run: The node's own (epsilon, delta) for any one run; None: no limit but those above.
        per_day: (epsilon, delta) over the charges within 24 hours, of all runs; None: no limit.
        rounds_per_day: Most rounds charged within 24 hours; None: no limit.
        rounds: Most rounds ever charged; None: no limit.
        seconds_between: Fewest seconds from one charged round to the next; None: no limit.
        allows_unprotected: Whether releases without privacy are allowed: the lifetime budget then
            covers only the charges, since nothing else is guaranteed.
    """

    run: tuple[float, float]
    lifetime: tuple[float, float] | None = None
    per_run: tuple[float, float] | None = None
    per_day: tuple[float, float] | None = None
    rounds_per_day: int | None = None
    rounds: int | None = None
    seconds_between: float | None = None
    allows_unprotected: bool = False


def check_node_budgets(chain: Chain, charges: Sequence[Charge], limits: Limits) -> None:
    """Refuses charges of one run that would exceed one of the node's own budgets.

    Raises:
        BudgetExceeded: The budget of a run, of 24 hours, or of the lifetime would be exceeded.
    """
    run = charges[0].run
    if limits.per_run is not None:
        of_run = [charge for charge in chain.charges if charge.run == run]
        _check_all([*of_run, *charges], limits.per_run, "any one run of this node")
    if limits.per_day is not None:
        of_day = _of_last_day(chain)
        _check_all([*of_day, *charges], limits.per_day, "24 hours of this node")
    if limits.lifetime is not None:
        if chain.unprotected and not limits.allows_unprotected:
            raise BudgetExceeded(_lost(chain, limits.lifetime))
        _check_all([*chain.charges, *charges], limits.lifetime, "the node's lifetime")


def _of_last_day(chain: Chain) -> list[Charge]:
    """The charges of the last 24 hours, and those ahead of the clock."""
    now = time.time()
    times = clock.counted_times(chain.entries, now)
    return [
        entry.charge
        for entry, counted in zip(chain.entries, times, strict=True)
        if entry.charge is not None and counted > now - clock.DAY_SECONDS
    ]


def check_unit(chain: Chain, charges: Sequence[Charge], unit: str) -> None:
    """Refuses charges in another unit than the ledger's: they could not be counted together."""
    columns = (chain.unit_column, *(charge.unit_column for charge in charges))
    column = next((each for each in columns if each is not None), None)
    for charge in charges:
        if charge.unit not in (None, unit):
            raise LedgerError(f"a charge for one {charge.unit} in a ledger of one {unit}")
        if charge.unit_column != column:
            raise PolicyRefused(
                f"this node's ledger counts by the column {column!r}; a release that protects by "
                f"{charge.unit_column!r} would not be counted with the others"
            )


def _lost(chain: Chain, budget: tuple[float, float]) -> str:
    """Explains why nothing more can be charged after a release without privacy.

    The server reads the text, so it names no run: the run may be another federation's.
    """
    releases = plural(len(chain.unprotected), "release")
    return (
        f"budget exhausted: {releases} without privacy left this node: "
        f"epsilon of the node's lifetime is infinite, over the budget of {budget[0]:g}; take other "
        f"records, with a node directory of their own"
    )


def _check_all(charges: Sequence[Charge], budget: tuple[float, float], whose: str) -> None:
    """Refuses charges over a budget; each of several plans may have been chosen after a release.

    One plan fixes rate, noise and steps before its first release; the requests may still adapt, and
    PLDs compose. A second plan may choose these by what was released: that is fully adaptive
    composition, where a Rényi filter at an order fixed beforehand holds (Feldman and Zrnic 2021,
    arXiv 2008.11193).
    """
    events = [charge.event for charge in charges]
    check_budget(events, budget, whose)
    if len({charge.plan_sha256 for charge in charges}) > 1:
        epsilon, delta = budget
        filtered = accounting.adaptive_epsilon(events, delta, epsilon)
        _refuse_above(filtered, (epsilon, 2 * delta), f"{whose} (several plans)")  # the filter's delta


def check_rounds(chain: Chain, limits: Limits) -> None:
    """Refuses a round that exceeds a limit on rounds, or comes too soon."""
    now = time.time()
    rounds = clock.rounds(chain.entries, now)
    ahead = clock.seconds_ahead(chain.entries)
    hint = f"; its ledger is {ahead} s ahead of its clock" if ahead > clock.AHEAD_SECONDS else ""
    if limits.rounds is not None and len(rounds) >= limits.rounds:
        raise BudgetExceeded(
            f"this node has taken part in {len(rounds)} of at most {limits.rounds} rounds"
        )
    if limits.rounds_per_day is not None:
        recent = sum(counted > now - clock.DAY_SECONDS for counted in rounds)
        if recent >= limits.rounds_per_day:
            raise BudgetExceeded(
                f"{limits.rounds_per_day} rounds within 24 hours are the most here{hint}"
            )
    if limits.seconds_between is not None and rounds:
        passed = now - max(rounds)
        if not passed >= limits.seconds_between:
            raise BudgetExceeded(
                f"the last round was {passed:.0f} s ago; {limits.seconds_between:g} s must pass "
                f"between two rounds of this node{hint}"
            )


def check_budget(events: list[Event], budget: tuple[float, float], whose: str) -> None:
    """Refuses events that cost more than a budget."""
    _refuse_above(accounting.epsilon(events, budget[1]), budget, whose)


def _refuse_above(after: float, budget: tuple[float, float], whose: str) -> None:
    """Refuses an epsilon above a budget; NaN is above every budget."""
    epsilon, delta = budget
    if not after <= epsilon:
        raise BudgetExceeded(
            f"budget exhausted: this round would bring epsilon of {whose} to {after:.3f} at "
            f"delta={delta:g}, over the budget of {epsilon:g}"
        )
