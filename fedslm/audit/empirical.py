"""The attack with canaries on the steps that a run charged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from fedslm.config import PrivacyConfig
from fedslm.privacy import accounting
from fedslm.privacy.plan import ExamplePlan, UserPlan
from fedslm.records import Event


def attacked(
    charges: Sequence[tuple[Event, ...]], privacy: PrivacyConfig, on_step: Callable[[int, int], None]
) -> dict[str, Any] | None:
    """Attacks the training steps of the client with the most steps.

    Args:
        charges: The charges of each client.
        privacy: The run's unit, delta and clip norm.
        on_step: Is called after each step with the number of steps done and of all.

    Returns:
        The result as JSON values; None if nothing was charged, or only sums over clients were released.
    """
    from fedslm.verification.canaries import empirical_bound

    if any(map(accounting.is_shared, charges)):
        return None  # the attack is on one client's release, and only sums were released
    steps: Counter[tuple[float, float]] = Counter()
    for event in max(charges, key=lambda events: sum(each.steps for each in events)):
        steps[event.sample_rate, event.noise_multiplier] += event.steps
    if not steps:
        return None
    ((rate, noise), count), *_ = steps.most_common(1)
    shared = (1.0, float(privacy.delta or 0), float(privacy.clip_norm or 0), noise, rate, 1, count)
    plan = UserPlan(*shared, unit_column="-") if privacy.unit == "user" else ExamplePlan(*shared)
    found = empirical_bound(plan, on_step=on_step)
    return {"consistent": found.consistent, **asdict(found)}
