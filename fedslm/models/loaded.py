"""A base model with its adapter, loaded once per process and reused for every client and round."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property, lru_cache
from inspect import signature
from typing import TYPE_CHECKING, Any, Literal

from fedslm.config import LoraConfig, ModelConfig, TaskConfig
from fedslm.config.tasks import TASKS
from fedslm.errors import ModelError
from fedslm.models import families
from fedslm.models.adapter import AttachedAdapter, attach
from fedslm.models.base import base_sha256, decided, device_of, load_base, load_tokenizer, resolve
from fedslm.models.networks import checkpoint_activations
from fedslm.tasks.chat import frame_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from fedslm.models.cached_layers import CachedLayers

logger = logging.getLogger(__name__)
Trains = Literal["factors", "core", "head"]


@dataclass(frozen=True)
class LoadedModel:
    """A frozen base model, its adapter and its tokenizer.

    Attributes:
        adapter: The attached adapter; ``adapter.network`` gives ``.logits``.
        tokenizer: Pads on the right.
        device: The device of the model.
        base_sha256: Hash of the base model's files.
        dtype: The precision in which the base computes; the adapter is float32.
        only_head: Whether no round changes the LoRA factors, and B is zero.
    """

    adapter: AttachedAdapter
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    base_sha256: str
    dtype: torch.dtype
    only_head: bool = False

    @property
    def is_rounded(self) -> bool:
        """True if the base computes in less than float32."""
        return self.dtype.itemsize < 4

    @property
    def vocabulary(self) -> int:
        """Vocabulary size of a language model: the number of logits at one position."""
        config: Any = self.adapter.network.config
        return int(config.vocab_size)

    @cached_property
    def keeps_positions(self) -> bool:
        """True if the network takes ``logits_to_keep``, as the decoders of transformers do."""
        network: Any = self.adapter.network
        return "logits_to_keep" in signature(network.get_base_model().forward).parameters

    @cached_property
    def cached_layers(self) -> CachedLayers | None:
        """What enters the lowest adapted layer, for records seen before; None if nothing is below it.

        Only on a CPU: a GPU computes many records in the time of one.
        """
        from fedslm.models.cached_layers import CachedLayers, most_bytes_here, prefix_of

        on_cpu = self.device.type == "cpu"
        prefix = prefix_of(self.adapter, only_head=self.only_head) if on_cpu else None
        return None if prefix is None else CachedLayers(prefix, most_bytes_here())

    def forget_records(self) -> None:
        """Forgets what is kept of records."""
        if self.cached_layers is not None:
            self.cached_layers.clear()


@lru_cache(maxsize=1)
def load(
    model: ModelConfig, lora: LoraConfig, task: TaskConfig, num_labels: int, trains: Trains = "factors"
) -> LoadedModel:
    """Loads a base model and attaches an adapter; one model stays in memory per process.

    Args:
        model: The base.
        lora: The adapter.
        task: The task of the network.
        num_labels: Classes; 0 if the task has none.
        trains: What training changes: LoRA factors, a core between them (Fed-SB), or only the head.

    Raises:
        ModelError: The model, its tokenizer or its LoRA targets are not usable.
    """
    import torch

    directory = resolve(model)
    families.check(families.configuration(directory), lora.target_modules, private=False)
    tokenizer = load_tokenizer(directory)
    _check_template(model, task, tokenizer)
    asked, model = model.dtype, decided(model, directory, task, num_labels)
    network = load_base(model, task, num_labels, tokenizer)
    adapter = attach(network, lora, core=trains == "core")
    if model.gradient_checkpointing:
        checkpoint_activations(network)
    device = device_of(model)
    text = 'model.base=%r computes in %s on %s (model.dtype="%s")'
    logger.info(text, model.base, model.dtype, device, asked)
    sha256, dtype = base_sha256(directory), getattr(torch, model.dtype)
    return LoadedModel(adapter, tokenizer, device, sha256, dtype, only_head=trains == "head")


def _check_template(model: ModelConfig, task: TaskConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a chat template that is missing, or that cannot write an answer."""
    if task.prompt_format == "chat" and not tokenizer.chat_template:
        raise ModelError(
            f'task.prompt_format="chat", but the tokenizer of {model.base!r} has no chat template; use '
            f'"plain" or "auto"'
        )
    chats = TASKS[task.name].reads_turns and task.prompt_format != "plain"
    if chats and tokenizer.chat_template:
        frame_of(tokenizer)
