"""Base of all sections: frozen, without unknown keys; some values have two accepted forms."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


def _split(value: object) -> object:
    """Accepts ``"a, b"`` where a list is expected: Flower's run config has no lists."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    if isinstance(value, list | tuple):
        if any(isinstance(part, str) and "," in part for part in value):
            raise ValueError("a name may not hold a comma: Flower's run config separates names by it")
        return tuple(part.strip() if isinstance(part, str) else part for part in value)
    return value


def _split_numbers(value: object) -> object:
    """Accepts ``"4, 8"`` and ``4`` where a list of numbers is expected."""
    if isinstance(value, str):
        parts = [part.strip() for part in value.split(",") if part.strip()]
        wrong = [part for part in parts if not part.isdecimal() or len(part) > 18]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is not a whole number; write them as in 4, 8")
        return tuple(map(int, parts))
    if isinstance(value, list):
        return tuple(value)
    return (value,) if isinstance(value, int) and not isinstance(value, bool) else value


def _blank_is_none(value: object) -> object:
    """Reads ``""`` as absent: neither TOML nor Flower's run config has None."""
    return None if value == "" else value


Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
Ranks = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_split_numbers)]
OptionalText = Annotated[str | None, BeforeValidator(_blank_is_none)]
OptionalNumber = Annotated[float | None, BeforeValidator(_blank_is_none)]
OptionalCount = Annotated[int | None, BeforeValidator(_blank_is_none)]


def _one_name(value: object) -> object:
    """Reads "patient" as "user": all records of one person, whatever the data calls that person."""
    return "user" if value == "patient" else value


def _count_or_auto(value: object) -> object:
    """Refuses anything but "auto" and a whole number >= 1, in one error instead of one for each."""
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise PydanticCustomError("count_or_auto", 'should be a whole number >= 1, or "auto"')


CountOrAuto = Annotated[int | Literal["auto"], BeforeValidator(_count_or_auto)]
DeviceName = Literal["auto", "cpu", "cuda", "mps"]
Unit = Annotated[Literal["none", "record", "user", "client"], BeforeValidator(_one_name)]
TaskName = Literal[
    "classification",
    "multi-label",
    "token-classification",
    "causal-lm",
    "instruction",
    "seq2seq",
    "preference",
]


class Section(BaseModel):
    """A frozen section that refuses unknown keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
