"""The adapter that a run saved, held against what the run reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedslm.config import Config
from fedslm.models.loaded import load
from fedslm.storage import load_adapter


def check_adapter(config: Config, report: dict[str, Any]) -> None:
    """What PEFT saved is the adapter that the report names, when it is put on a fresh base."""
    from peft import PeftModel

    from fedslm.models.base import load_base, load_tokenizer, resolve

    directory = Path(report["directory"])
    state = json.loads((directory / "checkpoint" / "state.json").read_text())
    trained = load_adapter(directory / "checkpoint" / state["files"]["moving"]["name"])
    whole = load_adapter(directory / "frozen.safetensors").merged(trained)
    assert whole.sha256() == report["adapter_sha256"]
    labels = len(report["labels"])
    tokenizer = load_tokenizer(resolve(config.model))
    fresh = load_base(config.model, config.task, labels, tokenizer)
    plain: Any = PeftModel.from_pretrained(fresh, directory / "adapter").eval()
    own = load(config.model, config.lora, config.task, labels)
    own.adapter.write(whole)
    own.adapter.network.eval()
    import torch

    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.ones(1, 4).long()}
    if config.task.name == "seq2seq":
        inputs["decoder_input_ids"] = torch.tensor([[0, 5, 6]])
    with torch.inference_mode():
        expected = own.adapter.network(**inputs).logits
        assert torch.equal(plain(**inputs).logits, expected)
