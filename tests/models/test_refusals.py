"""What cannot be done is refused from config.json alone, with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.tiny import PRIVATE, changed, problems, write_base

from fedslm import simulation
from fedslm.config import Config, LoraConfig, ModelConfig, TaskConfig
from fedslm.errors import ModelError
from fedslm.models.base import DEMO_DIRECTORY, check_early, device_of, load_tokenizer
from fedslm.models.loaded import load

LLAMA = {"model_type": "llama", "vocab_size": 1744}
ALWAYS: dict[str, tuple[dict[str, Any], str]] = {
    "experts by key": ({**LLAMA, "num_local_experts": 8}, "mixture of experts"),
    "shared experts": ({"model_type": "deepseek_v3", "n_routed_experts": 64}, "mixture of experts"),
    "experts by name": ({"model_type": "qwen3_moe"}, "mixture of experts"),
    "stored quantised": (
        {**LLAMA, "quantization_config": {"quant_method": "gptq"}},
        r"stored quantised \(gptq\).*model.quantization",
    ),
}
IN_PRIVATE: dict[str, tuple[dict[str, Any], str]] = {
    "dynamic positions": ({**LLAMA, "rope_scaling": {"type": "dynamic"}}, "couples records"),
    "long positions": (
        {"model_type": "phi3", "rope_parameters": {"rope_type": "longrope"}},
        "couples records",
    ),
    "recurrent": ({"model_type": "mamba"}, "not verified.*llama.*without privacy"),
    "unproved": ({"model_type": "opt"}, "not verified"),
}


def base_of(directory: Path, values: dict[str, Any]) -> ModelConfig:
    """A base of which there is no more than its config."""
    (directory / "config.json").write_text(json.dumps(values))
    return ModelConfig(base=str(directory))


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("name", ALWAYS)
def test_refused_with_and_without_privacy(name: str, private: bool, tmp_path: Path) -> None:
    """Experts, and weights that are already quantised."""
    values, reason = ALWAYS[name]
    with pytest.raises(ModelError, match=reason):
        check_early(base_of(tmp_path, values), LoraConfig(), private=private)


@pytest.mark.parametrize("name", IN_PRIVATE)
def test_refused_under_privacy_alone(name: str, tmp_path: Path) -> None:
    """What couples records, or was not proved not to; without privacy both are allowed."""
    values, reason = IN_PRIVATE[name]
    base = base_of(tmp_path, values)
    with pytest.raises(ModelError, match=reason):
        check_early(base, LoraConfig(), private=True)
    check_early(base, LoraConfig(), private=False)


def test_plain_bases_pass(tmp_path: Path) -> None:
    """Ordinary position scaling, one expert and no quantisation are no reason."""
    harmless = {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}, "num_experts": None}
    check_early(base_of(tmp_path, {**LLAMA, **harmless}), LoraConfig(), private=True)


@pytest.mark.parametrize(
    ("key", "reason"), [("use_dora", "DoRA"), ("dora", "DoRA"), ("modules_to_save", "head")]
)
def test_known_options_that_are_not_here_say_why(key: str, reason: str) -> None:
    """People know these keys from PEFT; "is not known" would send them looking for a typing error."""
    found = problems(changed((f"lora.{key}", True)))
    assert reason in found[f"lora.{key}"]
    assert "leave it out" in found[f"lora.{key}"]


@pytest.mark.parametrize("target", ["embed_tokens", "wte", "model.shared", "word_embeddings"])
def test_adapters_on_embeddings_are_refused(target: str, tmp_path: Path) -> None:
    """LoRA on an embedding: its parameters are never called, so they have no per-record gradient."""
    for base in (base_of(tmp_path, LLAMA), ModelConfig(base="hub/name")):
        with pytest.raises(ModelError, match=f"{target}.*LoRA on embeddings"):
            check_early(base, LoraConfig(target_modules=("q_proj", target)), private=False)


def test_usual_targets_of_an_unknown_architecture(tmp_path: Path) -> None:
    """Nobody said what is usual for it."""
    base = base_of(tmp_path, {"model_type": "opt"})
    with pytest.raises(ModelError, match=r"usual.*not known for opt"):
        check_early(base, LoraConfig(target_modules=("usual",)), private=False)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model_type": 3}'])
def test_unreadable_config_is_a_clear_error(text: str, tmp_path: Path) -> None:
    """Not JSON, not an object, no architecture."""
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        check_early(ModelConfig(base=str(tmp_path)), LoraConfig(), private=False)


def test_a_simulation_refuses_before_it_reads_data(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    """The data source does not even exist; the architecture is what is named. Nothing is left."""
    base_of(tmp_path, {"model_type": "mamba"})
    config = make_config(
        model={"base": str(tmp_path)},
        data={"source": str(tmp_path / "none")},
        privacy=PRIVATE,
    )
    with pytest.raises(ModelError, match="mamba"):
        simulation.simulate(config)
    assert not Path(str(config.run.directory)).exists()


def test_variables_in_the_base(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """``$NAME`` is looked up in the environment; one that is not set is said to be so."""
    base_of(tmp_path, {**LLAMA, "num_experts": 4})
    with pytest.raises(ModelError, match="is not set, or is not text"):
        check_early(ModelConfig(base="$FEDSLM_TEST_BASE/x"), LoraConfig(), private=False)
    monkeypatch.setenv("FEDSLM_TEST_BASE", str(tmp_path.parent))
    base = ModelConfig(base=f"$FEDSLM_TEST_BASE/{tmp_path.name}")
    with pytest.raises(ModelError, match="mixture of experts"):
        check_early(base, LoraConfig(), private=False)


def test_a_device_that_is_not_there() -> None:
    """Named, and what would do."""
    import torch

    missing = "mps" if torch.cuda.is_available() else "cuda"
    with pytest.raises(
        ModelError, match=rf'model.device="{missing}" is not on this machine; use "cpu"'
    ):
        device_of(ModelConfig(base="demo", device=missing))  # type: ignore[arg-type]


MISFITS = [
    ("bert", "causal-lm", {}, "reads forwards"),
    ("bert", "seq2seq", {}, "encoder with a decoder"),
    ("llama", "seq2seq", {}, "encoder with a decoder"),
    ("t5", "causal-lm", {}, "reads forwards"),
    ("t5", "classification", {}, r'reads each text separately; use task.pooling="mean"'),
    ("gemma3_text", "token-classification", {}, "needs a tagger"),
    ("t5", "seq2seq", {"decoder_start_token_id": 5}, "decoder_start_token_id=5 must be"),
    ("llama", "causal-lm", {"vocab_size": 1000}, "1742 tokens.*only 1000 rows"),
]


@pytest.mark.parametrize("misfit", MISFITS, ids=lambda misfit: f"{misfit[0]}-{misfit[1]}")
def test_a_base_that_cannot_do_the_task(misfit: tuple[Any, ...], tmp_path: Path) -> None:
    """The reason is named, and what would do."""
    family, name, changes, reason = misfit
    write_base(tmp_path, family, "seq2seq" if family == "t5" else "classification", **changes)
    if changes.get("vocab_size"):
        write_base(tmp_path, family, name, **changes)
    with pytest.raises(ModelError, match=reason):
        load(ModelConfig(base=str(tmp_path)), LoraConfig(), TaskConfig(name=name, max_length=32), 3)


def test_a_chat_template_that_is_not_there(family_directory: Callable[[str, str], Path]) -> None:
    """Asked for by name, it must exist."""
    task = TaskConfig(name="instruction", prompt_format="chat", max_length=32)
    with pytest.raises(ModelError, match=r"no chat template.*auto"):
        load(ModelConfig(base=str(family_directory("llama", "causal-lm"))), LoraConfig(), task, 0)


def test_a_chat_template_that_cannot_be_used(tmp_path: Path) -> None:
    """It is refused when the base is loaded, unless prompts are plain or there are none."""
    write_base(tmp_path, "llama", "causal-lm")
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    tokenizer.save_pretrained(tmp_path)
    base, lora = ModelConfig(base=str(tmp_path)), LoraConfig()
    for name in ("instruction", "preference"):
        task = TaskConfig(name=name, max_length=32)  # type: ignore[arg-type]
        with pytest.raises(ModelError, match=r'task\.prompt_format="plain"'):
            load(base, lora, task, 0)
        load(base, lora, task.model_copy(update={"prompt_format": "plain"}), 0)
    load(base, lora, TaskConfig(name="causal-lm", max_length=32), 0)


def test_a_tokenizer_without_any_padding_token(tmp_path: Path) -> None:
    """Neither a padding, an end nor an unknown token: padding cannot be made up."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO_DIRECTORY)
    plain = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    plain.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no padding, end or unknown token"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("cut", [0, 100, 100_000])
def test_damaged_weights_are_a_clear_error(cut: int, tmp_path: Path) -> None:
    """A weights file that was cut off is said to be unusable."""
    weights = write_base(tmp_path, "llama", "causal-lm") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:cut])
    task = TaskConfig(name="causal-lm", max_length=32)
    with pytest.raises(ModelError, match="cannot be loaded for causal-lm"):
        load(ModelConfig(base=str(tmp_path)), LoraConfig(), task, 0)
