"""Reads configs from TOML or from Flower's flat run config, and writes them back to TOML.

Every error states its dotted key, the value, the bound and the remedy; all errors are reported at
once.
"""

from __future__ import annotations

import datetime
import difflib
import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from fedslm.config.base import Section
from fedslm.config.former import RENAMED, REPLACED
from fedslm.config.sections import Config
from fedslm.errors import ConfigError, Problem

S = TypeVar("S", bound=Section)
F = TypeVar("F", bound=BaseModel)


Overrides = Sequence[str] | Mapping[str, Any]


def from_mapping(values: Mapping[str, Any]) -> Config:
    """Builds a config from nested mappings.

    Raises:
        ConfigError: All problems, with dotted keys.

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


def section_from(kind: type[S], name: str, values: Mapping[str, Any]) -> S:
    """Builds one section.

    Args:
        kind: The section's class.
        name: The section's name in a config, for errors.
        values: The section's keys.

    Raises:
        ConfigError: All problems, with dotted keys.
    """
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        details = [{**detail, "loc": (name, *detail["loc"])} for detail in error.errors()]
        raise ConfigError([_problem(detail) for detail in details]) from None


def from_toml(path: Path | str, overrides: Overrides = ()) -> Config:
    """Reads a config file and applies overrides.

    Args:
        path: A TOML file.
        overrides: As for :func:`with_overrides`.

    Raises:
        ConfigError: The file is missing, is not TOML, or does not validate.
    """
    remedy = "`fedslm config example` lists files to start from, `fedslm init` writes your own"
    return from_mapping(with_overrides(read_toml(Path(path), remedy), overrides))


def read_file(path: Path, kind: type[F], instead: Mapping[str, object] = {}) -> F:
    """Reads a TOML file that is not a run config, such as ``policy.toml``.

    Args:
        path: The file.
        kind: Class that defines the file's keys.
        instead: Values that replace those of the file.

    Raises:
        ConfigError: The file is missing, is not TOML, or does not validate: all problems, each with the
            file's name, the dotted key, the value, the bound and the meaning of the key.
    """
    values = {**read_toml(path), **instead}
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        found = [_problem(detail, kind) for detail in error.errors()]
        named = [": ".join(filter(None, (path.name, each.key))) for each in found]
        problems = [Problem(key, each.message) for key, each in zip(named, found, strict=True)]
        raise ConfigError(problems) from None


def read_toml(path: Path, remedy: str = "") -> dict[str, Any]:
    """Reads a TOML file's values; skips the byte order mark that editors on Windows write.

    Args:
        path: The file.
        remedy: What to do if there is no such file, for the error.

    Raises:
        ConfigError: The file is missing or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        message = "; ".join(filter(None, ("no such file", remedy)))
        raise ConfigError([Problem(str(path), message)]) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError([Problem(str(path), f"cannot be read as TOML: {error}")]) from None


def from_flat(values: Mapping[str, Any]) -> Config:
    """Builds a config from Flower's flat run config (``{"privacy.epsilon": 8.0, …}``)."""
    nested: dict[str, dict[str, Any]] = {}
    for dotted, value in values.items():
        section, _, key = dotted.partition(".")
        nested.setdefault(section, {})[key or section] = value
    return from_mapping(nested)


def with_overrides(values: Mapping[str, Any], overrides: Overrides) -> dict[str, Any]:
    """Returns nested values with overrides applied.

    Args:
        values: Section to its keys.
        overrides: Dotted key to value; or strings ``section.key=value``, whose values are parsed as
            TOML where possible, and otherwise kept as text.

    Raises:
        ConfigError: An override does not name a section and a key.

    >>> with_overrides({"run": {"seed": 1}}, ["run.seed=2", "run.name=a"])
    {'run': {'seed': 2, 'name': 'a'}}
    >>> with_overrides({"run": {"seed": 1}}, {"run.seed": 2})
    {'run': {'seed': 2}}
    """
    merged: dict[str, Any] = {
        section: dict(content) if isinstance(content, Mapping) else content
        for section, content in values.items()
    }
    pairs = overrides.items() if isinstance(overrides, Mapping) else map(_pair, overrides)
    for dotted, value in pairs:
        section, _, key = str(dotted).strip().partition(".")
        if not (section and key):
            message = 'is not section.key; give overrides such as {"training.local_steps": 20}'
            raise ConfigError([Problem(str(dotted), message)])
        content = merged.setdefault(section, {})
        if not isinstance(content, dict):
            message = (
                f"value {json.dumps(content, default=str)}: should be a section; write [{section}]"
            )
            raise ConfigError([Problem(section, message)])
        content[key] = value
    return merged


def values_of(overrides: Sequence[str]) -> dict[str, Any]:
    """Returns overrides of the command line as dotted key to value.

    Raises:
        ConfigError: One of them does not name a section and a key.

    >>> values_of(["run.seed=2", "run.name=a"])
    {'run.seed': 2, 'run.name': 'a'}
    """
    return {dotted.strip(): value for dotted, value in map(_pair, overrides)}


def _pair(override: str) -> tuple[str, object]:
    """Splits an override into dotted key and value."""
    dotted, equals, text = override.partition("=")
    if not equals or "." not in dotted.strip(". "):
        message = "is not section.key=value, such as training.local_steps=20"
        raise ConfigError([Problem(f"--set {override}", message)])
    return dotted, _toml_value(text.strip())


def to_toml(config: Config) -> str:
    """Writes a config as TOML that :func:`from_toml` can read."""
    lines: list[str] = []
    for section, values in config.model_dump(mode="json").items():
        lines.append(f"[{section}]")
        for key, value in values.items():
            text = json.dumps("" if value is None else value, ensure_ascii=False)
            lines.append(f"{key} = {text}".replace("\x7f", "\\u007f"))
        lines.append("")
    return "\n".join(lines)


def _toml_value(text: str) -> object:
    """Parses a value as TOML, or else as plain text; ``nan`` and dates are treated as text too."""
    try:
        value: object = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    is_nan = isinstance(value, float) and math.isnan(value)
    return text if is_nan or isinstance(value, datetime.date | datetime.time) else value


_REMEDIES = {
    "privacy.delta": "use about 1/(10·records of the smallest client)",
    "privacy.epsilon": "smaller is more private; 1 to 8 is common",
    "privacy.sample_rate": "use batch_size / a public estimate of a client's records",
    "privacy.unit": 'use "record", "user" (or "patient"), or "none" to train without privacy',
    "training.local_steps": "10 to 50 is common",
    "federation.num_clients": "count the hospitals, devices or shards",
}


# Keys that users know from other tools, and why they do not exist here.
_REFUSED = {
    "lora.use_dora": "DoRA's magnitudes are not layers and give no gradient for each record",
    "lora.dora": "DoRA's magnitudes are not layers and give no gradient for each record",
    "lora.bias": "biases stay frozen: LoRA's factors and the task's head are what is trained",
    "lora.modules_to_save": "a task's new head is always trained, embeddings and norms never",
}


def _problem(detail: Mapping[str, Any], kind: type[BaseModel] = Config) -> Problem:
    """Converts a pydantic error to key, value, bound and remedy."""
    location = [str(part) for part in detail["loc"] if not str(part).startswith("function-")]
    key = ".".join(location[:2] if kind is Config else (p for p in location if not p.isdigit()))
    match detail["type"]:
        case _ if not location:
            message = detail["msg"].removeprefix("Value error, ")
        case "missing" if kind is Config and len(location) == 1:
            message = f"is missing; add a [{key}] section"
        case "missing":
            message = "is missing and has no default"
        case "extra_forbidden" if kind is Config and key in RENAMED:
            message = f"was renamed: write {RENAMED[key]}"
        case "extra_forbidden" if key in REPLACED:
            message = REPLACED[key]
        case "extra_forbidden" if kind is Config and key in _REFUSED:
            message = f"is not supported: {_REFUSED[key]}; leave it out"
        case "extra_forbidden":
            message = f"is not known{_did_you_mean(location, kind)}"
        case "model_type" | "dict_type" if kind is Config and len(location) == 1:
            shown = json.dumps(detail["input"], default=str)
            message = f"value {shown}: should be a section; write [{key}]"
        case _:
            shown = json.dumps(detail["input"], default=str)
            message = f"value {shown}: {detail['msg'].removeprefix('Input ')}{_or_this(detail)}"
    remedy = _REMEDIES.get(key) if kind is Config else _meaning(location, kind)
    return Problem(key, f"{message}; {remedy}" if remedy else message)


def _or_this(detail: Mapping[str, Any]) -> str:
    """Suggests the most similar allowed value."""
    allowed = re.findall(r"'([^']+)'", str(detail.get("ctx", {}).get("expected", "")))
    value = str(detail["input"]).lower()
    nearest = difflib.get_close_matches(value, allowed, n=1, cutoff=0.6)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def _did_you_mean(location: list[str], kind: type[BaseModel]) -> str:
    """Suggests the most similar known key."""
    fields = _beside(location, kind)
    nearest = difflib.get_close_matches(location[-1], fields, n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]!r}?" if nearest else f"; known: {', '.join(fields)}"


def _meaning(location: list[str], kind: type[BaseModel]) -> str:
    """Returns the meaning of a key: the first sentence of its description."""
    field = _beside(location, kind).get(location[-1]) if location else None
    first = ((field.description if field else None) or "").replace("\n", " ").split(". ")[0]
    return f"meaning: {first.rstrip('.')}" if first else ""


def _beside(location: list[str], kind: type[BaseModel]) -> dict[str, FieldInfo]:
    """Returns the keys of the section that contains a key."""
    fields = kind.model_fields
    for name in location[:-1]:
        annotation = fields[name].annotation if name in fields else None
        kinds = [each for each in (annotation, *get_args(annotation)) if hasattr(each, "model_fields")]
        fields = kinds[0].model_fields if kinds else {}
    return fields
