"""Loads a frozen base model and its tokenizer, and identifies its exact content by a hash."""

from __future__ import annotations

import hashlib
import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from fedslm.config import LoraConfig, ModelConfig, TaskConfig
from fedslm.errors import ModelError
from fedslm.models import demo_large, families, networks, precision
from fedslm.storage import expand

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

DEMO_DIRECTORY = Path(__file__).parent / "demo_base"
_HASHED = (
    "config.json",
    "*.safetensors",
    "*.index.json",
    "*.bin",
    "tokenizer*.json",
    "vocab.*",
    "*.model",
    "*.jinja",
)
_HASHED_TOO = ("merges.txt", "added_tokens.json", "special_tokens_map.json")
_FILES = ("config.json", "*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
_BLOCK_BYTES = 1 << 20
_DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")  # CUDA, CUDA under WSL, ROCm


def resolve(model: ModelConfig, *, may_fetch: bool = True) -> Path:
    """Finds the local directory of a base model, and downloads it if it is a hub name.

    Args:
        model: The base.
        may_fetch: If False, looks up a hub name only in the cache, and refuses a path with a variable.

    Raises:
        ModelError: There is no such directory, and no such model on the hub or in its cache.
    """
    if not may_fetch and "$" in model.base:
        raise ModelError("model.base names a variable of the environment")
    if (path := local(model)) is not None:
        return path
    return _download(model.base, model.revision, _FILES, may_fetch=may_fetch)


def resolve_config(model: ModelConfig) -> Path:
    """Finds a directory with a base's ``config.json``; does not download the weights of a hub model.

    Raises:
        ModelError: As in :func:`resolve`.
    """
    return local(model) or _download(model.base, model.revision, _FILES[:1])


def local(model: ModelConfig) -> Path | None:
    """Returns the local directory of a base model; None if it can only be a hub name.

    Raises:
        ModelError: It is a path, but there is no such directory or it contains no model.
    """
    if model.base == "demo":
        return DEMO_DIRECTORY
    if model.base == demo_large.NAME:
        return demo_large.demo_large(DEMO_DIRECTORY, base_sha256(DEMO_DIRECTORY))
    text = expand(model.base)
    if "$" in text:
        raise ModelError(
            f"model.base={model.base!r}: an environment variable in it is not set, or is not text"
        )
    path = Path(text)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ModelError(f"model.base={model.base!r} has no config.json")
        return path.resolve()
    if path.is_file():
        raise ModelError(f"model.base={model.base!r} is a file; give the directory of its config.json")
    if path.is_absolute() or text.startswith(".") or text.count("/") > 1:
        raise ModelError(f"model.base={model.base!r}: no such directory")
    return None


def check_early(model: ModelConfig, lora: LoraConfig, *, private: bool) -> None:
    """Refuses a base or targets that cannot be trained, before data or weights are read.

    A hub name is checked only when it is loaded.

    Args:
        model: The base.
        lora: Its targets.
        private: Whether training is private.

    Raises:
        ModelError: The base or a target cannot be trained; the message gives the reason.
    """
    families.check_targets(lora.target_modules)
    directory = local(model)
    if directory is not None:
        families.check(families.configuration(directory), lora.target_modules, private=private)


def _download(
    name: str, revision: str | None, files: tuple[str, ...], *, may_fetch: bool = True
) -> Path:
    """Downloads some files of a hub snapshot, or finds them in the local cache."""
    from transformers.utils import hub

    try:
        found = hub.snapshot_download(
            name, revision=revision, allow_patterns=list(files), local_files_only=not may_fetch
        )
        return Path(found)
    except Exception as error:  # the hub client raises dozens of unrelated types
        raise ModelError(
            f"model.base={name!r} is neither a local directory nor a model that the hub gives (or "
            f"there is no network and no copy in its cache); give the path of a directory: "
            f"{type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error


@lru_cache(maxsize=8)
def base_sha256(directory: Path) -> str:
    """Returns a hash over the names and bytes of config, weights and tokenizer."""
    digest = hashlib.sha256()
    files = {file for pattern in (*_HASHED, *_HASHED_TOO) for file in directory.glob(pattern)}
    for file in sorted(files):
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()


def num_gpus() -> int:
    """Number of CUDA devices of this machine; asks the driver and does not begin to use one.

    Without a driver, torch is not imported: that takes two seconds.
    """
    if sys.platform == "linux" and not any(map(os.path.exists, _DRIVERS)):
        return 0
    import torch

    return torch.cuda.device_count()


def has_mps() -> bool:
    """Whether this machine has Apple's GPU."""
    if sys.platform != "darwin":
        return False
    import torch

    return torch.backends.mps.is_available()


def device_of(model: ModelConfig) -> torch.device:
    """Returns the device that clients compute on.

    Raises:
        ModelError: This machine has no such device.
    """
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if model.device == "auto":
        return torch.device(next(name for name, is_there in there.items() if is_there))
    if not there[model.device]:
        raise ModelError(f'model.device="{model.device}" is not on this machine; use "cpu" or "auto"')
    return torch.device(model.device)


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Loads a tokenizer that pads on the right and has a padding token.

    Raises:
        ModelError: The directory has no usable tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"{directory} has no usable tokenizer: {error}") from error
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise ModelError(f"the tokenizer in {directory} has no padding, end or unknown token")
    return tokenizer


def decided(model: ModelConfig, directory: Path, task: TaskConfig, num_labels: int) -> ModelConfig:
    """Returns the section with the precision that this machine uses, in place of "auto".

    Args:
        model: The base.
        directory: Its directory; only ``config.json`` is read.
        task: The task of the network.
        num_labels: Classes; 0 if the task has none.

    Raises:
        ModelError: The device is missing, or the architecture has no network for this task.
    """

    def parameters() -> int:
        return networks.num_parameters(networks.on_meta(directory, task, num_labels))

    return model.model_copy(update={"dtype": precision.chosen(model, device_of(model), parameters)})


def load_base(
    model: ModelConfig, task: TaskConfig, num_labels: int, tokenizer: PreTrainedTokenizerBase
) -> nn.Module:
    """Loads the frozen base for a task, in evaluation mode, on its device.

    The classifier head, if any, is new: the adapter that the server sends overwrites it.

    Raises:
        ModelError: The weights cannot be loaded for this task.
    """
    import torch

    directory = resolve(model)
    if (directory / "adapter_config.json").exists():
        raise ModelError(f"{directory} holds an adapter, not a base; merge it first")
    families.check(families.configuration(directory), (), private=False)
    model = decided(model, directory, task, num_labels)
    device, dtype = device_of(model), getattr(torch, model.dtype)
    # In their stored precision the weights are mapped: the whole base is never in memory at once.
    stored = dtype if model.quantization == "none" else "auto"
    network = networks.from_files(directory, task, num_labels, int(tokenizer.pad_token_id), stored)
    networks.check_length(network, task)
    networks.check_vocabulary(network, max(tokenizer.get_vocab().values(), default=-1) + 1)
    network.requires_grad_(False)
    if model.quantization == "none":
        return network.to(device).eval()
    from fedslm.models.quantized import quantize

    quantize(network, model.quantization, dtype, device)
    return network.eval()
