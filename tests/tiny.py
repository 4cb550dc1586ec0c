"""Values that several test files share."""

from __future__ import annotations

from typing import Any

PRIVATE = {
    "unit": "record",
    "epsilon": 8.0,
    "delta": 1e-5,
    "clip_norm": 1.0,
    "sample_rate": 0.2,
}


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
