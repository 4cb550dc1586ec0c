"""What all trials of a search share, and the config of one trial."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedslm import config as configuration
from fedslm import layout, validation
from fedslm.config import Config
from fedslm.config.sections import content_sha256
from fedslm.errors import (
    ConfigError,
    FederationError,
    FedslmError,
    PrivacyError,
    Problem,
    TrainingError,
    Unusable,
)
from fedslm.privacy import accounting, calibration
from fedslm.recipes import completed
from fedslm.recipes.choice import is_incomplete
from fedslm.recipes.facts import base_of
from fedslm.recipes.table import recipe_for
from fedslm.records import Event
from fedslm.storage import json_text, write_text
from fedslm.tuning import public
from fedslm.tuning.public import Sides
from fedslm.tuning.space import Values

_PUBLIC = "public"
# The accountants check every plan; a trial with little noise would be refused, so it sees more copies.
_EASILY_CHECKED = 200.0
_ROOM = 1.001
_FEW = 0.1


@dataclass(frozen=True)
class Setting:
    """What all trials share.

    Attributes:
        config: The complete config of the real run; only its data are the public records.
        recipe: Name of the recipe whose space is searched.
        completes: Whether that recipe completed the config.
        units: Units of a client in the real run: a public number.
        sides: How the public records were divided.
        labels: Class names; empty for tasks without.
    """

    config: Config
    recipe: str
    completes: bool
    units: int
    sides: Sides
    labels: tuple[str, ...]

    @property
    def scale(self) -> float:
        """A trial's units of a client over those of the real run, at most 1."""
        return min(1.0, self.sides.per_client * self.sides.copies / self.units)

    @property
    def own(self) -> str:
        """What trial 0 is called."""
        return "the recipe's own settings" if self.completes else "the config's own settings"

    def notes(self) -> list[str]:
        """Returns what a reader of the result must know."""
        sides, unit = self.sides, self.config.privacy.unit
        found = [
            f"trained on {sides.trained} public {unit}s, measured on {sides.held_out} others; no "
            f"private record was read, and nothing was charged",
            "the noise is that of the real run; the result is about noise, not a privacy promise: "
            "public records need none",
        ]
        if sides.per_client < self.units:
            shown = f"{sides.per_client:.3g} public {unit}s a client stand in for {self.units}"
            each = f", each {sides.copies} times" if sides.copies > 1 else ""
            found.append(
                f"{shown}{each}: batch size and noise multiplier are multiplied by {self.scale:.3g}, "
                f"so that noise over signal in a step is that of the real run"
            )
        if sides.per_client < self.units * _FEW:
            found.append(
                "so few public records vary from one set to the next; give more for a surer result"
            )
        return found


def fingerprint(config: Config) -> str:
    """Hash of what determines a search."""
    units = config.privacy.units_per_client
    return content_sha256({**config.hashed_content(), "units_per_client": units})


def stored(setting: Setting, directory: Path, sha256: str) -> None:
    """Writes the setting into the directory of a search."""
    values = {**asdict(setting), "config": setting.config.model_dump(mode="json")}
    write_text(directory / layout.TUNE_STATE, json_text({"sha256": sha256, **values}, indent=2))


def read(directory: Path, sha256: str) -> Setting | None:
    """Reads what :func:`stored` wrote; None if nothing was.

    Raises:
        Unusable: The directory belongs to another config, or is not one of a search.
    """
    path = directory / layout.TUNE_STATE
    if not path.exists():
        return None
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = values.pop("sha256")
        if found == sha256:
            values["config"] = configuration.from_mapping(values["config"])
            values |= {"sides": Sides(**values["sides"]), "labels": tuple(values["labels"])}
            return Setting(**values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise Unusable(f"{path} cannot be read: {error}; choose another --directory") from error
    raise Unusable(
        f"{directory} holds trials of another config (hash {str(found)[:12]}, now {sha256[:12]}); "
        f"choose another --directory, or give that config"
    )


def prepared(config: Config, directory: Path) -> Setting:
    """Reads and divides the public records, and completes the config without the private ones.

    Raises:
        ConfigError: Sections contradict each other.
        FedslmError: The public records or the base cannot be used.
    """
    data, task, privacy, seed = config.data, config.task, config.privacy, config.run.seed
    records = public.read(data, task, privacy, seed)
    place = directory.absolute() / _PUBLIC
    public.write_labels(records, place)
    with_initial = config.lora.initial == "eva"
    data, task = public.standing_in(records, place, with_initial=with_initial)
    engine = config.engine.model_copy(update={"policy": None, "nodes": None})
    if engine.name == "deployed":
        engine = engine.model_copy(update={"name": "local"})
    made = completed(config.model_copy(update={"data": data, "task": task, "engine": engine}))
    validation.check(made.config)
    recipe = made.recipe or recipe_for(task.name, base_of(config.model).parameters)
    units = privacy.units_per_client or _units(made.config)

    def copies(per_client: float) -> int:
        return _copies(made.config, per_client, units)

    wanted = public.Wanted(config.federation.num_clients, units, copies)
    column = privacy.unit_column if privacy.unit == "user" else None
    sides = public.write(records, place, wanted, unit_column=column, seed=seed)
    is_new = made.recipe is not None
    return Setting(made.config.resolved(), recipe.name, is_new, units, sides, records.labels)


def check(config: Config) -> None:
    """Refuses a config that a search cannot be about.

    Raises:
        ConfigError: There is no privacy, no public source, or no public size; or the public records
            would be start and training data in one.
        DataError: The public records are private, or those of the evaluation.
    """
    public.source_of(config.data)
    problems = []
    if config.privacy.unit == "none":
        message = 'value "none": `fedslm tune` is for private runs; set "record" or "user"'
        problems.append(Problem("privacy.unit", message))
    elif config.privacy.shares_noise:
        message = 'value "distributed" cannot be searched with yet: search with "local"'
        problems.append(Problem("privacy.noise", message))
    elif is_incomplete(config) and config.privacy.units_per_client is None:
        message = (
            "is required: the private records are not read, so they are not counted; set a public "
            "estimate of a client's units, such as 1000"
        )
        problems.append(Problem("privacy.units_per_client", message))
    if config.task.head == "public":
        message = (
            'value "public": a search trains on the public records, so it cannot also start from them; '
            'search with task.head="labels"'
        )
        problems.append(Problem("task.head", message))
    if problems:
        raise ConfigError(problems)


def _units(config: Config) -> int:
    """Units of a client, by the expected size of a step."""
    return max(1, round(config.training.batch_size / (config.privacy.sample_rate or 1.0)))


def _copies(config: Config, per_client: float, units: int) -> int:
    """How often a trial must see each unit, so that its plan can be checked."""
    most, copies = max(1, -int(-units // per_client)), 1
    while copies < most and _spent(config, min(1.0, per_client * copies / units)) > _EASILY_CHECKED:
        copies = min(most, 2 * copies)
    return copies


def noise_of(config: Config) -> float:
    """Noise multiplier of the real run of a complete config.

    Raises:
        PrivacyError: No noise keeps its epsilon.
    """
    return calibration.noise_of(config.privacy, config.training, config.federation.rounds)


def _spent(config: Config, scale: float) -> float:
    """Epsilon of a trial's own plan; infinite where it cannot be computed."""
    privacy = config.privacy
    steps = config.federation.rounds * config.training.local_steps
    event = Event(privacy.sample_rate or 1.0, noise_of(config) * scale, steps)
    try:
        return accounting.epsilon([event], privacy.delta or 0.0)
    except PrivacyError:
        return float("inf")


def real_config(setting: Setting, values: Values) -> Config:
    """Returns the config of the real run with a trial's values, on the public records.

    Raises:
        ConfigError: A value is out of its range.
    """
    overridden = configuration.with_overrides(setting.config.model_dump(), values)
    return configuration.from_mapping(overridden)


def trial_config(setting: Setting, values: Values, directory: Path) -> Config:
    """Returns the config of one trial.

    Its step has the real run's noise over signal: where fewer units stand in for those of the real run,
    batch size and noise multiplier are scaled alike. Its epsilon is what that noise costs: no promise,
    and nothing that was private is read.

    Raises:
        FedslmError: A value is out of its range, or no noise keeps the real run's epsilon.
    """
    real = real_config(setting, values)
    scale = setting.scale
    noise, spent = noise_of(real) * scale, _spent(real, scale)
    if spent == float("inf"):
        raise PrivacyError(f"noise_multiplier={noise:.3g} is too small to be accounted for")
    privacy: dict[str, Any] = {
        "noise_multiplier": noise,
        "epsilon": spent * _ROOM,
        "metric_noise_multiplier": None,
        "spare_rounds": 0,
    }
    if real.privacy.unit == "user":
        privacy["unit_column"] = public.UNIT
    rounds = real.federation.rounds
    federation = {"nodes": (), "min_clients": None, "evaluate_every": rounds}
    batch_size = max(1, round(real.training.batch_size * scale))
    run = {"name": directory.name, "directory": str(directory)}
    fields = Config.model_fields
    return real.model_copy(
        update={
            "run": real.run.model_copy(update=run),
            "training": real.training.model_copy(update={"batch_size": batch_size}),
            "privacy": real.privacy.model_copy(update=privacy),
            "federation": real.federation.model_copy(update=federation),
            **{name: fields[name].default for name in ("attack", "personalization", "distill")},
        }
    )


def tried(error: FedslmError) -> bool:
    """Whether an error says something about a trial's settings, not about the machine."""
    return isinstance(error, PrivacyError | ConfigError | TrainingError | FederationError)
