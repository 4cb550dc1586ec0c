"""Values that several test files share."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedslm import validation
from fedslm.config import from_mapping
from fedslm.errors import ConfigError

WORDS = {
    "heart": ["chest", "pain", "palpitations", "ecg", "cardiac", "murmur", "pressure", "left", "arm"],
    "bone": ["fracture", "wrist", "ankle", "fall", "cast", "swelling", "knee", "joint", "plaster"],
}

PRIVATE = {
    "unit": "record",
    "epsilon": 8.0,
    "delta": 1e-5,
    "clip_norm": 1.0,
    "sample_rate": 0.2,
}
PATIENT = {**PRIVATE, "unit": "user", "unit_column": "patient", "max_records_per_unit": 3}

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
        validation.check(from_mapping(values))
    return {problem.key: problem.message for problem in caught.value.problems}


_ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}
_DECODER = {**_ENCODER, "num_key_value_heads": 1, "attention_dropout": 0.1}
_GEMMA = {**_DECODER, "head_dim": 16}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", _ENCODER),
    "distilbert": ("DistilBertConfig", {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}),
    "gemma": ("GemmaConfig", _GEMMA),
    "gemma2": ("Gemma2Config", {**_GEMMA, "sliding_window": 8}),
    "gemma3_text": ("Gemma3TextConfig", {**_GEMMA, "sliding_window": 8, "sliding_window_pattern": 2}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}),
    "llama": ("LlamaConfig", _DECODER),
    "mistral": ("MistralConfig", {**_DECODER, "sliding_window": 8}),
    "modernbert": (
        "ModernBertConfig",
        {**_ENCODER, "local_attention": 8, "global_attn_every_n_layers": 2, "mlp_dropout": 0.1},
    ),
    "phi": ("PhiConfig", {**_DECODER, "resid_pdrop": 0.1, "embd_pdrop": 0.1}),
    "phi3": ("Phi3Config", {**_DECODER, "resid_pdrop": 0.1}),
    "qwen2": ("Qwen2Config", _DECODER),
    "qwen3": ("Qwen3Config", {**_DECODER, "head_dim": 16}),
    "roberta": ("RobertaConfig", _ENCODER),
    "smollm3": ("SmolLM3Config", {**_DECODER, "no_rope_layer_interval": 2}),
    "t5": (
        "T5Config",
        {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2},
    ),
    "xlm-roberta": ("XLMRobertaConfig", _ENCODER),
}


def family_config(family: str, **changes: Any) -> Any:
    """A tiny transformers config of an architecture, with dropout, for the embedded tokenizer."""
    import transformers

    name, sizes = CONFIGS[family]
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    if family == "t5":
        special["decoder_start_token_id"] = 0
    return getattr(transformers, name)(**{"vocab_size": 1744, **special, **sizes, **changes})


@contextmanager
def disk_full(limit: int) -> Iterator[None]:
    """No file of this process can grow beyond ``limit`` bytes (Python ignores SIGXFSZ)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Separable two-class rows with a natural client, its own patients, and travellers between clients."""
    generator = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        label = ("heart", "bone")[index % 2]
        words = generator.choice(WORDS[label], size=int(generator.integers(3, 9)))
        site = f"site-{index % 3}"
        owners = {"patient": f"{site} {index // 15}", "traveller": f"traveller {index // 6}"}
        rows.append({"text": " ".join(words), "label": label, "client": site, **owners})
    return rows


def write_base(directory: Path, family: str, task: str, **changes: Any) -> Path:
    """Writes a randomly initialised model of an architecture, as pretraining would leave it."""
    import torch
    import transformers

    from fedslm.models.base import DEMO_DIRECTORY

    kind = "AutoModel"
    if task in ("causal-lm", "instruction", "preference"):
        kind = "AutoModelForCausalLM"
    if task == "seq2seq":
        kind = "AutoModelForSeq2SeqLM"
    if family == "modernbert":
        kind = "AutoModelForMaskedLM"  # its classifiers have a dense layer that comes from there
    torch.manual_seed(0)
    getattr(transformers, kind).from_config(family_config(family, **changes)).save_pretrained(directory)
    transformers.AutoTokenizer.from_pretrained(DEMO_DIRECTORY).save_pretrained(directory)
    return directory
