"""Verified architectures, their usual LoRA targets, and the bases that are refused, with reasons.

Only a base's ``config.json`` is read here: no weights, no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedslm.errors import ModelError

Reads = Literal["both ways", "forwards", "a text, then writes another"]
Configuration = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """An architecture whose private training is verified against plain autograd.

    Attributes:
        name: Its common name.
        reads: How it reads a text: in both directions, forwards, or as an encoder-decoder.
        targets: Suffixes of the layers that LoRA usually adapts.
    """

    name: str
    reads: Reads
    targets: tuple[str, ...]


_SEPARATE = ("q_proj", "k_proj", "v_proj", "o_proj")

PROVED = {
    "bert": Family("BERT", "both ways", ("query", "value")),
    "distilbert": Family("DistilBERT", "both ways", ("q_lin", "v_lin")),
    "gemma": Family("Gemma", "forwards", _SEPARATE),
    "gemma2": Family("Gemma 2", "forwards", _SEPARATE),
    "gemma3_text": Family("Gemma 3 (text)", "forwards", _SEPARATE),
    "gpt2": Family("GPT-2", "forwards", ("c_attn",)),
    "llama": Family("Llama", "forwards", _SEPARATE),
    "mistral": Family("Mistral", "forwards", _SEPARATE),
    "modernbert": Family("ModernBERT", "both ways", ("Wqkv", "attn.Wo")),
    "phi": Family("Phi", "forwards", ("q_proj", "k_proj", "v_proj", "dense")),
    "phi3": Family("Phi-3", "forwards", ("qkv_proj", "o_proj")),
    "qwen2": Family("Qwen2", "forwards", _SEPARATE),
    "qwen3": Family("Qwen3", "forwards", _SEPARATE),
    "roberta": Family("RoBERTa", "both ways", ("query", "value")),
    "smollm3": Family("SmolLM3", "forwards", _SEPARATE),
    "t5": Family("T5", "a text, then writes another", ("q", "v")),
    "xlm-roberta": Family("XLM-RoBERTa", "both ways", ("query", "value")),
}
USUAL = "usual"  # value of lora.target_modules: the family's own targets
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_BATCH_ROPE = frozenset({"dynamic", "longrope"})
_EMBEDDINGS = frozenset(
    {
        "embed_tokens",
        "embeddings",
        "lm_head",
        "position_embeddings",
        "shared",
        "tok_embeddings",
        "token_type_embeddings",
        "word_embeddings",
        "wpe",
        "wte",
    }
)


def configuration(directory: Path) -> Configuration:
    """Reads a base's ``config.json``.

    Raises:
        ModelError: The file is missing or is not valid JSON.
    """
    try:
        values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{directory}/config.json cannot be read: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise ModelError(f"{directory}/config.json does not say a model_type")
    return values


def check(base: Configuration, targets: tuple[str, ...], *, private: bool) -> None:
    """Refuses a base or targets that cannot be trained, before data or weights are read.

    Args:
        base: Content of ``config.json``.
        targets: ``lora.target_modules``.
        private: Whether training is private.

    Raises:
        ModelError: The base or a target cannot be trained; the message gives the reason.
    """
    check_targets(targets)
    usual_targets(base["model_type"], targets)
    reasons = dict.fromkeys([*_refusals(base), *(couplings(base) if private else ())])
    if reasons:
        raise ModelError("; ".join(reasons))


def usual_targets(model_type: str, targets: tuple[str, ...]) -> tuple[str, ...]:
    """Replaces ``"usual"`` with the family's own layers; other targets stay unchanged.

    Raises:
        ModelError: The usual layers of this architecture are not known.

    >>> usual_targets("gpt2", ("usual",))
    ('c_attn',)
    """
    if targets != (USUAL,):
        return targets
    if model_type not in PROVED:
        raise ModelError(
            f"lora.target_modules={USUAL!r} is not known for {model_type}; name layers or use "
            f'"all-linear"'
        )
    return PROVED[model_type].targets


def check_targets(targets: tuple[str, ...]) -> None:
    """Refuses LoRA on embeddings.

    Raises:
        ModelError: A target names an embedding.
    """
    named = sorted(name for name in targets if name.rsplit(".", 1)[-1] in _EMBEDDINGS)
    if named:
        raise ModelError(
            f"lora.target_modules={list(targets)} names {', '.join(named)}: LoRA on embeddings gives "
            f"no gradient for each record; name linear layers"
        )


def couplings(base: Configuration) -> Iterator[str]:
    """Yields why a base cannot be trained privately: it couples records, or is not verified."""
    kinds = sorted(_rope_types(base) & _BATCH_ROPE)
    if kinds:
        yield (
            f"rope_type in {kinds} depends on the longest record of a batch and so couples records; "
            f"use a base without it, or train without privacy"
        )
    yield from _experts(base)
    if base["model_type"] not in PROVED:
        known = ", ".join(sorted(PROVED))
        yield (
            f"model_type={base['model_type']!r} is not verified to treat each record separately; "
            f"verified are {known}; use one of them, or train without privacy"
        )


def _refusals(base: Configuration) -> Iterator[str]:
    """Yields why a base cannot be trained at all."""
    yield from _experts(base)
    if base.get("quantization_config"):
        method = dict(base["quantization_config"]).get("quant_method", "an unnamed method")
        yield (
            f"the base is stored quantised ({method}); use its original weights, with "
            f'model.quantization="int8" or "int4" if they are too large'
        )


def _experts(base: Configuration) -> Iterator[str]:
    """Yields a reason if the base is a mixture of experts, by its keys or its name."""
    number = max((base[key] for key in _EXPERTS if isinstance(base.get(key), int)), default=0)
    if number > 1 or "moe" in base["model_type"] or base["model_type"] == "mixtral":
        yield (
            "a mixture of experts routes records of a batch together, and LoRA does not reach its "
            "experts; use a dense base"
        )


def _rope_types(base: Configuration) -> set[str]:
    """Returns all kinds of position scaling in a config, also those given per layer kind."""
    scaling = base.get("rope_scaling") or base.get("rope_parameters") or {}
    each = [scaling, *scaling.values()] if isinstance(scaling, Mapping) else []
    found = {item.get("rope_type", item.get("type")) for item in each if isinstance(item, Mapping)}
    return {str(kind) for kind in found if kind}
