"""Completes a private config from a recipe, and says which values came from where."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedslm import layout
from fedslm.aggregation.methods import METHODS, method_of
from fedslm.config import Config
from fedslm.config.tasks import TASKS
from fedslm.errors import ConfigError, Problem, RunError
from fedslm.privacy.calibration import noise_of, shares_of
from fedslm.privacy.planning import signal_to_noise
from fedslm.recipes.facts import Base, base_of, num_classes, simulated_units
from fedslm.recipes.table import Recipe, recipe_for
from fedslm.storage import json_text, write_text

logger = logging.getLogger(__name__)
_REQUIRED = ("clip_norm", "sample_rate", "delta")
# Standard deviation that all noise together may add to a logit: a share of the signal-to-noise ratio.
_LOGIT_NOISE, _LEAST_NOISE, _MOST_NOISE = 0.25, 1.0, 2.2
# Of a rate on features of length 1: above it, steps oscillate.
_BOUND, _BOUND_OF_A_CLASS = 30.0, 20.0
_RECORDS_OF_A_USER = 8
_LINEAR_ONLY = ("aggregation.server_optimizer", "aggregation.server_momentum")
_LARGEST_DELTA = -3  # a power of ten


@dataclass(frozen=True)
class Completed:
    """A config that a recipe completed.

    Attributes:
        config: The complete config; the same one if it left nothing out.
        recipe: The recipe; None if none was needed.
        chosen: Dotted key to the value that the recipe gave.
        own: Dotted key to the user's value where the recipe has another.
        units: Public number of units of a client.
        notes: What else the user should know.
    """

    config: Config
    recipe: Recipe | None = None
    chosen: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Any] = field(default_factory=dict)
    units: int = 0
    notes: tuple[str, ...] = ()

    def lines(self) -> Iterator[str]:
        """Yields lines for a terminal or a page."""
        if self.recipe is None:
            return
        yield f"recipe {self.recipe.name} (measured on {self.recipe.evidence})"
        yield f"  about {self.units} units a client"
        yield from (f"  {key} = {shown(value)}" for key, value in self.chosen.items())
        yield from (f"  {key} = {shown(value)} (your own value)" for key, value in self.own.items())
        yield from (f"  {note}" for note in self.notes)

    @property
    def text(self) -> str:
        """The same lines as one text."""
        return "\n".join(self.lines())

    def as_json(self) -> dict[str, Any]:
        """Returns all of it as JSON values."""
        if self.recipe is None:
            return {}
        return {
            "name": self.recipe.name,
            "evidence": self.recipe.evidence,
            "units_per_client": self.units,
            "counted": self.config.privacy.units_per_client is None,
            "chosen": dict(self.chosen),
            "own": dict(self.own),
            "notes": list(self.notes),
        }


def write_recipe(directory: Path, made: Completed) -> None:
    """Writes which recipe completed the config into a run's directory; nothing if none did."""
    if made.recipe is not None:
        write_text(directory / layout.RECIPE, json_text(made.as_json(), indent=2))
        logger.info("%s", made.text)


def read_recipe(directory: Path) -> dict[str, Any]:
    """Reads what :func:`write_recipe` wrote; empty if no recipe completed the run's config.

    Raises:
        RunError: The file cannot be read.
    """
    path = directory / layout.RECIPE
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    return found if isinstance(found, dict) else {}


def shown(value: object) -> str:
    """Writes a value as a person would."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def is_incomplete(config: Config) -> bool:
    """Whether a config is private and leaves out how: it has an epsilon, and no mechanism."""
    privacy = config.privacy
    return (
        privacy.unit not in ("none", "client")  # no recipe was measured for whole clients
        and privacy.epsilon is not None
        and any(getattr(privacy, key) is None for key in _REQUIRED)
    )


def completed(config: Config, *, deployed: bool = False) -> Completed:
    """Fills in what a private config leaves out; every value that it sets stays.

    A config without privacy, or one that sets delta, clip norm and sample rate, is left unchanged.

    Args:
        config: As it was read: keys that the file does not set are not in ``model_fields_set``.
        deployed: Whether it is for real nodes, whatever ``engine.name`` says now.

    Raises:
        ConfigError: Real nodes take part, and ``privacy.units_per_client`` is not set.
        DataError: The simulated training split cannot be counted.
        ModelError: There is no such base.
        PrivacyError: No noise keeps this epsilon.
    """
    if not is_incomplete(config):
        return Completed(config)
    base, units = base_of(config.model), _units(config, deployed=deployed)
    recipe = recipe_for(config.task.name, base.parameters)
    wanted = _values(config, recipe, base, units)
    mine = {key: _get(config, key) for key in wanted if _is_set(config, key)}
    filled = {key: value for key, value in wanted.items() if key not in mine}
    for key, value in _derived(_with(config, filled), recipe, base).items():
        if _is_set(config, key):
            mine[key] = _get(config, key)
        else:
            filled[key] = wanted[key] = value
    own = {key: value for key, value in mine.items() if value != wanted.get(key)}
    return Completed(
        _with(config, filled), recipe, filled, own, units, tuple(_notes(config, recipe, base))
    )


def _notes(config: Config, recipe: Recipe, base: Base) -> list[str]:
    """What the user should know about a recipe for a config."""
    notes = []
    if config.privacy.units_per_client is None:
        notes.append(
            "the size of a client was counted in the training split and rounded; batch size, rate and "
            "delta follow from it, which epsilon does not cover: set privacy.units_per_client"
        )
    if recipe.on_features and not _fits_rate(config):
        notes.append(
            "the recipe's rate is for SGD with fedavg or fedavgm, so training.learning_rate is left to "
            "you"
        )
    if recipe.on_features and _is_set(config, "task.pooling") and config.task.pooling != "normalized":
        notes.append('the recipe was measured with task.pooling = "normalized", not with yours')
    if recipe.on_features and not base.is_encoder:
        notes.append("the recipe was measured on sentence encoders, and this base is not an encoder")
    return notes


def _units(config: Config, *, deployed: bool) -> int:
    """The public number of units of a client."""
    given = config.privacy.units_per_client
    if given is not None:
        return given
    if deployed or config.engine.name == "deployed":
        message = (
            "is required where real nodes leave privacy.clip_norm, sample_rate or delta out: a public "
            "estimate, such as 1000"
        )
        raise ConfigError([Problem("privacy.units_per_client", message)])
    return simulated_units(
        config.data,
        config.task,
        config.privacy,
        num_clients=config.federation.num_clients,
        seed=config.run.seed,
    )


def _values(config: Config, recipe: Recipe, base: Base, units: int) -> dict[str, Any]:
    """The recipe's values that do not depend on the noise."""
    values: dict[str, Any] = dict(recipe.values)
    if _is_set(config, "task.pooling") and config.task.pooling != "normalized":
        values.pop("task.head", None)  # only a head on normalized features has such a start
    elif recipe.on_features and config.data.has_public_records:
        values["task.head"] = "public"
    if METHODS[method_of(config.resolved().aggregation)].family != "linear":
        values = {key: value for key, value in values.items() if key not in _LINEAR_ONLY}
    if not set(recipe.values) & {"lora.target_modules"} and TASKS[config.task.name].classes != "none":
        values["lora.target_modules"] = base.last
    sample_rate = config.privacy.sample_rate or recipe.sample_rate
    if _is_set(config, "training.batch_size") and config.privacy.sample_rate is None:
        sample_rate = min(1.0, config.training.batch_size / units)  # a step of the user's size
    values["privacy.sample_rate"] = sample_rate
    length = math.sqrt(base.width) if recipe.on_features else 1.0
    values["privacy.clip_norm"] = float(f"{recipe.clip_norm * length:.3g}")
    values["privacy.delta"] = _delta(units)
    values["training.batch_size"] = max(1, round(sample_rate * units))
    if config.lora.client_ranks and "lora.rank" in values:
        values["lora.rank"] = max(config.lora.client_ranks)
    if config.privacy.unit == "user":
        values["privacy.max_records_per_unit"] = _RECORDS_OF_A_USER
    return values


def _delta(units: int) -> float:
    """The largest power of ten that is at most 1 / (10 · units) and 1e-3."""
    return float(10.0 ** min(_LARGEST_DELTA, math.floor(-math.log10(10 * units))))


def _derived(config: Config, recipe: Recipe, base: Base) -> dict[str, Any]:
    """The rate at which the noise of all steps adds a set deviation to a logit.

    The deviation is 1.0 to 2.2, larger where the signal is. A step adds noise of deviation
    η·σ·C / (L·√K) to each weight, for K clients with divisor L. Over T steps, a logit of features of
    norm √d gets √(d·T) times that. Under full sampling σ grows as √T, so the bound fixes η·T: more
    rounds cost no more noise.
    """
    if not (recipe.on_features and _fits_rate(config)):
        return {}
    privacy, training, federation = config.privacy, config.training, config.federation
    steps = (federation.rounds + privacy.spare_rounds) * training.local_steps
    shares = shares_of(privacy, training, config.secure_aggregation, federation.cohort_size)
    noise = noise_of(privacy, training, federation.rounds, shares)
    clip_norm = (privacy.clip_norm or 0.0) / math.sqrt(base.width)
    classes = num_classes(config.data, config.task, config.run.seed)
    signal = signal_to_noise(
        noise=noise,
        steps=steps,
        batch_size=training.batch_size,
        clients=federation.cohort_size,
        parameters=classes * (base.width + 1),
    )
    deviation = min(max(_LOGIT_NOISE * signal, _LEAST_NOISE), _MOST_NOISE)
    root = math.sqrt(federation.cohort_size / steps)
    rate = deviation * training.batch_size * root / (noise * clip_norm)
    rate = min(rate, _BOUND + _BOUND_OF_A_CLASS * classes)
    if config.aggregation.server_optimizer == "fedavgm":  # m sums steps of 1 / (1 - β)
        rate *= 1 - config.aggregation.server_momentum
    return {"training.learning_rate": float(f"{rate / base.width:.3g}")}


def _fits_rate(config: Config) -> bool:
    """Whether the derived rate is one for the config's optimizers."""
    own = config.training.optimizer if _is_set(config, "training.optimizer") else "sgd"
    return own == "sgd" and config.aggregation.server_optimizer in ("fedavg", "fedavgm")


def _is_set(config: Config, key: str) -> bool:
    """Whether the user set a key to a value; "auto" leaves the choice open."""
    section, _, name = key.partition(".")
    part = getattr(config, section)
    return name in part.model_fields_set and getattr(part, name) not in (None, "auto")


def _get(config: Config, key: str) -> Any:
    """Value of a dotted key."""
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def _with(config: Config, values: Mapping[str, Any]) -> Config:
    """Returns the config with values replaced and checked; other keys keep whether they were set."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    update = {}
    for section, changed in sections.items():
        part = getattr(config, section)
        update[section] = type(part)(**{**part.model_dump(exclude_unset=True), **changed})
    return config.model_copy(update=update)
