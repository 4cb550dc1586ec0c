"""Section on distilling the federated model into a larger one at the server."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedslm.config.base import Names, OptionalCount, OptionalText, Section

DistillMethod = Literal[
    "auto",
    "proxy-target",
    "forward-kl",
    "reverse-kl",
    "jsd",
    "gated-reverse-kl",
    "log-confidence",
    "sequence",
    "labels",
]


class DistillConfig(Section):
    """Distillation of the federated model into a larger student, on public data only."""

    student: OptionalText = None
    """Hub name or directory of the larger model; absent: nothing is distilled."""
    source: OptionalText = None
    """Source of the public records for both models: hub name, path or "demo"."""
    split: str = "train"
    """Split (or file stem) of `source`."""
    max_records: int = Field(10_000, ge=1)
    """Most public records; a larger set is sampled by seed."""
    every: OptionalCount = Field(None, ge=1)
    """Rounds between distillations; absent: only after the last round."""
    mutual_steps: int = Field(0, ge=0)
    """Steps in which the small model learns back from the student before each next broadcast."""
    method: DistillMethod = "auto"
    """auto: gated-reverse-kl for classes, proxy-target for the same tokenizer, sequence for another."""
    alpha: float = Field(1.0, ge=0)
    """proxy-target: weight of the change that federation made."""
    clip: float = Field(5.0, gt=0)
    """proxy-target: largest change of a log-probability."""
    temperature: float = Field(1.0, gt=0)
    """forward-kl, reverse-kl, jsd: temperature of both models' probabilities."""
    beta: float = Field(0.5, ge=0, le=1)
    """jsd: 0 is forward KL, 1 reverse KL."""
    confidence: float = Field(0.6, ge=0, lt=1)
    """gated-reverse-kl: smallest top-class probability at which the teacher's answer is used."""
    self_confidence: float = Field(0.5, ge=0, lt=1)
    """log-confidence: final weight of the student's own hardened predictions."""
    label_weight: float = Field(0.0, ge=0)
    """Weight of the cross-entropy on public labels, where they exist; 0 ignores them."""
    sampled_fraction: float = Field(0.5, ge=0, le=1)
    """Share of the texts that the teacher continues itself (language)."""
    samples_per_prompt: int = Field(4, ge=1, le=64)
    """sequence: texts the teacher generates for each prompt; the most confident half is kept."""
    general_source: OptionalText = None
    """General public text (language) on which the student is kept close to its original output."""
    general_split: str = "train"
    """Split (or file stem) of `general_source` to train on."""
    general_test_split: str = "test"
    """Split of `general_source` to measure perplexity on."""
    general_weight: float = Field(0.1, ge=0)
    """Weight of the loss on general text."""
    rank: int = Field(16, ge=1, le=1024)
    """Rank of the student's adapter."""
    adapter_alpha: float = Field(16.0, gt=0)
    """Scaling numerator of the student's adapter."""
    target_modules: Names = ("all-linear",)
    """Layers of the student to adapt; same values as lora.target_modules."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the student's frozen weights (not float16, as model.dtype); losses are float32."""
    quantization: Literal["none", "int8", "int4"] = "none"
    """Store the student's linear layers in 8 or 4 bits."""
    gradient_checkpointing: bool = False
    """Recompute the student's activations in the backward pass: less memory, more time."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where student and teacher compute."""
    cached_samples: int = Field(0, ge=0)
    """If both models do not fit into memory: cache this many sampled tokens of each teacher
    distribution (all classes of a classifier), then unload the teacher. 0: keep both in memory."""
    steps: int = Field(200, ge=1)
    """Optimizer steps of the student."""
    batch_size: int = Field(32, ge=1)
    """Records in a step."""
    micro_batch_size: int = Field(16, ge=1)
    """Most records in one forward pass."""
    learning_rate: float = Field(1e-4, gt=0)
    """Peak of the learning rate: 3 % warm-up, then a cosine to 0."""
