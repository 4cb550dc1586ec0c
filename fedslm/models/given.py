"""A base model that a caller has loaded, written as files that every part of a run reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedslm.errors import ConfigError, Problem, RunError

_HEADS = ("Classification", "QuestionAnswering", "MultipleChoice", "NextSentencePrediction")


@dataclass(frozen=True)
class GivenBase:
    """The base that a caller gave as an argument.

    Attributes:
        name: A hub name or a directory; empty for a loaded model.
        network: A transformers model; None for a name.
        tokenizer: Its tokenizer; None for a name.
    """

    name: str = ""
    network: Any = None
    tokenizer: Any = None

    @classmethod
    def of(cls, value: object, key: str = "model") -> GivenBase | None:
        """Checks what a caller gave; None stays None.

        Args:
            value: A hub name, a directory, or a pair of a transformers model and its tokenizer.
            key: The argument that it was given as, for errors.

        Raises:
            ConfigError: It is no base, or holds an adapter, a task's head or no weights.
        """
        match value:
            case None:
                return None
            case str() | Path():
                return cls(str(value))
            case (network, tokenizer):
                problem = _problem_of(network, tokenizer)
            case _:
                problem = (
                    f"value of type {type(value).__name__}: should be a hub name, a directory, or a "
                    f"transformers model and its tokenizer as a pair"
                )
        if problem:
            raise ConfigError([Problem(key, problem)])
        return cls("", network, tokenizer)

    @property
    def is_loaded(self) -> bool:
        """Whether it is a loaded model."""
        return self.network is not None

    def changes(self, folder: Path) -> Mapping[str, Any]:
        """Returns the config keys that make a run read this base.

        Args:
            folder: Directory of its files, for a loaded model.
        """
        if not self.is_loaded:
            return {"model.base": self.name}
        return {"model.base": str(folder), "model.revision": None}

    def write(self, folder: Path) -> None:
        """Writes a loaded model; its mode, its device and its weights stay as they are.

        Raises:
            RunError: It cannot be written.
        """
        try:
            self.network.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        except Exception as error:  # transformers and its file formats raise many unrelated types
            raise RunError(f"the model cannot be written to {folder}: {error}") from error


def _problem_of(network: Any, tokenizer: Any) -> str:
    """Returns why a pair is no base; empty if it is one."""
    import transformers

    if hasattr(network, "peft_config") or getattr(network, "_hf_peft_config_loaded", False):
        return "holds an adapter: give its merge_and_unload(), or the base without it"
    kinds = (transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase)
    for value, kind, what in zip((network, tokenizer), kinds, ("model", "tokenizer"), strict=True):
        if not isinstance(value, kind):
            return f"has a {type(value).__name__} where its transformers {what} should be"
    name = type(network).__name__
    if name.endswith(_HEADS):
        inner = network.base_model_prefix
        return f"is a {name}, which has a task's head already: give its base, model.{inner}"
    if getattr(network, "is_quantized", False):
        return "is quantized: give its name or directory, and set model.quantization"
    if any(each.is_meta for each in network.parameters()):
        return 'has weights on device "meta", which hold no values: load them, on the CPU for example'
    return ""
