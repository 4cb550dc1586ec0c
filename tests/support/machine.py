"""What a test's figures may depend on, in one line: a report of a failure is understood by it."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version

_PACKAGES = ("torch", "numpy", "transformers", "peft", "opacus", "flwr")


def threads() -> int:
    """Threads that tests compute with."""
    return int(os.environ.get("FEDSLM_TEST_THREADS", "1"))


def machine() -> str:
    """Kernels, threads and versions."""
    import torch

    kernels = torch.backends.cpu.get_cpu_capability()
    versions = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    return (
        f"machine: {platform.machine()}, kernels {kernels}, {threads()} of {os.cpu_count()} threads, "
        f"python {platform.python_version()}, {versions}"
    )
