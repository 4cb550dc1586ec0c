"""The network that a task needs: the transformers class and its head."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, assert_never

from fedslm.config import TaskConfig
from fedslm.config.tasks import TASKS
from fedslm.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import nn

HEAD_NAMES = ("classifier", "pre_classifier", "score", "classification_head", "center")
_PADDED_POSITIONS = ("roberta", "xlm-roberta", "camembert")  # their positions start at pad_token_id + 1


def from_files(
    directory: Path, task: TaskConfig, num_labels: int, pad_token_id: int, dtype: torch.dtype | str
) -> nn.Module:
    """Loads a base and adds the task's head.

    Args:
        directory: Directory with ``config.json`` and weights.
        task: The task of the network.
        num_labels: Classes; 0 if the task has none.
        pad_token_id: The tokenizer's padding token.
        dtype: Precision of the weights in memory; "auto" keeps that of the files, which are then
            memory-mapped.

    Raises:
        ModelError: The architecture has no network for this task, or the files lack weights.
    """
    config = _configuration(directory, num_labels, pad_token_id)
    wanted = _class_for(task, config)
    try:
        loaded = wanted.from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            attn_implementation=_attention(wanted),
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # transformers and its file formats raise many unrelated types
        raise ModelError(f"{directory} cannot be loaded for {task.name}: {first(error)}") from error
    return _finished(_complete(directory, loaded, task), task, num_labels)


def on_meta(directory: Path, task: TaskConfig, num_labels: int, pad_token_id: int = 0) -> nn.Module:
    """Builds the same network from ``config.json`` only: no weights, no memory.

    Raises:
        ModelError: The architecture has no network for this task.
    """
    import torch

    config = _configuration(directory, num_labels, pad_token_id)
    wanted = _class_for(task, config)
    with torch.device("meta"):
        return _finished(wanted(config), task, num_labels)


def num_layers(directory: Path) -> int:
    """Returns the number of layers; for an encoder-decoder, those of the encoder.

    Raises:
        ModelError: ``config.json`` cannot be used.
    """
    return int(_configuration(directory, 0, 0).num_hidden_layers)


def untrained(
    directory: Path, task: TaskConfig, num_labels: int, dtype: torch.dtype, layers: int
) -> nn.Module:
    """Builds the same network with random weights and only some of its layers, to time its passes.

    Args:
        directory: Directory with ``config.json``; no other file is read.
        task: The task of the network.
        num_labels: Classes; 0 if the task has none.
        dtype: Precision of the weights.
        layers: Most layers; an encoder-decoder has as many in each half.

    Raises:
        ModelError: The architecture has no network for this task.
    """
    config = _configuration(directory, num_labels, 0)
    for key in ("num_hidden_layers", "num_decoder_layers"):
        if isinstance(count := getattr(config, key, None), int):
            setattr(config, key, min(count, layers))
    wanted = _class_for(task, config)
    network = wanted._from_config(config, dtype=dtype, attn_implementation=_attention(wanted))
    return _finished(network, task, num_labels).eval()


def inner(network: nn.Module) -> Any:
    """Returns the transformers model inside: the network itself, or the encoder of our pooling."""
    from fedslm.models.pooling import MeanPoolingClassifier

    return network.encoder if isinstance(network, MeanPoolingClassifier) else network


def num_parameters(network: nn.Module) -> int:
    """Returns the number of the base's parameters, each tied one once, without new heads."""
    named = network.named_parameters()
    return sum(each.numel() for name, each in named if name.split(".")[0] not in HEAD_NAMES)


def checkpoint_activations(network: nn.Module) -> None:
    """Makes the network recompute its activations in the backward pass instead of storing them.

    Uses the reentrant variant: the other one runs forward passes that private training's hooks miss.

    Raises:
        ModelError: The architecture does not support it.
    """
    try:
        inner(network).activation_checkpointing_enable({"use_reentrant": True})
    except ValueError as error:
        raise ModelError(
            f"model.gradient_checkpointing=true: {first(error)}; leave it out for this base"
        ) from error


def forgets_activations(module: nn.Module) -> bool:
    """True for a layer changed by :func:`checkpoint_activations`; it recomputes in training mode."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return isinstance(module, GradientCheckpointingLayer) and bool(module.gradient_checkpointing)


def check_length(network: nn.Module, task: TaskConfig) -> None:
    """Refuses a maximum length above the model's positions, before a long record fails.

    Raises:
        ModelError: The maximum length is too large; the message gives the number of positions.
    """
    config: Any = network.config
    positions = getattr(config, "max_position_embeddings", None)
    if config.model_type in _PADDED_POSITIONS:
        positions = positions - config.pad_token_id - 1
    if isinstance(positions, int) and 0 < positions < task.max_length:
        raise ModelError(
            f"task.max_length={task.max_length} exceeds the model's {positions} positions; lower it"
        )


def check_vocabulary(network: nn.Module, num_tokens: int) -> None:
    """Refuses a tokenizer with tokens that have no row in the base's embedding.

    Raises:
        ModelError: The tokenizer has too many tokens; the message gives both numbers.
    """
    rows = int(inner(network).get_input_embeddings().weight.shape[0])
    if num_tokens > rows:
        raise ModelError(
            f"the tokenizer has {num_tokens} tokens, the base's embedding only {rows} rows: they do "
            f"not belong together; give the base its own tokenizer files"
        )


def _configuration(directory: Path, num_labels: int, pad_token_id: int) -> Any:
    """Loads the transformers config of a base, for a number of classes."""
    from transformers import AutoConfig, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    classes = {"num_labels": num_labels} if num_labels else {}
    try:
        config = AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False, **classes
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{directory}/config.json is not usable: {first(error)}") from error
    if pad_token_id < config.vocab_size:  # otherwise check_vocabulary refuses it later
        config.pad_token_id = pad_token_id
    return config


def _class_for(task: TaskConfig, config: Any) -> Any:
    """Returns the transformers class for a task and an architecture."""
    import transformers

    names, wanted = _names(task, bool(config.is_encoder_decoder))
    name = names.get(config.model_type)
    if isinstance(name, tuple):  # some architectures have several; the first is the plain one
        name = name[0]
    if name is None:
        raise ModelError(
            f"a {config.model_type} base cannot do task.name={task.name!r}, which needs {wanted}"
        )
    return getattr(transformers, name)


def _names(task: TaskConfig, is_encoder_decoder: bool) -> tuple[Any, str]:
    """Returns class names by architecture, and a description of what the task needs."""
    from transformers.models.auto import modeling_auto as auto

    match TASKS[task.name].network:
        case "classifier" if task.pooling != "native":
            names = auto.MODEL_MAPPING_NAMES
            if is_encoder_decoder:
                names = auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES
            return names, "a text encoder"
        case "classifier" if is_encoder_decoder:
            return {}, 'a classifier that reads each text separately; use task.pooling="mean"'
        case "classifier":
            return auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, (
                'a classifier of its own; use task.pooling="mean"'
            )
        case "tagger":
            return auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, "a tagger"
        case "decoder":
            two_way = auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
            names = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
            return {kind: names[kind] for kind in names if kind not in two_way}, (
                "a language model that reads forwards"
            )
        case "encoder-decoder":
            return auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, "an encoder with a decoder"
        case other:
            assert_never(other)


def _is_pooled(task: TaskConfig) -> bool:
    """True if the task uses our own head."""
    return task.pooling != "native" and TASKS[task.name].network == "classifier"


def first(error: Exception) -> str:
    """Returns the first line of an error; transformers appends long lists after it."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _attention(wanted: Any) -> str:
    """Names padded attention: by default, a library may choose a kernel that joins records."""
    return "sdpa" if wanted._supports_sdpa else "eager"


def _complete(directory: Path, loaded: tuple[nn.Module, dict[str, Any]], task: TaskConfig) -> nn.Module:
    """Refuses a model whose files lack weights, except the head, which the adapter provides."""
    network, info = loaded
    new = ("pooler",) if _is_pooled(task) else HEAD_NAMES
    missing = sorted(key for key in info["missing_keys"] if key.split(".")[0] not in new)
    if missing:
        raise ModelError(
            f"{directory} cannot be loaded for {task.name}: its files lack {', '.join(missing[:3])}, "
            f"which would be random and differ on each client; for classification use "
            f'task.pooling="mean"'
        )
    return network


def _finished(network: Any, task: TaskConfig, num_labels: int) -> nn.Module:
    """Adds our own head if the task needs it, and checks the task's assumptions."""
    network.config.use_cache = False  # training does not use a KV cache
    if TASKS[task.name].network == "encoder-decoder":
        begins, pads = network.config.decoder_start_token_id, network.config.pad_token_id
        if begins != pads:
            raise ModelError(
                f"decoder_start_token_id={begins} must be the padding token {pads}, as in the T5 "
                f"family, for task.name={task.name!r}; use such a base"
            )
    if not _is_pooled(task):
        return network  # type: ignore[no-any-return]
    from fedslm.models.pooling import MeanPoolingClassifier

    return MeanPoolingClassifier(network, num_labels, normalized=task.pooling == "normalized")
