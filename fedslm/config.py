"""Strict, frozen configuration sections, from TOML or from Flower's flat run config.

Every error names its dotted key, the value, the bound and the remedy, and all of them are reported at
once. Contradictions between sections live in :mod:`fedslm.contradictions`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from fedslm.errors import ConfigError, Problem


def _split(value: object) -> object:
    """Accepts ``"a, b"`` where a list is expected: Flower's run config has no lists."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    if isinstance(value, list | tuple):
        if any(isinstance(part, str) and "," in part for part in value):
            raise ValueError("a name may not hold a comma: Flower's run config separates names by it")
        return tuple(value)
    return value


def _blank_is_none(value: object) -> object:
    """Reads ``""`` as absent: neither TOML nor Flower's run config can say None."""
    return None if value == "" else value


Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
OptionalText = Annotated[str | None, BeforeValidator(_blank_is_none)]
OptionalNumber = Annotated[float | None, BeforeValidator(_blank_is_none)]
OptionalCount = Annotated[int | None, BeforeValidator(_blank_is_none)]
Unit = Literal["none", "record", "patient", "client"]


class Section(BaseModel):
    """A frozen section that refuses unknown keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class RunConfig(Section):
    """What this run is called and where it lives."""

    name: str = Field("run", min_length=1, pattern=r"^[A-Za-z0-9._-]+$")
    """Name of the run: letters, digits, dot, dash and underscore."""
    directory: OptionalText = None
    """Run directory; absent means runs/NAME."""
    seed: int = Field(0, ge=0)
    """Seed of everything that may be repeated. Privacy noise never comes from it."""


class ModelConfig(Section):
    """The frozen base model."""

    base: str = Field(min_length=1)
    """Hub name, local directory, or "demo" for the embedded tiny model."""
    revision: OptionalText = None
    """Hub revision (commit, tag or branch)."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the frozen base; the adapter is always float32."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where clients compute."""


class LoraConfig(Section):
    """The adapter."""

    rank: int = Field(8, ge=1, le=1024)
    """Rank r of B·A."""
    alpha: float = Field(8.0, gt=0)
    """Scaling numerator; the update is (alpha / rank)·B·A."""
    target_modules: Names = ("all-linear",)
    """Names of layers to adapt (suffixes such as "query"), or "all-linear"."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """LoRA dropout; must be 0 under privacy."""


class DataConfig(Section):
    """Where examples come from and, in simulation, whose they are."""

    source: str = Field(min_length=1)
    """Hub name, a local file or directory, or "demo"."""
    train_split: str = "train"
    """Split (or file stem) that is shared out among the clients: private."""
    evaluation_split: str = "test"
    """Split (or file stem) that the server evaluates on: public."""
    evaluation_source: OptionalText = None
    """Source of the evaluation split if it is not `source`."""
    text_column: str = "text"
    """Column with the text."""
    label_column: OptionalText = "label"
    """Column with the label (classification, Dirichlet partition)."""
    partition: Literal["iid", "dirichlet", "natural"] = "iid"
    """How a simulation shares the training split out among clients."""
    dirichlet_alpha: float = Field(0.5, gt=0)
    """Concentration of the Dirichlet partition; small means skewed."""
    natural_column: str = "client"
    """Column that names the client (natural partition); the largest clients are taken."""
    max_evaluation_records: int = Field(2000, ge=1)
    """The evaluation split is cut to this many records."""


class TaskConfig(Section):
    """What is learned."""

    name: Literal["classification", "causal-lm"]
    """Sequence classification or causal language modelling."""
    max_length: int = Field(64, ge=2)
    """Longest sequence in tokens; longer texts are cut."""
    labels: Names = ()
    """Class names; absent means the labels of the public evaluation split."""
    pooling: Literal["native", "mean"] = "native"
    """Classifier input: the architecture's own (CLS/pooler, last token) or the masked mean."""


class TrainingConfig(Section):
    """One client's local work in one round."""

    local_steps: int = Field(10, ge=1, le=1_000_000)
    """Optimizer steps a client takes in a round."""
    batch_size: int = Field(16, ge=1)
    """Records (unit = "patient": patients) in a step; under privacy the public constant that the noisy
    sum is divided by."""
    micro_batch_size: int = Field(32, ge=1)
    """Most records in one forward pass; larger batches are split."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Local optimizer; its state starts anew each round."""
    learning_rate: float = Field(1e-3, gt=0)
    """Local learning rate."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""


class PrivacyConfig(Section):
    """What is asked; :class:`fedslm.privacy.plan.PrivatePlan` is what will run."""

    unit: Unit
    """Whose participation is protected: one record, or all records of one patient (user, author);
    "none" trains without privacy; "client" waits for secure aggregation."""
    unit_column: OptionalText = None
    """Column that says whose a record is (unit = "patient")."""
    max_records_per_unit: OptionalCount = Field(None, ge=1)
    """Most records of one patient in a step, chosen at random; public, never looked up in the data."""
    overlapping: bool = False
    """True if a unit may lie in several clients: the network's epsilon then composes all clients."""
    epsilon: OptionalNumber = Field(None, gt=0)
    """Budget of each client over the whole run."""
    delta: OptionalNumber = Field(None, gt=0, lt=1)
    """Failure probability; well under 1/units of the smallest client."""
    clip_norm: OptionalNumber = Field(None, gt=0)
    """Largest L2 norm of one unit's gradient."""
    sample_rate: OptionalNumber = Field(None, gt=0, le=1)
    """Public probability with which a unit joins a step."""
    noise_multiplier: OptionalNumber = Field(None, gt=0)
    """Noise / clip norm, instead of calibrating to epsilon; epsilon is then the hard limit."""
    batched: bool = False
    """Compute several units in one pass: two to three times faster on a CPU, more on a GPU, but
    rounding lets units touch one another's gradients, and an adapter made for it can blow that up."""
    spare_rounds: int = Field(0, ge=0)
    """Rounds that crashes may cost: charged rounds that were lost are paid from them."""
    metric_noise_multiplier: OptionalNumber = Field(None, gt=0)
    """Noise of a metric on each client's own data, released every round; absent: none leaves."""


class AggregationConfig(Section):
    """How adapters become one."""

    method: Literal["auto", "fedit", "ffa"] = "auto"
    """fedit averages A and B; ffa freezes a shared A; auto is ffa under privacy, else fedit."""
    weights: Literal["uniform", "records"] = "uniform"
    """Weights of the mean; "records" reveals record counts and is refused under privacy."""


class FederationConfig(Section):
    """The rounds."""

    num_clients: int = Field(5, ge=1)
    """Number of clients; the first round waits until exactly so many are there."""
    clients_per_round: OptionalCount = Field(None, ge=1)
    """Cohort size; absent means all. Chosen by seed and round, and no privacy is claimed for it."""
    rounds: int = Field(10, ge=1)
    """Number of rounds."""
    min_replies: int = Field(1, ge=1)
    """With fewer usable replies the round is recorded and the adapter kept."""
    max_failed_rounds: int = Field(3, ge=1)
    """The run stops with what it has after so many failed rounds in a row."""
    evaluate_every: int = Field(1, ge=1)
    """The public split is evaluated every so many rounds, and after the last."""
    round_deadline_seconds: float = Field(3600.0, gt=0)
    """A reply that comes later is counted as late."""
    join_deadline_seconds: float = Field(120.0, gt=0)
    """How long to wait for the population before the first round."""


class EngineConfig(Section):
    """Where the clients of a simulation run."""

    name: Literal["local", "ray"] = "local"
    """local: worker processes (or this process); ray: Flower's simulation."""
    policy: OptionalText = None
    """Policy file that every simulated node enforces; `fedslm policy example` prints one."""
    workers: int = Field(-1, ge=-1)
    """Worker processes; -1 means one for each core, 0 means in this process."""
    threads_per_worker: int = Field(1, ge=1)
    """Threads each worker computes with; small matrices are fastest with one."""


class Config(Section):
    """The whole configuration; only the edges and the round loop see it."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    lora: LoraConfig = LoraConfig()
    data: DataConfig
    task: TaskConfig
    training: TrainingConfig = TrainingConfig()
    privacy: PrivacyConfig
    aggregation: AggregationConfig = AggregationConfig()
    federation: FederationConfig = FederationConfig()
    engine: EngineConfig = EngineConfig()

    def resolved(self) -> Config:
        """Returns the config with every "auto" that needs no machine replaced by its choice."""
        if self.aggregation.method != "auto":
            return self
        method = "fedit" if self.privacy.unit == "none" else "ffa"
        aggregation = self.aggregation.model_copy(update={"method": method})
        return self.model_copy(update={"aggregation": aggregation})

    def sha256(self) -> str:
        """Hash of what determines the result: all but where it runs and what it is called."""
        content = self.resolved().model_dump(mode="json")
        content.pop("engine")
        content["run"] = {"seed": self.run.seed}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def flat(self) -> dict[str, str | int | float | bool]:
        """Returns the config as Flower's flat run config: scalars under dotted keys."""
        flat: dict[str, str | int | float | bool] = {}
        for section, values in self.model_dump(mode="json").items():
            for key, value in values.items():
                text = ", ".join(value) if isinstance(value, list) else value
                flat[f"{section}.{key}"] = "" if text is None else text
        return flat


def from_mapping(values: Mapping[str, Any]) -> Config:
    """Builds a config from nested mappings.

    Raises:
        ConfigError: Everything that is wrong, with dotted keys.

    >>> from_mapping({"model": {"base": "demo"}})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    fedslm.errors.ConfigError: 3 problems in the configuration
      data: is missing; add a [data] section
      task: is missing; add a [task] section
      privacy: is missing; add a [privacy] section
    """
    try:
        return Config.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError([_problem(detail) for detail in error.errors()]) from None


def from_toml(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Reads a config file and applies ``section.key=value`` overrides.

    Args:
        path: A TOML file.
        overrides: Values are read as TOML where possible, else as text.

    Raises:
        ConfigError: The file is missing, is not TOML, or does not validate.
    """
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError([Problem(str(path), "no such file")]) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError([Problem(str(path), f"cannot be read as TOML: {error}")]) from None
    return from_mapping(with_overrides(values, overrides))


def from_flat(values: Mapping[str, Any]) -> Config:
    """Builds a config from Flower's flat run config (``{"privacy.epsilon": 8.0, …}``)."""
    nested: dict[str, dict[str, Any]] = {}
    for dotted, value in values.items():
        section, _, key = dotted.partition(".")
        nested.setdefault(section, {})[key or section] = value
    return from_mapping(nested)


def with_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Returns nested values with ``section.key=value`` overrides applied.

    >>> with_overrides({"run": {"seed": 1}}, ["run.seed=2", "run.name=a"])
    {'run': {'seed': 2, 'name': 'a'}}
    """
    merged: dict[str, Any] = {
        section: dict(content) if isinstance(content, Mapping) else content
        for section, content in values.items()
    }
    for override in overrides:
        dotted, equals, text = override.partition("=")
        section, dot, key = dotted.strip().partition(".")
        content = merged.setdefault(section, {})
        if not (equals and dot and key) or not isinstance(content, dict):
            message = "is not section.key=value, such as training.local_steps=20"
            raise ConfigError([Problem(f"--set {override}", message)])
        content[key] = _toml_value(text.strip())
    return merged


def to_toml(config: Config) -> str:
    """Writes a config as TOML that :func:`from_toml` reads back."""
    lines: list[str] = []
    for section, values in config.model_dump(mode="json").items():
        lines.append(f"[{section}]")
        for key, value in values.items():
            text = json.dumps("" if value is None else value, ensure_ascii=False)
            lines.append(f"{key} = {text}".replace("\x7f", "\\u007f"))
        lines.append("")
    return "\n".join(lines)


def _toml_value(text: str) -> object:
    """Reads a value as TOML, or else as plain text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


_REMEDIES = {
    "privacy.delta": "use about 1/(10·records of the smallest client)",
    "privacy.epsilon": "smaller is more private; 1 to 8 is common",
    "privacy.sample_rate": "use batch_size / a public estimate of a client's records",
    "privacy.unit": 'use "record" or "patient", or "none" to train without privacy',
    "training.local_steps": "10 to 50 is common",
    "federation.num_clients": "count the hospitals, devices or shards",
}


def _problem(detail: Mapping[str, Any]) -> Problem:
    """Turns one pydantic error into key, value, bound and remedy."""
    location = [str(part) for part in detail["loc"] if not str(part).startswith("function-")]
    key = ".".join(location[:2])
    match detail["type"]:
        case "missing" if len(location) == 1:
            message = f"is missing; add a [{key}] section"
        case "missing":
            message = "is missing and has no default"
        case "extra_forbidden":
            message = f"is not known{_did_you_mean(location)}"
        case _:
            shown = json.dumps(detail["input"], default=str)
            message = f"value {shown}: {detail['msg'].removeprefix('Input ')}"
    remedy = _REMEDIES.get(key)
    return Problem(key, f"{message}; {remedy}" if remedy else message)


def _did_you_mean(location: list[str]) -> str:
    """Names the nearest known key."""
    fields = Config.model_fields
    if len(location) > 1:
        section = fields[location[0]].annotation
        fields = section.model_fields  # type: ignore[union-attr]
    nearest = difflib.get_close_matches(location[-1], fields, n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]!r}?" if nearest else f"; known: {', '.join(fields)}"
