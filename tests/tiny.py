"""Values that several test files share."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from fedslm import contradictions
from fedslm.config import from_mapping
from fedslm.errors import ConfigError

PRIVATE = {
    "unit": "record",
    "epsilon": 8.0,
    "delta": 1e-5,
    "clip_norm": 1.0,
    "sample_rate": 0.2,
}
PATIENT = {**PRIVATE, "unit": "patient", "unit_column": "patient", "max_records_per_unit": 3}

BASE: dict[str, dict[str, Any]] = {
    "model": {"base": "demo"},
    "data": {"source": "demo"},
    "task": {"name": "classification"},
    "privacy": {
        "unit": "record",
        "epsilon": 8.0,
        "delta": 1e-5,
        "clip_norm": 1.0,
        "sample_rate": 0.05,
    },
}


def changed(*assignments: tuple[str, Any]) -> dict[str, dict[str, Any]]:
    """The base values with some dotted keys replaced."""
    values = {section: dict(content) for section, content in BASE.items()}
    for dotted, value in assignments:
        section, key = dotted.split(".")
        values.setdefault(section, {})[key] = value
    return values


def problems(values: dict[str, Any]) -> dict[str, str]:
    """Key to message of everything that is wrong."""
    with pytest.raises(ConfigError) as caught:
        contradictions.check(from_mapping(values))
    return {problem.key: problem.message for problem in caught.value.problems}


def family_config(family: str) -> Any:
    """A tiny transformers config of an architecture, for the embedded tokenizer."""
    import transformers

    common = {"vocab_size": 1744, "pad_token_id": 0}
    match family:
        case "bert":
            return transformers.BertConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                **common,
            )
        case "gpt2":
            return transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=128, **common)
        case "llama":
            return transformers.LlamaConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                max_position_embeddings=128,
                **common,
            )
    raise ValueError(family)


@contextmanager
def disk_full(limit: int) -> Iterator[None]:
    """No file of this process can grow beyond ``limit`` bytes (Python ignores SIGXFSZ)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
