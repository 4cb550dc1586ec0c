"""Imports PEFT and bitsandbytes without starting a compiler that is not needed here.

PEFT imports bitsandbytes, whose plain-torch kernels call ``torch.compile`` when they are defined: this
costs a second and 40 MB per process, for kernels that this library never compiles.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch


def _bitsandbytes() -> Any:
    """Imports the library that packs weights, with its kernels uncompiled."""
    kept = torch.compile
    # It warns about kernels that are downloaded; none of them is used.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    setattr(torch, "compile", _as_written)  # noqa: B010  (mypy knows its type)
    try:
        return importlib.import_module("bitsandbytes")
    finally:
        setattr(torch, "compile", kept)  # noqa: B010


def _as_written(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """A decorator that changes nothing."""
    return (lambda each: each) if function is None else function


bitsandbytes = _bitsandbytes()
peft: Any = importlib.import_module("peft")
