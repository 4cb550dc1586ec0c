"""Tiny pairs: a finished federated run, a larger student, public records; everything is the real thing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedslm.config import DistillConfig, section_from
from support.finished import rows_of
from support.tiny import write_base, write_rows

LARGER = {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
FEW: dict[str, Any] = {
    "steps": 6,
    "batch_size": 8,
    "micro_batch_size": 4,
    "learning_rate": 0.01,
    "rank": 4,
    "device": "cpu",
}


class Told:
    """A watcher that remembers."""

    def __init__(self) -> None:
        self.stages: list[str] = []

    def on_progress(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Remembers the stage."""
        self.stages.append(stage)


class Interrupted(Exception):
    """What stops a distillation on its way."""


class Stops:
    """A watcher that stops the student after some steps, or in another stage."""

    def __init__(self, stage: str, after: int) -> None:
        self._stage, self._after = stage, after

    def on_progress(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Stops."""
        if stage == self._stage and done >= self._after:
            raise Interrupted


def public(directory: Path, count: int = 24, seed: int = 5) -> Path:
    """Public records."""
    path = directory / "public.jsonl"
    write_rows(path, rows_of(count, seed))
    return path


def student(directory: Path, kind: str, **changes: Any) -> Path:
    """A larger model with the same tokenizer."""
    family = "bert" if kind == "classification" else "llama"
    return write_base(directory / f"student-{kind}", family, kind, **{**LARGER, **changes})


def settings(**changes: Any) -> DistillConfig:
    """A few steps."""
    return section_from(DistillConfig, "distill", {**FEW, **changes})
