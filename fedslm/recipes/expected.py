"""Whether a private run can learn, before it spends: its signal-to-noise ratio against measured runs.

The ratio needs only public figures: the plan, the size of the adapter, the clients and a batch's size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from fedslm.config import Config
from fedslm.errors import ModelError, PrivacyError
from fedslm.privacy import accounting
from fedslm.privacy.calibration import calibrated, noise_of, shares_of
from fedslm.privacy.plan import NoPrivacy
from fedslm.privacy.planning import signal_to_noise
from fedslm.recipes.facts import base_of
from fedslm.recipes.table import Recipe, recipe_for

_LARGEST_EPSILON = 32.0
_MARGIN = 0.01  # calibrated noise is up to 0.002 above the smallest
_WITHOUT_NAMES = 3.0  # a head that does not start from class names needs so many times the ratio


@dataclass(frozen=True)
class Expectation:
    """What a plan's signal-to-noise ratio promises.

    Attributes:
        signal: The ratio over the whole run if all gradients agreed.
        needed: Below this, measured runs kept less than half of what they learned without privacy; 0 if
            no runs of this task were measured.
        enough: From here on, they kept most of it; 0 if none of them did.
        evidence: Those runs.
        remedies: Changes that each reach ``needed``; empty if the run reaches it.
    """

    signal: float
    needed: float
    enough: float
    evidence: str
    remedies: tuple[str, ...] = ()

    @property
    def is_measured(self) -> bool:
        """Whether there are bounds to compare with."""
        return self.needed > 0

    @property
    def learns(self) -> bool:
        """False if measured runs say that this will not learn."""
        return self.signal >= self.needed

    @property
    def text(self) -> str:
        """One sentence on the ratio, and what would raise it where it is too low."""
        ratio = f"signal-to-noise ratio over the run: {self.signal:.2g}"
        if not self.is_measured:
            return f"{ratio}; for this task no bound was measured"
        if self.learns and not self.enough:
            return f"{ratio}; from {self.needed:g} on, measured runs kept half of what they learn"
        if self.enough and self.signal >= self.enough:
            return f"{ratio}; from {self.enough:g} on, measured runs kept most of what they learn"
        if self.learns:
            return (
                f"{ratio}; between {self.needed:g} and {self.enough:g}, measured runs kept only a part"
            )
        ways = "".join(f"\n  - {each}" for each in self.remedies)
        return (
            f"this will not learn: {ratio}, and below {self.needed:g} measured runs kept less than "
            f"half of what they learn without privacy ({self.evidence}). Each of these is enough:{ways}"
        )

    def as_json(self) -> dict[str, Any]:
        """Returns all of it as JSON values."""
        return {
            "signal_to_noise": self.signal,
            "needed": self.needed,
            "enough": self.enough,
            "learns": self.learns if self.is_measured else None,
            "remedies": list(self.remedies),
        }


def expected(config: Config, parameters: int) -> Expectation | None:
    """Computes what to expect of a private run; None without privacy.

    Args:
        config: A complete config.
        parameters: Number of parameters that a round trains.

    Raises:
        PrivacyError: No noise keeps this epsilon.
    """
    privacy = config.privacy
    if privacy.unit == "none" or privacy.sample_rate is None or privacy.delta is None:
        return None
    recipe = _recipe(config)
    needed = recipe.needed
    if recipe.on_features and config.task.head == "random":
        needed *= _WITHOUT_NAMES
    signal = _signal(config, parameters)
    remedies = tuple(_remedies(config, parameters, needed / signal)) if signal < needed else ()
    return Expectation(signal, needed, recipe.enough, recipe.evidence, remedies)


def _recipe(config: Config) -> Recipe:
    """The recipe whose evidence is nearest to a config."""
    try:
        parameters = base_of(config.model).parameters
    except ModelError:  # a hub name that is not in the cache
        parameters = 0
    return recipe_for(config.task.name, parameters)


def _signal(config: Config, parameters: int) -> float:
    """The ratio of a config."""
    privacy, training, federation = config.privacy, config.training, config.federation
    shares = shares_of(privacy, training, config.secure_aggregation, federation.cohort_size)
    return signal_to_noise(
        noise=noise_of(privacy, training, federation.rounds, shares),
        steps=federation.rounds * training.local_steps,
        batch_size=training.batch_size,
        clients=federation.cohort_size,
        parameters=parameters,
    )


def _remedies(config: Config, parameters: int, factor: float) -> Iterator[str]:
    """Yields changes that each multiply the ratio by at least a factor."""
    federation, unit = config.federation, config.privacy.unit
    units = config.training.batch_size / (config.privacy.sample_rate or 1.0)
    yield f"{math.ceil(factor * units):,} {unit}s at each client (about {units:,.0f} now)"
    clients = math.ceil(factor**2 * federation.cohort_size)
    yield f"{clients:,} clients of this size in a round ({federation.cohort_size} now)"
    if (epsilon := _enough_epsilon(config, factor)) is not None:
        yield f"privacy.epsilon = {epsilon:g} ({config.privacy.epsilon:g} now), a weaker promise"
    yield f"{max(1, int(parameters / factor**2)):,} trained parameters ({parameters:,} now)"
    if (config.privacy.sample_rate or 1.0) < 1:
        changed = config.model_copy(
            update={
                "privacy": config.privacy.model_copy(update={"sample_rate": 1.0}),
                "training": config.training.model_copy(update={"batch_size": round(units)}),
            }
        )
        try:
            if _signal(changed, parameters) >= factor * _signal(config, parameters):
                yield f"privacy.sample_rate = 1 with training.batch_size = {units:.0f}"
        except PrivacyError:  # no noise keeps the budget with so many units in a step
            return


def _enough_epsilon(config: Config, factor: float) -> float | None:
    """The budget, in two digits, whose noise is smaller by a factor; None if that is no remedy.

    The ratio is inversely proportional to the noise, so the wanted noise is known, and what it costs is
    one question to the accountants.
    """
    privacy, training, federation = config.privacy, config.training, config.federation
    shares = shares_of(privacy, training, config.secure_aggregation, federation.cohort_size)
    plan = calibrated(privacy, training, federation.rounds, shares)
    if isinstance(plan, NoPrivacy) or config.privacy.noise_multiplier is not None:
        return None
    try:
        smaller = replace(plan, noise_multiplier=plan.noise_multiplier / factor)
        spent = accounting.epsilon(smaller.run_events, smaller.delta)
    except PrivacyError:  # so little noise that no epsilon is finite
        return None
    digit: float = 10.0 ** (math.floor(math.log10(spent)) - 1)
    epsilon = round(math.ceil(spent * (1 + _MARGIN) / digit) * digit, 6)
    return epsilon if epsilon <= _LARGEST_EPSILON else None
