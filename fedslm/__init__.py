"""Federated, privacy-preserving fine-tuning of small language models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedslm.config import Config
    from fedslm.config import from_toml as load_config
    from fedslm.errors import FedslmError
    from fedslm.simulation import resume, simulate

__version__ = "0.1.0"
__all__ = ["Config", "FedslmError", "__version__", "load_config", "resume", "simulate"]

_HOMES = {
    "Config": ("fedslm.config", "Config"),
    "FedslmError": ("fedslm.errors", "FedslmError"),
    "load_config": ("fedslm.config", "from_toml"),
    "resume": ("fedslm.simulation", "resume"),
    "simulate": ("fedslm.simulation", "simulate"),
}


def __getattr__(name: str) -> Any:
    """Imports public names when they are first used: ``import fedslm`` stays fast."""
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'fedslm' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)
