"""Federated, privacy-preserving fine-tuning of small language models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedslm.api import RunResult, resume, simulate, train
    from fedslm.api.students import Proof
    from fedslm.config import Config
    from fedslm.config import from_toml as load_config
    from fedslm.errors import FedslmError
    from fedslm.federation.observers import Observer

__version__ = "0.1.0"
__all__ = [
    "Config",
    "FedslmError",
    "Observer",
    "Proof",
    "RunResult",
    "__version__",
    "load_config",
    "resume",
    "simulate",
    "train",
]

_HOMES = {
    "Config": ("fedslm.config", "Config"),
    "FedslmError": ("fedslm.errors", "FedslmError"),
    "Observer": ("fedslm.federation.observers", "Observer"),
    "Proof": ("fedslm.api.students", "Proof"),
    "RunResult": ("fedslm.api", "RunResult"),
    "load_config": ("fedslm.config", "from_toml"),
    "resume": ("fedslm.api", "resume"),
    "simulate": ("fedslm.api", "simulate"),
    "train": ("fedslm.api", "train"),
}


def __getattr__(name: str) -> Any:
    """Imports public names on first use, so that ``import fedslm`` stays fast."""
    from importlib import import_module

    from fedslm.extras import explained

    if name not in _HOMES:
        raise AttributeError(f"module 'fedslm' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    with explained():
        return getattr(import_module(module), attribute)
