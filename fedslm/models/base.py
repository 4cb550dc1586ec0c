"""Load a frozen base model and its tokenizer, and name its exact content by a hash."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedslm.config import ModelConfig, TaskConfig
from fedslm.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

HEAD_NAMES = ("classifier", "score", "classification_head")
DEMO_DIRECTORY = Path(__file__).parent / "demo_base"
_HASHED = (
    "config.json",
    "*.safetensors",
    "*.index.json",
    "*.bin",
    "tokenizer*.json",
    "vocab.*",
    "*.model",
)
_HASHED_TOO = ("merges.txt", "added_tokens.json", "special_tokens_map.json")
_PADDED_POSITIONS = ("roberta", "xlm-roberta", "camembert")  # they count from pad_token_id + 1
_BLOCK_BYTES = 1 << 20


def resolve(model: ModelConfig) -> Path:
    """Finds the local directory of a base model, downloading it if it is a hub name.

    Raises:
        ModelError: There is no such directory, and no such model on the hub or in its cache.
    """
    if model.base == "demo":
        return DEMO_DIRECTORY
    path = Path(model.base).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ModelError(f"model.base={model.base!r} has no config.json")
        return path.resolve()
    if path.is_absolute() or model.base.startswith((".", "~")) or model.base.count("/") > 1:
        raise ModelError(f"model.base={model.base!r}: no such directory")
    return _download(model.base, model.revision)


def _download(name: str, revision: str | None) -> Path:
    """Fetches a hub snapshot, or takes it from the local cache."""
    from transformers.utils import hub

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model"]
    try:
        return Path(hub.snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub client raises dozens of unrelated types
        raise ModelError(
            f"model.base={name!r} is neither a local directory nor a model that the hub gives: "
            f"{type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error


@lru_cache(maxsize=8)
def base_sha256(directory: Path) -> str:
    """Hash over the names and bytes of config, weights and tokenizer."""
    digest = hashlib.sha256()
    files = {file for pattern in (*_HASHED, *_HASHED_TOO) for file in directory.glob(pattern)}
    for file in sorted(files):
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()


def device_of(model: ModelConfig) -> torch.device:
    """The device that clients compute on."""
    import torch

    if model.device != "auto":
        return torch.device(model.device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Loads a tokenizer that pads on the right and has a padding token.

    Raises:
        ModelError: The directory has none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise ModelError(f"{directory} has no usable tokenizer: {error}") from error
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise ModelError(f"the tokenizer in {directory} has no padding, end or unknown token")
    return tokenizer


def load_base(model: ModelConfig, task: TaskConfig, num_labels: int, pad_token_id: int) -> nn.Module:
    """Loads the frozen base for a task, in evaluation mode, on its device.

    The classifier head, if any, is new: the adapter that the server sends overwrites it.

    Raises:
        ModelError: The weights cannot be loaded for this task.
    """
    import torch

    directory = resolve(model)
    if (directory / "adapter_config.json").exists():
        raise ModelError(f"{directory} holds an adapter, not a base; merge it first")
    dtype = getattr(torch, model.dtype)
    try:
        network = _build(directory, task, num_labels, dtype, pad_token_id)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"{directory} cannot be loaded for {task.name}: {error}") from error
    _check_length(network, task)
    network.requires_grad_(False)
    return network.to(device_of(model)).eval()


def _check_length(network: nn.Module, task: TaskConfig) -> None:
    """Refuses sequences longer than the model's positions: here, not when a long record comes."""
    config: Any = network.config
    positions = getattr(config, "max_position_embeddings", None)
    if config.model_type in _PADDED_POSITIONS:
        positions = positions - config.pad_token_id - 1
    if isinstance(positions, int) and 0 < positions < task.max_length:
        raise ModelError(
            f"task.max_length={task.max_length} exceeds the model's {positions} positions; lower it"
        )


def _complete(loaded: tuple[nn.Module, dict[str, Any]], heads: tuple[str, ...]) -> nn.Module:
    """Refuses a model with weights that its files lack, but for the head that the adapter brings."""
    network, info = loaded
    missing = sorted(key for key in info["missing_keys"] if key.split(".")[0] not in heads)
    if missing:
        raise ValueError(
            f"its files lack {', '.join(missing[:3])}, which would be random and differ on each "
            f'client; for classification use task.pooling="mean"'
        )
    return network


def _build(
    directory: Path, task: TaskConfig, num_labels: int, dtype: torch.dtype, pad_token_id: int
) -> nn.Module:
    """Picks the architecture's class."""
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        logging,
    )

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True, "output_loading_info": True}
    if task.name == "causal-lm":
        return _complete(AutoModelForCausalLM.from_pretrained(directory, **options), ())
    if task.pooling == "native":
        loaded = AutoModelForSequenceClassification.from_pretrained(
            directory, num_labels=num_labels, pad_token_id=pad_token_id, **options
        )
        return _complete(loaded, HEAD_NAMES)
    from fedslm.models.pooling import MeanPoolingClassifier

    encoder = _complete(AutoModel.from_pretrained(directory, **options), ("pooler",))
    return MeanPoolingClassifier(encoder, num_labels)
