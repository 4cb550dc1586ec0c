"""A setup, an adapter and a reply as they travel."""

from __future__ import annotations

import numpy as np
from flwr.app import Array, ArrayRecord

from fedslm.config import (
    AggregationConfig,
    CompressionConfig,
    DataConfig,
    LoraConfig,
    ModelConfig,
    PersonalizationConfig,
    TaskConfig,
    TrainingConfig,
)
from fedslm.privacy.plan import NoPrivacy
from fedslm.protocol.messages import Reply
from fedslm.protocol.setup import Setup
from fedslm.records import AdapterState

SETUP = Setup(
    run_id="0123abcd",
    seed=7,
    directory="/somewhere/runs/ä",
    version="0.1.0",
    model=ModelConfig(base="demo", revision="main"),
    lora=LoraConfig(rank=4, target_modules=("query", "value")),
    data=DataConfig(source="demo", label_column=None, partition="natural"),
    task=TaskConfig(name="classification", labels=("a", "b c")),
    training=TrainingConfig(learning_rate=3e-4),
    aggregation=AggregationConfig(method="ffa"),
    compression=CompressionConfig(upload="int8"),
    personalization=PersonalizationConfig(),
    labels=("a", "b c"),
    plan=NoPrivacy(4, 2),
    config_sha256="config",
    base_sha256="base",
    frozen_sha256="frozen",
)
ADAPTER = AdapterState(
    {
        "b": np.array([[0.0, -0.0, 1e-45], [np.inf, 1.5, -3.4e38]], np.float32),
        "a": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    }
)
REPLY = Reply(
    "ok",
    3,
    delta=ADAPTER,
    delta_sha256=ADAPTER.sha256(),
    base_sha256="base",
    weight=2.5,
    statement='{"signed": "ü"}',
    metric=(1 / 3, 0.1 + 0.2),
)


def as_record(content: bytes, name: str = "tensors") -> ArrayRecord:
    """Bytes in the place of tensors."""
    return ArrayRecord({name: Array("uint8", (len(content),), "safetensors", content)})
