"""The base model with LoRA, as Flower's own examples make it."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForSequenceClassification


def load(context: Context) -> PeftModel:
    """Loads the base and attaches an adapter."""
    config = context.run_config
    base = AutoModelForSequenceClassification.from_pretrained(
        config["base"], num_labels=int(config["labels"])
    )
    lora = LoraConfig(r=int(config["rank"]), target_modules="all-linear", task_type="SEQ_CLS")
    return get_peft_model(base.float(), lora)


def arrays_of(model: PeftModel) -> ArrayRecord:
    """What a round sends."""
    return ArrayRecord(get_peft_model_state_dict(model))
