"""The constants of a run, which the server sends to every client."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import fedslm
from fedslm.aggregation.methods import method_of
from fedslm.config import (
    AggregationConfig,
    CompressionConfig,
    DataConfig,
    LoraConfig,
    MethodName,
    ModelConfig,
    PersonalizationConfig,
    TaskConfig,
    TrainingConfig,
)
from fedslm.errors import FederationError, PolicyRefused, PrivacyError
from fedslm.privacy.plan import RunPlan
from fedslm.privacy.plan import from_json as plan_from_json
from fedslm.protocol import bounds

_SECTIONS = {
    "model": ModelConfig,
    "lora": LoraConfig,
    "data": DataConfig,
    "task": TaskConfig,
    "training": TrainingConfig,
    "aggregation": AggregationConfig,
    "compression": CompressionConfig,
    "personalization": PersonalizationConfig,
}
_LARGEST_SEED, _MOST_LABELS, _MOST_NAMES = (1 << 63) - 1, 10_000, 10_000
_LONGEST_NAME, _LONGEST_HASH, _LONGEST_PLAN = 200, 64, 4096
_LONGEST_TEXTS = {
    "run_id": _LONGEST_NAME,
    "directory": 4096,
    "version": 64,
    "config_sha256": _LONGEST_HASH,
    "base_sha256": _LONGEST_HASH,
    "frozen_sha256": _LONGEST_HASH,
}


@dataclass(frozen=True)
class Setup:
    """The constants of a run; every request repeats them, since a client may be new.

    Attributes:
        run_id: Identifier of the run.
        seed: The run's seed; private sampling and noise do not use it.
        directory: The run directory (simulation).
        version: fedslm's version at the server.
        aggregation: How adapters are aggregated; the method is resolved.
        compression: The encoding of updates.
        personalization: Personalization at the clients after the last round.
        labels: Class names, which are public.
        plan: The calibrated plan.
        config_sha256: Hash of the run's config.
        base_sha256: Hash of the base model that the server uses.
        frozen_sha256: Hash of the frozen tensors that every client must use.
    """

    run_id: str
    seed: int
    directory: str
    version: str
    model: ModelConfig
    lora: LoraConfig
    data: DataConfig
    task: TaskConfig
    training: TrainingConfig
    aggregation: AggregationConfig
    compression: CompressionConfig
    personalization: PersonalizationConfig
    labels: tuple[str, ...]
    plan: RunPlan
    config_sha256: str = ""
    base_sha256: str = ""
    frozen_sha256: str = ""

    @property
    def method(self) -> MethodName:
        """The resolved method."""
        return method_of(self.aggregation)

    @property
    def plan_sha256(self) -> str:
        """Hash that identifies the plan, in ledgers and in cohorts."""
        return hashlib.sha256(self.plan.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Serialises the setup."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for section in _SECTIONS:
            values[section] = values[section].model_dump(mode="json")
        values["plan"] = self.plan.to_json()
        return json.dumps(values, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Setup:
        """Reads what :meth:`to_json` wrote.

        Raises:
            FederationError: Another version of fedslm wrote it, it is too long, or its fields differ
                or are out of bounds.
            PolicyRefused: The plan cannot be run.
        """
        values = bounds.parsed(text, bounds.MOST_SETUP_BYTES, "the setup")
        _check_version(values)
        bounds.exactly(values, (field.name for field in dataclasses.fields(cls)), "the setup")
        found: dict[str, Any] = {
            "seed": bounds.count(values, "seed", 0, _LARGEST_SEED),
            "labels": bounds.texts(values, "labels", _MOST_LABELS, _LONGEST_NAME),
        }
        for key, longest in _LONGEST_TEXTS.items():
            found[key] = bounds.text(values, key, longest)
        found["plan"] = _plan_of(values)
        for section, model in _SECTIONS.items():
            bounds.moderate(values[section], section)
            try:
                found[section] = model(**values[section])
            except (ValueError, TypeError) as error:
                problem = bounds.cut(error, 160)
                raise FederationError(f"the setup's {section} cannot be read: {problem}") from error
        for key in ("target_modules", "client_ranks"):
            if len(getattr(found["lora"], key)) > _MOST_NAMES:
                raise FederationError(f"lora.{key} must have at most {_MOST_NAMES} values")
        return cls(**found)


def _check_version(values: object) -> None:
    """Refuses a setup of another version by its name, before comparing its fields with this one's."""
    version = values.get("version") if isinstance(values, dict) else None
    if type(version) is str and version != fedslm.__version__:
        raise FederationError(
            f"server runs {bounds.cut(version, 64)}, this client {fedslm.__version__}"
        )


def _plan_of(values: Mapping[str, Any]) -> RunPlan:
    """Decodes the plan once; refuses one that cannot be run."""
    try:
        return plan_from_json(bounds.text(values, "plan", _LONGEST_PLAN))
    except PrivacyError as error:
        raise PolicyRefused(f"the plan is refused: {error}") from error
