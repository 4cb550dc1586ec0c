"""Checks a plan with three accountants, once on a machine."""

from __future__ import annotations

import logging
from dataclasses import asdict, fields
from typing import Any

from fedslm.attestations import Places, attested
from fedslm.errors import PrivacyError, RunError
from fedslm.privacy.agreement import Accounts, check_agreement
from fedslm.privacy.plan import PrivatePlan
from fedslm.records import is_number, within

logger = logging.getLogger(__name__)
_KIND = "accounts"


def verified(plan: PrivatePlan, places: Places) -> Accounts:
    """Does what :meth:`PrivatePlan.verify` does, unless this code has done it on this machine before.

    Formal guarantees:
        * Returns only if this code has computed, on this machine, that all rounds cost at most
          ``plan.epsilon``, and its three accountants agreed: for these events, this delta and this
          epsilon. Where a result counts, says :mod:`fedslm.attestations`.
        * A kept result is compared with budget and tolerance again; one that does not pass is computed
          again. A refusal is never kept.

    Args:
        plan: The plan.
        places: Where results are kept; if none can be written, the result is computed each time.

    Raises:
        PrivacyError: The rounds cost more, or the accountants disagree.
    """
    events = [list(event.as_values().values()) for event in plan.run_events]
    key = {"events": events, "delta": plan.delta, "epsilon": plan.epsilon}
    try:
        kept = attested(places, _KIND, key, lambda: asdict(plan.verify()))
    except RunError as error:
        logger.warning("the plan's check cannot be kept: %s", error)
        return plan.verify()
    return _sound(kept, plan) or plan.verify()


def _sound(kept: dict[str, Any], plan: PrivatePlan) -> Accounts | None:
    """The accounts of a kept result, if they pass the plan's check."""
    record = "PLD" if plan.shares is None else "RDP"
    if set(kept) != {each.name for each in fields(Accounts)} or kept["of_record"] != record:
        return None
    if not all(is_number(value) for name, value in kept.items() if name != "of_record"):
        return None
    accounts = Accounts(**kept)
    try:
        check_agreement(accounts)
    except PrivacyError:
        return None
    return accounts if within(accounts.epsilon, plan.epsilon) else None
